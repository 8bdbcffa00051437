"""Wrong adapters between publish and sampler: each is found at the step where it happens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_lora.adapters import files as adapter_files
from rl_lora.adapters.files import (
    ADAPTER_FILE,
    check_published,
    fingerprint,
    load_tensors,
    save_adapter,
)
from rl_lora.config import ModelSection, load_config
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.policy import Policy, open_policy
from rl_lora.rollouts import score_groups
from rl_lora.sampler import BASE_VERSION
from rl_lora.samplers.liveness import VersionCheck
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.train import train
from rl_lora.types import Adapter, SampleParams
from tests.helpers.fakes import FakeReward
from tests.helpers.tiny_models import make_policy, random_llama, shake
from tests.samplers.test_torch_sampler import PROMPTS, TOKENIZER
from tests.test_train import SMOKE, metrics_of

pytestmark = pytest.mark.faults

# --- in an engine ---------------------------------------------------------------------------------

# A step moves the log-probs by less than the fixed limits allow: on the tiny models of different
# processors, whose weights differ, by up to 3e-3 nats of 6e-3.
SETTINGS = ["run.num_steps=3", "lora.rank=2", "optim.lr=2e-4", "data.held_out=2", "run.loggers=[]"]
SETTINGS += ["sampling.max_kl=1e-3"]
SETTINGS += ["sampling.num_prompts=4", "sampling.num_samples=4", "sampling.max_tokens=24"]
FAULTY_VERSION = 2  # which step 3 samples from

Tensors = dict[str, Tensor]


def stale(engine: Engine, tensors: Tensors) -> Tensors:
    return engine.before


def zeroed(engine: Engine, tensors: Tensors) -> Tensors:
    return {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}


def half_scaled(engine: Engine, tensors: Tensors) -> Tensors:
    return {n: tensor / 2 if "lora_B" in n else tensor for n, tensor in tensors.items()}


def swapped(engine: Engine, tensors: Tensors) -> Tensors:
    """Of another run: as large, in other directions."""
    generator = torch.Generator().manual_seed(0)
    return {n: t.flatten()[torch.randperm(t.numel(), generator=generator)].view_as(t)
            for n, t in tensors.items()}  # fmt: skip


def of_rank_1(engine: Engine, tensors: Tensors) -> Tensors:
    """Only the first of two ranks, as in a slot that is too narrow."""
    rows = torch.tensor([1.0, 0.0])
    return {n: t * (rows if "lora_B" in n else rows[:, None]) for n, t in tensors.items()}


@torch.no_grad()
def of_another_base(engine: Engine, tensors: Tensors) -> Tensors:
    for name, weight in engine.policy.model.named_parameters():
        if "mlp" in name and "lora" not in name:
            weight.mul_(1.05)
    return tensors


def not_a_number(engine: Engine, tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if "lora_B" in name)
    return tensors | {name: torch.full_like(tensors[name], float("nan"))}


class Engine(TorchSampler):
    """A sampler with its own copy of the weights, which loads something else at FAULTY_VERSION."""

    has_own_weights = True
    fault: Callable[[Engine, Tensors], Tensors] | None = None
    before: Tensors

    def __init__(self, policy: Policy, **options: Any) -> None:
        model = ModelSection(name="own", device="cpu", dtype="float32")
        own = open_policy(policy.model_dir, model, policy.lora, seed=0)
        super().__init__(own, **options)

    def set_adapter(self, adapter: Adapter | None) -> None:
        self._version = BASE_VERSION if adapter is None else adapter.version
        if adapter is None:
            return
        tensors = load_tensors(adapter.path)
        fault = type(self).fault if adapter.version == FAULTY_VERSION else None
        self.policy.load_tensors(tensors if fault is None else fault(self, tensors))
        self.before = tensors


@pytest.mark.parametrize(
    "fault", [stale, zeroed, half_scaled, swapped, of_rank_1, of_another_base, not_a_number]
)
def test_a_wrong_adapter_in_the_engine_is_found_in_its_rollouts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Engine, Tensors], Tensors],
) -> None:
    """The second version, whose step was small, is wrong; the first and the third are right."""
    policy = make_policy(random_llama(tmp_path / "model"), rank=2)
    engine = Engine(policy, tokenizer=TOKENIZER, end_token_ids=(2,), max_model_len=64)
    check = VersionCheck(policy, temperature=0.8)
    params = SampleParams(num_samples=1, max_tokens=16, temperature=0.8)
    for version in (1, 2, 3):
        shake(policy, seed=version, size=2e-3)
        monkeypatch.setattr(Engine, "fault", fault if version == FAULTY_VERSION else None)
        engine.set_adapter(save_adapter(policy, tmp_path, version=version, run_name="r"))
        completions_N_G = engine.sample(PROMPTS, params)
        groups_N = score_groups(PROMPTS, completions_N_G, FakeReward())
        before = fingerprint(policy.state_tensors())
        if version == FAULTY_VERSION:
            with pytest.raises(StaleAdapterError, match="not of version 2: of the tokens"):
                check.check(groups_N, version)
            if fault is of_another_base:
                return
        else:
            check.check(groups_N, version)
        assert fingerprint(policy.state_tensors()) == before
    assert check.num_decided == 2


class Kept(VersionCheck):
    """Counts the decisions of all checks."""

    decided = 0

    def check(self, *arguments: Any) -> None:
        super().check(*arguments)
        Kept.decided += self.num_decided


def test_a_run_stops_at_the_step_of_a_stale_adapter_and_only_by_this_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its controls: without the fault it decides and passes, and the fixed limits, without
    it, pass the stale adapter."""
    monkeypatch.setattr("rl_lora.train.VersionCheck", Kept)
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)
    monkeypatch.setattr("rl_lora.samplers.torch_sampler.TorchSampler", Engine)
    run(tmp_path, "run.name=right")
    assert Kept.decided >= 1
    assert all(row["mismatch/kl"] < 1e-11 for row in metrics_of(tmp_path / "right"))
    monkeypatch.setattr(Engine, "fault", stale)
    with pytest.raises(StaleAdapterError, match="not of version 2: of the tokens"):
        run(tmp_path, "run.name=stale")
    assert [row["step"] for row in metrics_of(tmp_path / "stale")] == [1, 2]
    monkeypatch.setattr(Kept, "check", lambda *_: None)
    run(tmp_path, "run.name=unnoticed")
    assert 1e-8 < metrics_of(tmp_path / "unnoticed")[2]["mismatch/kl"] < 1e-3


