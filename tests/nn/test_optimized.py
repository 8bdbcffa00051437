"""What the optimizer steps on: an adapter in one tensor, masters of bfloat16 weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rl_lora import distributed
from rl_lora.batches import pack_samples
from rl_lora.config import LoraSection, ModelSection, RunConfig, RunSection
from rl_lora.errors import UserError
from rl_lora.learner import Learner
from rl_lora.nn import optimized
from rl_lora.nn.optimized import FlatParameters, MasterWeights, l2_norm
from rl_lora.policy import FullPolicy, LoraPolicy, Policy, open_policy
from rl_lora.runs.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from rl_lora.step_stats import PassStats
from rl_lora.types import Microbatch, TrainSample
from tests.helpers.tiny_models import (
    make_policy,
    random_llama,
    random_mixtral,
    shake,
)


def batch_of(*completions: tuple[int, ...]) -> Microbatch:
    samples = [TrainSample((5, 6, 7), c, (0.0,) * len(c), 1.0, 0) for c in completions]
    ((batch,),) = pack_samples(samples, microbatch_tokens=10_000)
    return batch


def random_slope(parameter: Tensor, generator: torch.Generator) -> Tensor:
    return (0.5 + torch.rand(parameter.shape, generator=generator)).bfloat16().float()


def with_known_gradients(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """Replaces the learner's log loss by sums whose gradients have the same bits in either dtype:
    random numbers from 0.5 to 1.5, others for each pass, from the generator returned."""
    generator = torch.Generator().manual_seed(0)

    def objective(_: Microbatch) -> tuple[Tensor, PassStats]:
        loss = torch.zeros(())
        for parameter in learner.policy.trainable().values():
            loss = loss + (parameter.float() * random_slope(parameter, generator)).sum()
        return loss, PassStats(loss.detach(), torch.zeros(1), torch.zeros(1))

    monkeypatch.setattr(learner, "_log_loss_objective", objective)
    return generator


# --- an adapter in one tensor ---------------------------------------------------------------------


def test_parameters_keep_names_shapes_and_values_in_one_tensor() -> None:
    parameters = {
        "q.lora_A": nn.Parameter(torch.tensor([[1.0, 2.0]])),
        "q.lora_B": nn.Parameter(torch.tensor([[3.0], [4.0], [5.0]])),
        "q.magnitude": nn.Parameter(torch.tensor([6.0])),
        "k.lora_A": nn.Parameter(torch.tensor([[7.0, 8.0]])),
    }
    flat = FlatParameters(parameters)
    assert flat.values.tolist() == [1, 2, 7, 8, 3, 4, 5, 6]
    assert {name: p.tolist() for name, p in flat.tensors.items()} == {
        "lora_A": [1, 2, 7, 8],
        "lora_B": [3, 4, 5, 6],
    }
    flat.add_gradients([torch.ones(1, 2), None, torch.ones(3, 1), torch.ones(1)])
    flat.add_gradients([torch.ones(1, 2)] * 2 + [torch.ones(3, 1), torch.ones(1)])
    assert flat.gradient.tolist() == [2, 2, 1, 1, 2, 2, 2, 2]
    assert parameters["k.lora_A"].grad.tolist() == [[1, 1]]  # type: ignore[union-attr]
    with torch.no_grad():
        flat.tensors["lora_B"].sub_(3)
    assert parameters["q.lora_B"].tolist() == [[0], [1], [2]]
    assert parameters["q.magnitude"].tolist() == [3]


@pytest.mark.parametrize("make", [random_llama, random_mixtral])
@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_a_whole_adapter_is_one_tensor_on_its_way_to_disk_too(
    tmp_path: Path, make: Callable[[Path], Path], variant: str
) -> None:
    if make is random_mixtral and variant != "lora":
        return  # which a mixture's experts refuse
    policy = make_policy(make(tmp_path / "model"), rank=2, variant=variant)
    assert isinstance(policy, LoraPolicy)
    shake(policy)
    flat = policy.optimized
    assert flat.values.numel() == sum(p.numel() for p in policy.trainable().values())
    found = torch.cat([p.detach().flatten() for p in policy.trainable().values()])
    assert torch.equal(flat.values.sort().values, found.sort().values)
    state = policy.state_tensors()
    host = policy.on_host(state)
    assert host.keys() == state.keys()
    assert all(torch.equal(host[name], tensor) for name, tensor in state.items())
    storages = {tensor.untyped_storage().data_ptr() for tensor in host.values()}
    frozen = sum("lora_A0" in name or "lora_B0" in name for name in state)  # PiSSA's start
    assert len(storages) == 1 + frozen


def test_gradients_are_those_of_separate_parameters(tmp_path: Path) -> None:
    """Two passes, whose gradients are added up; backward() on the same parameters is the check."""
    policy = make_policy(random_llama(tmp_path / "model"), rank=2)
    shake(policy)
    batches = [batch_of((8, 9), (10, 11, 12)), batch_of((13, 2))]
    for batch in batches:
        flat = policy.optimized
        flat.add_gradients(flat.gradients(policy.token_logprobs(batch, 1.0)[0].sum()))
    found = {name: p.grad for name, p in policy.trainable().items()}
    for parameter in policy.trainable().values():
        parameter.grad = None
    for batch in batches:
        policy.token_logprobs(batch, 1.0)[0].sum().backward()
    for name, parameter in policy.trainable().items():
        assert torch.equal(found[name], parameter.grad), name  # type: ignore[arg-type]
        assert parameter.grad.any(), name  # type: ignore[union-attr]


def test_steps_are_those_of_adam_on_separate_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    learner = Learner(policy, 1e-2, grad_clip=0.5, weight_decay=0.1)
    generator = with_known_gradients(learner, monkeypatch)
    separate = [nn.Parameter(p.detach().clone()) for p in policy.trainable().values()]
    adam = torch.optim.AdamW(separate, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(3):
        learner.fit([batch_of((8, 9))])
    generator.manual_seed(0)
    for _ in range(3):
        for parameter in separate:
            parameter.grad = random_slope(parameter, generator)
        assert torch.nn.utils.clip_grad_norm_(separate, 0.5) > 0.5
        adam.step()
    for found, expected in zip(policy.trainable().values(), separate, strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_norm_is_exact_however_many_elements() -> None:
    """4 million times 0.001: the root of 4. float32 sums lose 4e-5 of such a norm."""
    assert l2_norm([torch.full((3_000_000,), 1e-3), torch.full((1_000_000,), 1e-3)]) == (
        pytest.approx(2, rel=1e-7)
    )


def test_a_checkpoint_with_adams_state_by_matrix_gets_one_clear_line(tmp_path: Path) -> None:
    """As versions before the flat adapter wrote it."""
    policy = make_policy(random_llama(tmp_path / "model"))
    config = RunConfig(run=RunSection(output_dir=str(tmp_path)))
    old = Learner(policy)
    old.optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-4)
    save_checkpoint(1, old, config)
    with pytest.raises(UserError, match=r"28 tensors\) does not match .* 2 tensors\): resume with"):
        load_checkpoint(checkpoint_path(config.run.folder, 1), Learner(policy))


# --- sums over processes --------------------------------------------------------------------------


def test_gradients_of_replicas_are_summed_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks; the other has gradients of ones, for all weights but `idle`, which nobody uses."""
    weights = {name: nn.Parameter(torch.zeros(2)) for name in ("both", "idle", "theirs", "last")}
    weights["both"].grad = torch.tensor([1.0, 2.0])
    weights["last"].grad = torch.tensor([3.0, 4.0])
    sizes = []

    def add_up(tensor: Tensor, phase: str) -> dict[str, float]:
        sizes.append(tensor.numel())
        tensor += 1
        return {"system/all_reduce_bytes": float(tensor.nbytes)}

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda own, _: [own, [True, False, True, True]])
    monkeypatch.setattr(distributed, "add_up", add_up)
    monkeypatch.setattr(optimized, "_BUCKET_BYTES", 16)  # two gradients
    found = MasterWeights(weights).sum_gradients("learning")
    assert found == {"system/all_reduce_bytes": 24.0}
    assert sizes == [4, 2]
    assert weights["both"].grad.tolist() == [2, 3]
    assert weights["idle"].grad is None
    assert weights["theirs"].grad is not None
    assert weights["theirs"].grad.tolist() == [1, 1]
    assert weights["last"].grad.tolist() == [4, 5]


