"""The size of a microbatch that is left to the machine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora.build import make_learner
from rl_lora.config import OptimSection, parse_as, parse_config
from rl_lora.config.sft import SftConfig
from rl_lora.models.shapes import known_config
from rl_lora.planning.fit import Job
from rl_lora.planning.memory import activation_bytes, default_tokens, microbatch_tokens
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
    [(64, 65_536), (576, 58_112), (1024, 32_768), (2048, 16_384), (4096, 16_384)],
)
def test_a_small_model_gets_large_microbatches_on_a_gpu(hidden: int, tokens: int) -> None:
    assert default_tokens("cuda", hidden) == tokens
    assert default_tokens("cpu", hidden) == 4096


@pytest.mark.parametrize("make", [parse_config, partial(parse_as, SftConfig)])
def test_the_plan_of_a_gpu_lowers_it_as_a_run_does(make: Callable[..., Any]) -> None:
    settings = {
        "model": {"name": "meta-llama/Llama-3.1-8B", "device": "cuda", "dtype": "bfloat16"},
        "lora": {"rank": 1},
    }
    if make is not parse_config:
        settings["data"] = {"train": ["data.jsonl"], "max_tokens": 1024}
    config, num_base, num_trainable = make(settings), 8_030_261_248, 2_621_440
    model = known_config("meta-llama/Llama-3.1-8B")
    assert model is not None
    assert microbatch_tokens(config, model) == 16_384
    is_rl = make is parse_config
    one_token = activation_bytes(model, 1, torch.bfloat16, is_checkpointed=False, joins_swiglu=True)
    # Gradients and Adam's two moments, logits of one block; besides the weights and the adapter,
    # and in an RL job CUDA's context and the sleeping engine.
    to_come = 12 * num_trainable + 4 * 2**27
    held = 2 * num_base + 4 * num_trainable + is_rl * (2**29 + 2**30)
    for gigabytes in (48, 64, 400):
        job = Job(config, model, num_base, num_trainable, gigabytes * 2**30)
        free = gigabytes * 2**30 - held
        by_hand = min(16_384, int(0.75 * free - to_come) // one_token)
        (note,) = (part.note for part in job.parts() if part.part == "activations")
        assert note.endswith(f"microbatch of {by_hand - by_hand % 256} tokens")
        # What could be set takes all of the memory.
        assert job.largest_microbatch() == (free - to_come) // one_token