def run(folder: Path, *overrides: str) -> None:
    train(load_config(SMOKE, [*SETTINGS, f"run.output_dir={folder}", *overrides]), quiet=True)


# --- in its files ---------------------------------------------------------------------------------


def change_tensors(path: Path, change: Callable[[Tensor], Tensor]) -> None:
    """Changes all B."""
    tensors = {
        name: change(tensor).contiguous() if "lora_B" in name else tensor
        for name, tensor in load_file(path / ADAPTER_FILE).items()
    }
    save_file(tensors, path / ADAPTER_FILE, metadata={"format": "pt"})


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def take_another(path: Path, *names: str) -> None:
    """Files of the version before, or all of them."""
    other = path.with_name("v000001")
    for name in names or [file.name for file in other.iterdir()]:
        shutil.copy(other / name, path / name)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


# What is done to the directory of version 2, and what the message says.
FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "stale": (take_another, r"\(version, fingerprint"),
    "stale tensors": (lambda p: take_another(p, ADAPTER_FILE), r"\(tensors\)"),
    "zeroed": (lambda p: change_tensors(p, torch.zeros_like), r"\(tensors\)"),
    "half-scaled tensors": (lambda p: change_tensors(p, lambda t: t / 2), r"\(tensors\)"),
    "half-scaled by alpha": (
        lambda p: change_json(p / "adapter_config.json", lora_alpha=16),
        r"\(adapter_config.json\)",
    ),
    "of another rank": (
        lambda p: change_tensors(p, lambda t: torch.cat([t, t], 1)),
        r"\(tensors\)",
    ),
    "of another base": (
        lambda p: change_json(p / "adapter_config.json", base_model_name_or_path="other/base"),
        r"\(adapter_config.json\)",
    ),
    "not a number": (
        lambda p: change_tensors(p, lambda t: t * float("nan")),
        r"\(tensors\)",
    ),
    "truncated": (lambda p: cut(p / ADAPTER_FILE), r"adapter_model.safetensors cannot be read"),
    "half a manifest": (lambda p: cut(p / "rl_lora.json"), r"rl_lora.json is not valid JSON"),
    "no weights": (lambda p: (p / ADAPTER_FILE).unlink(), "has no adapter_model.safetensors"),
    "vanished": (shutil.rmtree, "does not exist"),
}


def publish_two(folder: Path) -> tuple[Adapter, Adapter]:
    policy = make_policy(random_llama(folder / "model"), rank=2)
    versions = []
    for version in (1, 2):
        shake(policy, seed=version)
        versions.append(save_adapter(policy, folder / "a", version=version, run_name="r"))
    return versions[0], versions[1]


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_changed_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    fault, told = FILE_FAULTS[name]
    before, adapter = publish_two(tmp_path)
    check_published(adapter, with_tensors=True)
    fault(adapter.path)
    with pytest.raises((StaleAdapterError, UserError), match=told) as caught:
        check_published(adapter, with_tensors=True)
    assert str(adapter.path) in str(caught.value)
    check_published(before, with_tensors=True)


def test_an_adapter_of_another_tool_has_only_its_tensors_checked(tmp_path: Path) -> None:
    _, adapter = publish_two(tmp_path)
    (adapter.path / "rl_lora.json").unlink()
    check_published(adapter, with_tensors=True)
    change_tensors(adapter.path, lambda t: t / 2)
    check_published(adapter, with_tensors=False)
    with pytest.raises(StaleAdapterError, match="tensors"):
        check_published(adapter, with_tensors=True)


@pytest.mark.parametrize("seen_at_first", ["nothing", "the version before"])
def test_another_node_waits_until_it_sees_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen_at_first: str
) -> None:
    """As over NFS, where a new directory is visible to other nodes late."""
    _, adapter = publish_two(tmp_path)
    hidden = adapter.path.rename(tmp_path / "hidden")
    if seen_at_first != "nothing":
        shutil.copytree(adapter.path.with_name("v000001"), adapter.path)
    with pytest.raises((StaleAdapterError, UserError)):  # its own node sees all that there is
        check_published(adapter, with_tensors=False)
    waits: list[float] = []

    def show_at_the_second(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            shutil.rmtree(adapter.path, ignore_errors=True)
            hidden.rename(adapter.path)

    monkeypatch.setattr(adapter_files.distributed, "world_size", lambda: 4)
    monkeypatch.setattr(adapter_files.distributed, "local_size", lambda: 2)
    monkeypatch.setattr(adapter_files.time, "sleep", show_at_the_second)
    check_published(adapter, with_tensors=True)
    assert len(waits) == 2
    monkeypatch.setattr(adapter_files, "_VISIBLE_S", 0.0)
    shutil.rmtree(adapter.path)
    with pytest.raises(UserError, match="does not exist"):
        check_published(adapter, with_tensors=True)
