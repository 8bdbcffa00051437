"""Tokens per second of the engine as in a run (with graphs on a GPU): with an adapter, with
the base only, and without LoRA layers."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from gpu_stages.models import make_model, make_policy, shake
from gpu_stages.parity import make_sampler, mismatch, random_prompts
from gpu_stages.stages import Context
from rl_lora.adapters.files import save_adapter
from rl_lora.config import LoraSection
from rl_lora.sampler import Sampler
from rl_lora.samplers.liveness import check_step
from rl_lora.samplers.vllm.settings import read_config
from rl_lora.types import Completion, Prompt, SampleParams


def with_adapter(context: Context) -> dict[str, Any]:
    """SmolLM2-135M's shape."""
    return _with_adapter(make_model("smollm2-135m", context), context)


def qwen3_large(context: Context) -> dict[str, Any]:
    """Qwen3-8B's shape, 8 of its 36 layers, the same model as in `learn`."""
    return _with_adapter(make_model("qwen3-8b", context, 8), context)


def _with_adapter(folder: Path, context: Context) -> dict[str, Any]:
    """The LoRA engine with an adapter and without; its samples are compared with the learner.

    Sampled with graphs: one that kept an old adapter's weights would show in the KL.
    """
    policy = make_policy(folder, context, torch.bfloat16, compiles=False)
    shake(policy, seed=1)
    adapter = save_adapter(
        policy, context.work / "adapters" / folder.name, version=1, run_name="decode"
    )
    started = time.monotonic()
    sampler = make_sampler(folder, context, torch.bfloat16, lora=policy.lora, eager=None)
    figures: dict[str, Any] = {"start_s": round(time.monotonic() - started, 1)}
    context.keep(figures)
    with contextlib.closing(sampler):
        for name, version in (("adapter", adapter), ("base", None)):
            sampler.set_adapter(version)
            with context.turn():
                prompts, groups, speed = measured(sampler, folder, context)
            figures[name] = {"tokens_per_s": speed}
            context.keep(figures)
            found = mismatch(policy, prompts[:8], groups[:8], adapter_off=version is None)
            figures[name]["kl"] = found["mismatch/kl"]
            context.keep(figures)
            check_step(found, torch.bfloat16, None)
    return figures | {
        "adapter_share": figures["adapter"]["tokens_per_s"] / figures["base"]["tokens_per_s"]
    }


def dual_stream(context: Context) -> dict[str, Any]:
    """The same with LoRA's products on a second stream, which vLLM has on GPUs only."""
    if context.is_gpu:
        os.environ["VLLM_LORA_ENABLE_DUAL_STREAM"] = "1"  # before vLLM is imported
    return with_adapter(context)


def without_lora(context: Context) -> dict[str, Any]:
    """The same engine without LoRA layers, for comparison."""
    folder = make_model("smollm2-135m", context)
    started = time.monotonic()
    sampler = make_sampler(
        folder, context, torch.bfloat16, lora=LoraSection(mode="full"), eager=None
    )
    start_s = round(time.monotonic() - started, 1)
    with contextlib.closing(sampler), context.turn():
        return {"start_s": start_s, "tokens_per_s": measured(sampler, folder, context)[2]}


def measured(
    sampler: Sampler, folder: Path, context: Context
) -> tuple[list[Prompt], list[list[Completion]], float]:
    """(prompts, completions, sampled tokens per second) of a second round; the first warms up."""
    count, length, cap = (64, 100, 256) if context.is_gpu else (4, 20, 24)
    prompts = random_prompts(int(read_config(folder)["vocab_size"]), count, length)
    warm_up, params = (
        SampleParams(num_samples=4, max_tokens=tokens, temperature=1.0, seed=seed)
        for seed, tokens in enumerate((cap // 8, cap))
    )
    sampler.sample(prompts, warm_up)
    started = time.perf_counter()
    groups = sampler.sample(prompts, params)
    seconds = time.perf_counter() - started
    num_tokens = sum(len(c.token_ids) for group in groups for c in group)
    return prompts, groups, num_tokens / seconds