# --- all weights, in bfloat16 ---------------------------------------------------------------------

NUM_STEPS, RATE = 20, 1e-5


def full_policy(path: Path, dtype: str) -> FullPolicy:
    """With the same weights in either dtype, those of bfloat16, and of a usual size."""
    model = ModelSection(name=str(path), device="cpu", dtype=dtype)  # type: ignore[arg-type]
    policy = open_policy(path, model, LoraSection(mode="full"), seed=0)
    assert isinstance(policy, FullPolicy)
    with torch.no_grad():
        for weight in policy.trainable().values():
            weight.copy_(weight.bfloat16() / 10)
    return policy


def weights_of(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.trainable().items()}


def distance(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]
) -> float:
    """How far apart, as a share of the way from the start: 0 the same, about 1 not moved at all.

    What is expected is first rounded to what the found dtype can hold.
    """
    apart = l2_norm(t.float() - expected[n].to(t.dtype).float() for n, t in found.items())
    return apart / l2_norm(expected[n].float() - start[n].float() for n in expected)


@pytest.mark.parametrize("make", [random_llama, random_mixtral])
def test_20_small_steps_in_bfloat16_are_those_of_float32(
    tmp_path: Path, make: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the masters, and the weights as roundings of them. Two passes a step."""
    path = make(tmp_path / "model")
    exact, rounded = full_policy(path, "float32"), full_policy(path, "bfloat16")
    start = weights_of(exact)
    for policy in (exact, rounded):
        learner = Learner(policy, RATE, grad_clip=1e9)
        with_known_gradients(learner, monkeypatch)
        for _ in range(NUM_STEPS):
            learner.fit([batch_of((8, 9))] * 2)
    expected = weights_of(exact)
    moved = sum(int((expected[name] != start[name]).sum()) for name in start)
    assert moved > 0.99 * sum(weight.numel() for weight in start.values())
    for name, master in rounded.optimized.tensors.items():
        assert master.dtype == torch.float32
        assert torch.equal(master, expected[name]), name
    assert {weight.dtype for weight in rounded.trainable().values()} == {torch.bfloat16}
    assert distance(weights_of(rounded), expected, start) == 0
    assert all(weight.grad is None for weight in rounded.trainable().values())  # handed over


def test_without_masters_bfloat16_fails_the_same_criterion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoMasters(MasterWeights):
        def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
            self.tensors, self._rounded = dict(weights), []

    path = random_llama(tmp_path / "model")
    start = weights_of(full_policy(path, "float32"))
    found = {}
    for dtype in ("float32", "bfloat16"):
        policy = full_policy(path, dtype)
        policy._masters = NoMasters(policy.trainable())
        learner = Learner(policy, RATE, grad_clip=1e9)
        with_known_gradients(learner, monkeypatch)
        for _ in range(NUM_STEPS):
            learner.fit([batch_of((8, 9))])
        found[dtype] = weights_of(policy)
    assert distance(found["bfloat16"], found["float32"], start) > 0.9
    moved = sum(int((found["bfloat16"][name] != start[name]).sum()) for name in start)
    assert moved < 0.2 * sum(weight.numel() for weight in start.values())


def test_a_models_own_gradients_in_bfloat16_lead_near_float32(tmp_path: Path) -> None:
    """Here the gradients differ by bfloat16's rounding, which Adam's first steps magnify."""
    path = random_llama(tmp_path / "model")
    batches = [batch_of((8, 9, 10, 2)), batch_of((30, 31), (32, 33, 34))]
    start = weights_of(full_policy(path, "float32"))
    found = {}
    for dtype in ("float32", "bfloat16"):
        policy = full_policy(path, dtype)
        learner = Learner(policy, RATE)
        losses = [learner.fit(batches)["sft/loss"] for _ in range(NUM_STEPS)]
        found[dtype] = {n: t.detach().clone() for n, t in policy.optimized.tensors.items()}
        assert losses[-1] < losses[0]
    assert distance(found["bfloat16"], found["float32"], start) < 0.1


@pytest.mark.parametrize("make", [random_llama, random_mixtral])
def test_a_resumed_run_has_the_masters_bits(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "model")
    config = RunConfig(run=RunSection(output_dir=str(tmp_path)))
    batch = batch_of((8, 9, 10, 2), (30, 31))
    whole = Learner(full_policy(path, "bfloat16"), 1e-4)
    whole.fit([batch])
    save_checkpoint(1, whole, config)
    whole.fit([batch])
    other = Learner(full_policy(path, "bfloat16"), 1e-4)
    shake(other.policy, size=0.5)
    load_checkpoint(checkpoint_path(config.run.folder, 1), other)
    other.fit([batch])
    for learner in (whole, other):
        for name, master in learner.policy.optimized.tensors.items():
            assert torch.equal(master.bfloat16(), learner.policy.trainable()[name])
    expected = whole.policy.optimized.tensors
    for name, master in other.policy.optimized.tensors.items():
        assert torch.equal(master, expected[name]), name
    assert any((m != m.bfloat16()).any() for m in expected.values())  # roundings would not do


def test_a_loaded_version_replaces_the_masters(tmp_path: Path) -> None:
    policy = full_policy(random_llama(tmp_path / "model"), "bfloat16")
    assert (
        policy.state_tensors()["model.embed_tokens.weight"].dtype == torch.bfloat16
    )  # no masters yet
    learner = Learner(policy, 1e-3)
    before = {name: tensor.clone() for name, tensor in policy.published_tensors().items()}
    learner.fit([batch_of((8, 9))])
    assert policy.state_tensors()["model.embed_tokens.weight"].dtype == torch.float32
    policy.load_tensors(before)
    for name, weight in policy.trainable().items():
        assert torch.equal(weight, before[name])
        assert torch.equal(policy.optimized.tensors[name], before[name].float())
