"""configs/examples: one config a row, each the smoke job with a few settings more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_lora.advantages import ADVANTAGES
from rl_lora.config import RunConfig, load_config
from rl_lora.config.algorithm import load_algorithm
from rl_lora.config.presets import PRESETS
from rl_lora.losses import LOSSES, MASKS
from rl_lora.train import train

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "configs" / "examples").glob("*.toml"))
# What the smoke job, the article's other configs or the tests of training show.
SHOWN_ELSEWHERE = {"importance_sampling", "group_mean", "rloo", "reinforce_pp"}
# What an example's metrics show that the smoke job's do not.
METRICS = {
    "mask_token": "mask/fraction",
    "mask_sequence": "mask/fraction",
    "mask_geometric": "mask/fraction",
    "kl_k2": "loss/kl",
    "overlong_penalty": "reward/overlong_penalty",
    "kl_schedule": "learn/step_kl",
    "data_weights": "data/share/easy",
    "reward_terms": "reward/format/mean",
    "gdpo": "advantage/correlation/overlong",
    "curriculum": "data/pass_rate",
    "retry": "episode/several_turns_rate",
    "calculator": "episode/turns_mean",
    "dynamic_sampling": "rollouts/rejected_groups",
    "entropy_floor": "entropy/weight",
}

each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


def departures(config: RunConfig, base: RunConfig) -> dict[str, object]:
    own, usual = config.model_dump(), base.model_dump()
    return {
        f"{section}.{key}": value
        for section, values in own.items()
        for key, value in values.items()
        if value != usual[section][key]
    }


@each_example
def test_an_example_is_the_smoke_job_with_a_few_settings_more(path: Path) -> None:
    config = load_config(Path(f"examples/{path.stem}"))
    assert config == load_config(path)
    load_algorithm(config.algorithm)
    found = departures(config, load_config(Path("smoke")))
    assert found.pop("run.name") == path.stem
    assert 0 < len(found) <= 6, found
    assert {key.partition(".")[0] for key in found} <= set(
        "model data sampling environment reward algorithm optim".split()
    )


def test_every_row_has_an_example() -> None:
    configs = [load_config(path).algorithm for path in EXAMPLES]
    shown = {getattr(one, kind) for one in configs for kind in ("loss", "advantage", "mask")}
    assert {*LOSSES, *ADVANTAGES, *MASKS} - SHOWN_ELSEWHERE <= shown
    assert {one.preset for one in configs} >= PRESETS.keys() - {"lora_without_regret"}
    assert METRICS.keys() <= {path.stem for path in EXAMPLES}


@pytest.mark.long
@each_example
def test_an_example_trains_and_shows_its_metric(path: Path, tmp_path: Path) -> None:
    if path.stem == "qlora":
        pytest.importorskip("bitsandbytes")
    short = ["run.num_steps=2", "data.held_out=4", f"run.output_dir={tmp_path}"]
    train(load_config(path, short), quiet=True)
    rows = [json.loads(line) for line in (tmp_path / path.stem / "metrics.jsonl").open()]
    if path.stem != "calculator":  # which the tiny model seldom answers in the requested format
        assert all(row["learn/updates"] > 0 for row in rows)
    if path.stem in METRICS:  # not in the first step where it needs one before
        assert any(row.get(METRICS[path.stem], 0) != 0 for row in rows)
