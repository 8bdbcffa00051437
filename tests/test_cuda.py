"""The learner and the loop on a GPU: against the CPU, against the slow references, and resumed.

Without a GPU everything runs on the CPU, where most of it is trivial: so that no line is new on the
day of a GPU. RL_LORA_TEST_DEVICE=cuda fails without one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rl_lora.adapters.files import load_tensors
from rl_lora.batches import pack_samples, to_device
from rl_lora.config import LoraSection, ModelSection, load_config
from rl_lora.learner import Learner, Share
from rl_lora.losses import importance_sampling
from rl_lora.models.device import pick_device
from rl_lora.nn import attention, flash
from rl_lora.nn import token_logprobs as logprobs
from rl_lora.nn.segments import make_layout
from rl_lora.planning.memory import machine_bytes
from rl_lora.policy import Policy, open_policy
from rl_lora.train import train
from rl_lora.types import Microbatch, TrainSample
from tests.helpers.tiny_models import VOCAB, random_llama, random_qwen3

DEVICE = os.environ.get("RL_LORA_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.toml"
SHORT = ["run.num_steps=3", "data.held_out=8", "sampling.num_prompts=4", "sampling.max_tokens=32"]


def samples() -> list[TrainSample]:
    """Three prompts with four completions each, of random tokens and lengths."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (), generator=generator))
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    out = []
    for _ in range(3):
        prompt = ids(3, 9)
        for number in range(4):
            completion = ids(2, 20)
            out.append(TrainSample(prompt, completion, (-4.0,) * len(completion), number - 1.5, 0))
    return out


def batches(*, share_prompts: bool, tokens: int = 128) -> list[Microbatch]:
    (update,) = pack_samples(
        samples(),
        microbatch_tokens=tokens,
        share_prompts=share_prompts,
    )
    return update


