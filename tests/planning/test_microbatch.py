"""The size of a microbatch that is left to the machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rl_lora.build import make_learner
from rl_lora.config import OptimSection, parse_config
from rl_lora.models.shapes import known_config
from rl_lora.planning.memory import (
    PHASES,
    activation_bytes,
    default_tokens,
    memory_plan,
    microbatch_tokens,
    peak,
)
from rl_lora.planning.microbatch import default_microbatch_tokens, fitting_tokens
from tests.helpers.tiny_models import make_policy, random_llama


def test_a_cpus_microbatches_have_a_fixed_size_unless_it_is_set(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    assert default_microbatch_tokens(policy, OptimSection()) == 4096
    notes: list[str] = []
    learner = make_learner(policy, OptimSection(), num_steps=1, on_note=notes.append)
    assert learner.microbatch_tokens == 4096
    assert notes == ["microbatches of up to 4,096 tokens (optim.microbatch_tokens)"]
    section = OptimSection(microbatch_tokens=100)
    policy.is_compiled = True
    learner = make_learner(policy, section, num_steps=1, on_note=notes.append)
    assert learner.microbatch_tokens == 100
    assert notes[1:] == ["the first step compiles the layers, for a minute or two (model.compile)"]


def test_a_gpus_are_as_large_as_its_free_memory_allows(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"), rank=2)
    one_token = activation_bytes(
        policy.model.config, 1, torch.float32, is_checkpointed=False, joins_swiglu=True
    )
    num_trainable = sum(p.numel() for p in policy.trainable().values())
    fixed = 12 * num_trainable + 12 * 2**24  # gradients and Adam's two moments; logits

    def fitting(num_tokens: int) -> int:
        free = (fixed + num_tokens * one_token) / 0.75  # a quarter stays free: it is an estimate
        return fitting_tokens(policy, OptimSection(), 16_384, int(free) + 1)

    assert fitting(10**6) == 16_384
    assert fitting(5000) == 4864  # 19 x 256
    assert fitting(0) == 256


@pytest.mark.parametrize(
    ("hidden", "tokens"),
    [(64, 65_536), (576, 58_254), (1024, 32_768), (2048, 16_384), (4096, 16_384)],
)
def test_a_small_model_gets_large_microbatches_on_a_gpu(hidden: int, tokens: int) -> None:
    assert default_tokens("cuda", hidden) == tokens
    assert default_tokens("cpu", hidden) == 4096


def test_the_plan_of_a_gpu_lowers_it_as_well() -> None:
    settings = {
        "model": {"name": "meta-llama/Llama-3.1-8B", "device": "cuda", "dtype": "bfloat16"},
        "lora": {"rank": 1},
    }
    config, size = parse_config(settings), 8_030_261_248
    model = known_config("meta-llama/Llama-3.1-8B")
    assert microbatch_tokens(config, model) == 16_384
    sizes = {}
    for gigabytes in (48, 400):
        parts = memory_plan(config, model, size, 2_621_440, gigabytes * 2**30)
        assert max(peak(parts, phase) for phase in PHASES) <= gigabytes * 2**30
        (note,) = (part.note for part in parts if part.part == "activations")
        sizes[gigabytes] = int(note.split("microbatch of ")[1].split()[0])
    assert 1280 < sizes[48] < 16_384 == sizes[400]
