"""A user's loss and advantage, written outside the package and named in the TOML."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from rl_lora.advantages import TermRewards, takes_terms
from rl_lora.config import load_config
from rl_lora.config.algorithm import load_algorithm, user_code
from rl_lora.errors import UserError
from rl_lora.losses import needs_of
from rl_lora.train import train

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.toml"
MODULE = """
from pydantic import PositiveFloat

from rl_lora.advantages import group_mean
from rl_lora.losses import needs


@needs(old_logprobs=True)
def scaled(x, *, factor: PositiveFloat, seen: str = "calls.txt"):
    with open(seen, "a") as file:
        file.write("x")
    ratio_C = x.log_ratio_to_old().exp()
    return -factor * (x.weights_C * ratio_C * x.advantages_C).sum(), 0


def best_only(rewards_N_G, *, margin: float = 0.0):
    return [
        [float(r > margin and r == max(group) > min(group)) for r in group] for group in rewards_N_G
    ]


def only_a_number(x):
    return 0.5


def without_gradient(x):
    return x.weights_C.sum(), 0


def undeclared(x):
    return x.log_ratio_to_old().sum(), 0


def first_term(rewards_N_G, terms_K):
    return group_mean(terms_K[0].rewards_N_G)


def too_short(rewards_N_G):
    return [group[1:] for group in rewards_N_G]
