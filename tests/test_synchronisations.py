"""No number of the device is read between an update's first forward and last backward pass.

Reading one makes the host wait until the device has finished all its work, and then leaves the
device without any. A CPU has nothing to wait for, but the calls are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from rl_lora.batches import pack_samples
from rl_lora.learner import Learner
from rl_lora.losses import LOSSES, LossInputs, importance_sampling
from rl_lora.nn.segments import moved
from rl_lora.policy import LoraPolicy, Policy
from rl_lora.types import Microbatch, TrainSample
from tests.helpers.tiny_models import make_policy, random_llama, shake

# Operators whose result, or its shape, the host needs; torch.equal is only called on a CPU
# (nn.token_logprobs).
READING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")
# Methods that do nothing on a CPU, where the operators do not show them.
COPYING = ("cpu", "numpy", "tolist", "item", "__array__")


class Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(READING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or "").rsplit(".", 1)[-1]
        if name in COPYING:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def batches_of(share_prompts: bool) -> list[list[Microbatch]]:
    samples = [
        TrainSample(
            (5, 6, 7 + i % 2),
            tuple(range(10, 13 + i)),
            (-4.0,) * (3 + i),
            1.0 if i < 3 else -1.0,
            0,
        )
        for i in range(6)
    ]
    return pack_samples(samples, microbatch_tokens=10, share_prompts=share_prompts, num_updates=2)


def reads(
    learner: Learner, monkeypatch: pytest.MonkeyPatch, update: Callable[[], object]
) -> list[list[str]]:
    """What each optimizer step's passes have read, from the first forward pass to the last
    backward pass, as on a GPU: one microbatch after the other."""
    found: list[str] = []
    steps: list[list[str]] = []
    make_step, score = learner._step, learner.policy.token_logprobs
    is_first = [True]

    def token_logprobs(batch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
        if is_first[0]:
            found.clear()
        is_first[0] = False
        return score(batch, temperature)

    def step(counts: Counter[str]) -> float:
        steps.append(found.copy())
        is_first[0] = True
        return make_step(counts)

    monkeypatch.setattr(LoraPolicy, "learns_in_parallel", False)
    monkeypatch.setattr(learner.policy, "token_logprobs", token_logprobs)
    monkeypatch.setattr(learner, "_step", step)
    with Operators(found), Methods(found):
        update()
    return steps


def make_learner(path: Path, mode: str) -> Learner:
    policy: Policy = make_policy(random_llama(path), mode=mode)
    shake(policy)
    return Learner(policy, 1e-3)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("loss", ["importance_sampling", "gspo"])
def test_an_update_reads_nothing_before_its_last_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str, mode: str
) -> None:
    learner = make_learner(tmp_path / "model", mode)
    updates = batches_of(learner.policy.can_share_prompts)
    assert min(len(microbatches) for microbatches in updates) > 1
    kl_weight = 0.1 if mode == "lora" else 0.0
    steps = reads(
        learner,
        monkeypatch,
        lambda: learner.update(updates, LOSSES[loss], kl_weight=kl_weight),
    )
    assert steps == [[], []]


def test_a_supervised_step_reads_nothing_before_its_last_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = make_learner(tmp_path / "model", "lora")
    (update, _) = batches_of(share_prompts=True)  # for other rows transformers reads a number
    assert reads(learner, monkeypatch, lambda: learner.fit(update)) == [[]]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum().detach()),
        lambda x: int(x.sum().detach()),
        lambda x: bool(x.sum().detach() > 0),
        lambda x: x.detach().cpu(),
        lambda x: x.detach().tolist(),
        lambda x: x.detach().numpy(),
        lambda x: x[x < 0],
    ],
)
def test_whatever_reads_a_number_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Tensor], object]
) -> None:
    learner = make_learner(tmp_path / "model", "lora")

    def loss(x: LossInputs) -> tuple[Tensor, int]:
        read(x.policy_logprobs_C)
        return importance_sampling(x)

    first, *_ = reads(
        learner, monkeypatch, lambda: learner.update(batches_of(share_prompts=False), loss)
    )
    assert len(first) >= 2  # microbatches


def test_copies_to_a_gpu_come_from_pinned_memory() -> None:
    class Recorder:
        def __init__(self, device: str) -> None:
            self.device, self.calls = torch.device(device), []  # type: ignore[var-annotated]

        def pin_memory(self) -> Recorder:
            self.calls.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool) -> Recorder:
            self.calls.append((device.type, non_blocking))
            return self

    def calls(source: str, target: str) -> list[object]:
        return moved(Recorder(source), torch.device(target)).calls  # type: ignore[arg-type,attr-defined]

    assert calls("cpu", "cuda:0") == ["pinned", ("cuda", True)]
    assert calls("cuda:0", "cuda:0") == [("cuda", True)]
    assert calls("cpu", "cpu") == [("cpu", True)]