def make(path: Path, device: str, *, dtype: str = "float32", **options: Any) -> Policy:
    """A policy whose adapter matters, the same on each device."""
    checkpointed = options.pop("checkpoint_activations", False)
    policy = open_policy(
        path,
        ModelSection(name=str(path), device=device, dtype=dtype),  # type: ignore[arg-type]
        LoraSection(**{"rank": 4, **options}),
        seed=0,
        checkpoint_activations=checkpointed,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.add_(noise.to(parameter))
    return policy


def learn(policy: Policy, *, share_prompts: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics and gradients of one step's passes, on the CPU in float32."""
    learner = Learner(policy, grad_clip=1e9)
    loss = 0.0
    with policy.training():
        for _, seen in learner._passes(
            Share(batches(share_prompts=share_prompts)),
            lambda batch: learner._policy_objective(batch, importance_sampling),
        ):
            loss += float(seen.loss)
    gradients = {name: p.grad.float().cpu() for name, p in policy.trainable().items()}
    return {"loss": loss}, gradients


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected| over all tensors together (L2)."""
    difference = sum(float((found[n] - expected[n]).square().sum()) for n in expected)
    return (difference / sum(float(t.square().sum()) for t in expected.values())) ** 0.5


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_step_on_the_gpu_has_the_cpus_loss_and_gradient(
    tmp_path: Path, shape: str, mode: str
) -> None:
    path = {"llama": random_llama, "qwen3": random_qwen3}[shape](tmp_path / "model")
    loss, expected = learn(make(path, "cpu", mode=mode), share_prompts=False)
    for share_prompts in (False, True):
        found_loss, found = learn(make(path, DEVICE, mode=mode), share_prompts=share_prompts)
        assert found_loss == pytest.approx(loss, rel=1e-4)
        assert distance(found, expected) < 1e-4


@pytest.mark.parametrize(("rank", "limit"), [(1, 0.1), (4, 0.05)])  # rank 1 is scaled by 32, not 8
def test_bfloat16_on_the_gpu_is_near_float32(tmp_path: Path, rank: int, limit: float) -> None:
    path = random_llama(tmp_path / "model")
    _, expected = learn(make(path, "cpu", rank=rank), share_prompts=False)
    _, found = learn(make(path, DEVICE, dtype="bfloat16", rank=rank), share_prompts=True)
    assert distance(found, expected) < limit


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_activation_checkpoints_change_no_gradient(tmp_path: Path, mode: str) -> None:
    path = random_llama(tmp_path / "model")
    _, expected = learn(make(path, DEVICE, mode=mode), share_prompts=True)
    policy = make(path, DEVICE, mode=mode, checkpoint_activations=True)
    _, found = learn(policy, share_prompts=True)
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 64, 128, 256])  # of a head
@pytest.mark.parametrize("lengths", [([300, 3, 70], [[65, 1, 150], [1], [2, 128]]), ([5], [[1]])])
def test_flash_attention_over_shared_prompts(
    dtype: torch.dtype, width: int, lengths: tuple[list[int], list[list[int]]]
) -> None:
    """Values and gradients, against SDPA in float32 over the same numbers."""
    layout = make_layout(*lengths).to(torch.device(DEVICE))
    generator = torch.Generator().manual_seed(0)
    shapes = [(int(layout.starts_S[-1]), heads, width) for heads in (6, 2, 2, 6)]
    *narrow, weights_THD = (
        torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes
    )
    assert flash.can_run(narrow[0]) or DEVICE == "cpu"
    results = []
    for inputs in (narrow, [x.float() for x in narrow]):
        for x in inputs:
            x.requires_grad_()
        query_THD, key_TJD, value_TJD = inputs
        out_THD = attention.attend(query_THD, key_TJD, value_TJD, layout, width**-0.5)
        gradients = torch.autograd.grad((out_THD * weights_THD).sum(), inputs)
        results.append([t.detach().float() for t in (out_THD, *gradients)])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_log_probs_without_logits_on_the_gpu(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", 5)
    monkeypatch.setattr(logprobs, "BLOCK_ELEMENTS", 5 * 64)
    torch.manual_seed(0)
    head = nn.Linear(64, 301, bias=False).requires_grad_(False).to(DEVICE, dtype)
    target_ids_C = (torch.arange(13) % 301).to(DEVICE)
    results = []
    for score in (logprobs.plain, logprobs.score_hidden):
        generator = torch.Generator().manual_seed(1)
        hidden_CD = torch.randn(13, 64, generator=generator).to(DEVICE, dtype).requires_grad_()
        logprobs_C, entropy_C = score(hidden_CD, head, target_ids_C, 0.7)
        (gradient,) = torch.autograd.grad(logprobs_C.sum(), hidden_CD)
        results.append([t.detach().float() for t in (logprobs_C, entropy_C, gradient)])
    for found, expected in zip(results[1], results[0], strict=True):
        assert float((found - expected).norm() / expected.norm()) < tolerance


def test_the_base_is_the_same_after_a_step_and_its_fingerprint_that_of_the_cpu(
    tmp_path: Path,
) -> None:
    path = random_llama(tmp_path / "model")
    policy = make(path, DEVICE)
    before = policy.base_fingerprint()
    assert before == make(path, "cpu").base_fingerprint()
    learner = Learner(policy, 1e-2)
    learner.update([batches(share_prompts=True)])
    assert policy.base_fingerprint() == before


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "mode"), [("float32", "lora"), ("float32", "full"), ("bfloat16", "lora")]
)
def test_a_run_on_the_gpu(tmp_path: Path, dtype: str, mode: str) -> None:
    overrides = [*SHORT, f"model.device={DEVICE}", f"model.dtype={dtype}", f"lora.mode={mode}"]
    config = load_config(SMOKE, [*overrides, f"run.output_dir={tmp_path}", "optim.lr=1e-4"])
    outcome = train(config, quiet=True)
    rows = [json.loads(line) for line in (outcome.folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert outcome.after is not None
    limit = 1e-7 if dtype == "float32" else 1e-2
    assert all(row["mismatch/kl"] < limit for row in rows)
    if DEVICE == "cuda":
        assert all(row["memory/peak_gpu0_mb"] > 0 for row in rows)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_on_the_gpu_ends_where_an_unbroken_one_does(
    tmp_path: Path, dtype: str
) -> None:
    """Up to rounding: a GPU adds gradients up in any order. Adam takes steps of 1e-4 here."""

    def run(name: str, num_steps: int, *, resume: bool = False) -> dict[str, Tensor]:
        overrides = [f"run.num_steps={num_steps}", f"run.name={name}", "optim.lr=1e-4"]
        overrides += [
            f"model.device={DEVICE}",
            f"model.dtype={dtype}",
            f"run.output_dir={tmp_path}",
        ]
        train(load_config(SMOKE, [*SHORT, *overrides]), resume=resume, quiet=True)
        return load_tensors(tmp_path / name / "adapter")

    whole = run("whole", 4)
    run("broken", 2)
    broken = run("broken", 4, resume=True)
    limit = 1e-6 if dtype == "float32" else 1e-3
    assert max(float((whole[name] - broken[name]).abs().max()) for name in whole) < limit


@pytest.mark.skipif(DEVICE != "cuda", reason="only on a CUDA device")
def test_what_is_found_out_about_the_gpu() -> None:
    assert pick_device("auto").type == "cuda"
    assert (machine_bytes("cuda") or 0) > 2**30
    torch.zeros(1, device="cuda")
    assert to_device(batches(share_prompts=True)[0], torch.device("cuda")).token_ids_BT.is_cuda