"""


@pytest.fixture
def _module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_module: Callable[[str, str], Path]
) -> None:
    write_module("my_losses", MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])


def loaded(*overrides: str) -> None:
    load_algorithm(load_config(None, [f"algorithm.{one}" for one in overrides]).algorithm)


@pytest.mark.usefixtures("_module")
def test_a_run_learns_by_functions_from_the_working_directory(tmp_path: Path) -> None:
    short = ["run.num_steps=1", "data.held_out=4", "sampling.num_prompts=8"]
    own = ["loss=my_losses:scaled", "advantage=my_losses:best_only", "factor=2", "margin=-1"]
    overrides = [*short, *(f"algorithm.{one}" for one in own), "optim.num_updates=2"]
    train(load_config(SMOKE, [*overrides, f"run.output_dir={tmp_path}"]), quiet=True)
    (row,) = (json.loads(line) for line in (tmp_path / "smoke/metrics.jsonl").open())
    assert row["grad/norm"] > 0
    assert row["learn/updates"] == 2
    assert len((tmp_path / "calls.txt").read_text()) >= 3  # the trial, and one at least an update


@pytest.mark.usefixtures("_module")
def test_the_options_are_bound_and_the_needs_seen_through_the_binding() -> None:
    section = load_config(None, ["algorithm.loss=my_losses:scaled", "algorithm.factor=2"]).algorithm
    loss, advantage, terms = load_algorithm(section)
    assert isinstance(loss, partial)
    assert loss.keywords == {"factor": 2.0}
    assert needs_of(loss).old_logprobs
    assert terms["mask"] is None
    assert advantage([[1.0, 0.0]]) == [[0.5, -0.5]]


@pytest.mark.usefixtures("_module")
def test_an_advantage_may_take_several_rewards_one_by_one() -> None:
    section = load_config(None, ["algorithm.advantage=my_losses:first_term"]).algorithm
    advantage = load_algorithm(section).advantage
    assert takes_terms(advantage)
    terms_K = [TermRewards("a", 1.0, [[1.0, 0.0]]), TermRewards("b", 1.0, [[0.0, 1.0]])]
    assert advantage([[1.0, 1.0]], terms_K) == [[0.5, -0.5]]


@pytest.mark.usefixtures("_module")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=my_losses:scaled"], "needs the option 'factor'; set algorithm.factor"),
        (["loss=my_losses:scaled", "factor=-1"], "algorithm.factor = -1: .* greater than 0"),
        (["loss=my_losses:scaled", "factr=1", "factor=1"], "did you mean 'factor'"),
        (["loss=my_losses:scalde"], "has no function 'scalde'; did you mean 'scaled'"),
        (["loss=my_loses:scaled"], "no module 'my_loses'; run in its folder"),
        (["loss=my_losses:"], "not of the form 'module:function'"),
        (["loss=my_losses:only_a_number"], r"must return \(loss, num_clipped\).* returned 0.5"),
        (["loss=my_losses:without_gradient"], "must be finite and carry the gradient"),
        (["loss=my_losses:undeclared"], r"raised ValueError: .*@needs\(old_logprobs=True\)"),
        (["advantage=my_losses:too_short"], "a finite number for each reward"),
        (["advantage=my_losses:missing"], "algorithm.advantage .* has no function 'missing'"),
    ],
)
def test_a_bad_user_function_gives_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        loaded(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=pp"], r"algorithm.loss='pp' is unknown; did you mean 'ppo'\?"),
        (["advantage=mean"], "algorithm.advantage='mean' is unknown; did you mean 'group_mean'"),
        (["loss=ppo", "clip_low=2"], "algorithm.clip_low = 2: .* less than or equal to 1"),
        (["loss=ppo", "clip_low=wide"], "algorithm.clip_low = 'wide': .* valid number"),
        (["clip_low=0.1"], "clip_low = 0.1 is an option of ppo, gspo, cispo, not of loss 'imp"),
        (["mask_low=0.1"], "mask_low = 0.1 is an option of mask 'token', mask 'sequence', mask 'g"),
        (["mask=token", "mask_low=2"], "algorithm.mask_low = 2: .* less than or equal to 1"),
        (["mask=tokn"], "algorithm.mask = 'tokn': Input should be 'none', 'token', 'sequence' or"),
        (["loss=ppo", "ratio_level=word"], "algorithm.ratio_level = 'word': Input should be 'tok"),
        (["loss=ppo", "clip_hihg=0.1"], "'algorithm.clip_hihg'; did you mean 'clip_high'"),
        (["denominater=tokens"], "'algorithm.denominater'; did you mean 'denominator'"),
        (["loss=gspo"], "defined with algorithm.denominator='sequences', not 'tokens'; set it"),
        (["advantage=dr_grpo"], 'write advantage="group_mean", denominator="max_tokens"'),
    ],
)
def test_names_and_options_are_checked_when_the_settings_are_read(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, [f"algorithm.{one}" for one in overrides])


def test_options_are_set_next_to_the_other_keys_or_in_a_table() -> None:
    flat = load_config(None, ["algorithm.loss=ppo", "algorithm.clip_low=0.1"])
    table = load_config(None, ["algorithm.loss=ppo", "algorithm.options.clip_low=0.1"])
    assert flat == table
    assert flat.algorithm.options == {"clip_low": 0.1}


def test_an_older_record_with_every_losss_options_is_read() -> None:
    old = {"clip_low": None, "clip_high": None, "ratio_cap": 2.0}
    config = load_config(None).model_dump()
    config["algorithm"] = {**config["algorithm"], **old}
    assert type(load_config(None)).model_validate(config) == load_config(None)


@pytest.mark.usefixtures("_module")
def test_the_users_code_is_named_with_its_files_hash(tmp_path: Path) -> None:
    names = ["algorithm.loss=my_losses:scaled", "reward.name=my_losses:best_only"]
    names += ["sampling.backend=rl_lora.samplers.torch_sampler:TorchSampler"]
    lines = list(user_code(load_config(SMOKE, names)))
    digest = hashlib.sha256(MODULE.encode()).hexdigest()[:12]
    where = f"runs code of your own: {tmp_path / 'my_losses.py'} (sha256 {digest})"
    assert lines[:2] == [
        f"reward.name=my_losses:best_only {where}",
        f"algorithm.loss=my_losses:scaled {where}",
    ]
    assert "torch_sampler.py" in lines[2]
    assert list(user_code(load_config(SMOKE))) == []
