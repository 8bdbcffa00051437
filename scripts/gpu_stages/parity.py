"""Sampler and learner compute the same model: log-probs of both on the sampler's samples.

Eager, to leave compilation out of the comparison; `decode` compares with graphs.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gpu_stages.models import END, make_model, make_policy, shake
from gpu_stages.stages import CheckFailedError, Context
from rl_lora.adapters.files import save_adapter
from rl_lora.batches import pack_samples, to_device
from rl_lora.config import LoraSection
from rl_lora.errors import StaleAdapterError
from rl_lora.policy import Policy
from rl_lora.samplers.liveness import check_at_start, check_step, tolerances
from rl_lora.samplers.vllm.sampler import EngineOptions, VllmSampler
from rl_lora.step_stats import PassStats, StepStats
from rl_lora.types import Adapter, Completion, Prompt, SampleParams, TrainSample


def float32(context: Context) -> dict[str, Any]:
    """An adapter and the base, almost exactly equal."""
    return _parity(context, torch.float32)


def bfloat16(context: Context) -> dict[str, Any]:
    """An adapter, the base as control, a second version hot-loaded, a stale name refused."""
    return _parity(context, torch.bfloat16)


def make_sampler(
    folder: Path, context: Context, dtype: torch.dtype, *, lora: LoraSection, eager: bool | None
) -> VllmSampler:
    """An engine for 1,024 tokens; the environment's GPU_CHECK_ATTENTION names its kernels."""
    policy: Any = SimpleNamespace(model_dir=folder, lora=lora, dtype=dtype, device=context.device)
    return VllmSampler(
        policy,
        max_model_len=1024 if context.is_gpu else 128,
        max_num_seqs=256 if context.is_gpu else 16,
        end_token_ids=[END],
        engine=EngineOptions(
            eager=eager,
            merge_adapter=False if lora.mode == "lora" else None,
            attention_backend=os.environ.get("GPU_CHECK_ATTENTION"),
            memory_fraction=0.45,  # the policy scores samples while the engine is awake
        ),
    )


def random_prompts(vocab_size: int, count: int, num_tokens: int) -> list[Prompt]:
    """Prompts of random tokens, none of them special."""
    ids_NT = torch.randint(
        3, vocab_size, (count, num_tokens), generator=torch.Generator().manual_seed(0)
    )
    return [Prompt(f"p/{n}", "s", "q", "1", tuple(ids)) for n, ids in enumerate(ids_NT.tolist())]


def mismatch(
    policy: Policy,
    prompts_N: list[Prompt],
    groups_N: list[list[Completion]],
    *,
    adapter_off: bool = False,
) -> dict[str, float]:
    """mismatch/kl, mismatch/abs_mean, mismatch/abs_max of samples, nats a token."""
    samples = [
        TrainSample(prompt.token_ids, c.token_ids, c.sampler_logprobs_T, 1.0, c.adapter_version)
        for prompt, group in zip(prompts_N, groups_N, strict=True)
        for c in group
    ]
    (batches,) = pack_samples(samples, microbatch_tokens=4096)
    record = StepStats()
    with torch.no_grad(), policy.adapter_off() if adapter_off else contextlib.nullcontext():
        for batch in batches:
            batch = to_device(batch, policy.device)
            logprobs_C, entropy_C = policy.token_logprobs(batch, 1.0)
            record.add(batch, PassStats(logprobs_C.sum(), logprobs_C, entropy_C), update=0)
    return {k: v for k, v in record.metrics().items() if k.startswith("mismatch/")}


def _parity(context: Context, dtype: torch.dtype) -> dict[str, Any]:
    folder = make_model("smollm2-135m", context)
    started = time.monotonic()
    policy = make_policy(folder, context, dtype)
    sampler = make_sampler(folder, context, dtype, lora=policy.lora, eager=True)
    figures: dict[str, Any] = {"start_s": round(time.monotonic() - started, 1)}
    count, length, cap = (32, 100, 64) if context.is_gpu else (4, 20, 12)
    prompts = random_prompts(policy.model.config.vocab_size, count, length)
    params = SampleParams(num_samples=4, max_tokens=cap, temperature=1.0, seed=1)
    adapters = context.work / "adapters" / str(dtype)

    def compared(adapter: Adapter | None) -> dict[str, float]:
        sampler.set_adapter(adapter)
        groups = sampler.sample(prompts, params)
        found = mismatch(policy, prompts, groups, adapter_off=adapter is None)
        figures[adapter.name if adapter else "base"] = found
        check_step(found, dtype, None)
        return found

    with contextlib.closing(sampler):
        figures["at_start"] = check_at_start(policy, sampler, prompts[:4], adapters, None)
        versions = []
        for version in (1, 2):  # the second one is hot-loaded over the first
            shake(policy, seed=version)
            versions.append(save_adapter(policy, adapters, version=version, run_name="check"))
            compared(versions[-1])
        compared(None)
        sampler.set_adapter(versions[0])  # an old version must show, or the check could not fail
        stale = mismatch(policy, prompts, sampler.sample(prompts, params))
        figures["stale_kl"] = stale["mismatch/kl"]
        if stale["mismatch/kl"] < tolerances(dtype, None)[0]:
            raise CheckFailedError("an old version looks like the new one", figures)
        try:
            sampler.set_adapter(replace(versions[1], fingerprint="other"))
        except StaleAdapterError as error:
            figures["refused"] = str(error)[:60]
        else:
            raise CheckFailedError("a name already used for other weights was accepted", figures)
    return figures
