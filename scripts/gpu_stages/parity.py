"""Sampler and learner compute the same model: log-probs of both on the sampler's samples.

Eager, to leave compilation out of the comparison; `decode` compares with graphs.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gpu_stages.models import END, make_model, make_policy, shake
from gpu_stages.stages import CheckFailedError, Context
from rl_lora.adapters.files import save_adapter
from rl_lora.batches import pack_samples, to_device
from rl_lora.config import LoraSection
from rl_lora.errors import StaleAdapterError
from rl_lora.losses import k3
from rl_lora.policy import Policy
from rl_lora.samplers.fleet.hosted import RemotePolicy
from rl_lora.samplers.liveness import check_at_start, check_step, tolerances
from rl_lora.samplers.vllm.sampler import EngineOptions, VllmSampler
from rl_lora.step_stats import PassStats, StepStats
from rl_lora.types import Adapter, Completion, Microbatch, Prompt, SampleParams, TrainSample

# Sampler and learner each round, by other kernels, and the engine's LoRA layers have the adapter in
# bfloat16: on a CPU their KL to each other is 3 to 4 times that of the learner to float32.
ROUNDING_FACTOR = 8
SHARED_CACHE_BYTES = 4 * 2**30  # KV cache where other stages use the GPU's memory, too
STALE_FACTOR = 5  # an old version's KL is at least so many times the allowed one


def float32(context: Context) -> dict[str, Any]:
    """Adapters and the base, almost exactly equal; a stale name is refused."""
    return _parity(context, torch.float32)


def bfloat16(context: Context) -> dict[str, Any]:
    """The same up to rounding, of which a learner in float32 tells how much there is."""
    return _parity(context, torch.bfloat16)


def make_sampler(
    folder: Path, context: Context, dtype: torch.dtype, *, lora: LoraSection, eager: bool | None
) -> VllmSampler:
    """An engine for 1,024 tokens; the environment's GPU_CHECK_ATTENTION names its kernels."""
    return VllmSampler(
        RemotePolicy(folder, lora, dtype, context.device),
        max_model_len=1024 if context.is_gpu else 128,
        max_num_seqs=256 if context.is_gpu else 16,
        end_token_ids=[END],
        engine=EngineOptions(
            eager=eager,
            attention_backend=os.environ.get("GPU_CHECK_ATTENTION"),
            # The policy scores samples while the engine is awake.
            memory_fraction=0.15 if context.is_shared else 0.45,
            cache_bytes=SHARED_CACHE_BYTES if context.is_shared else None,
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
    record = StepStats()
    for batch, one in scores(policy, prompts_N, groups_N, adapter_off=adapter_off):
        record.add(batch, one, update=0)
    return {k: v for k, v in record.metrics().items() if k.startswith("mismatch/")}


@torch.no_grad()
def scores(
    policy: Policy,
    prompts_N: list[Prompt],
    groups_N: list[list[Completion]],
    *,
    adapter_off: bool = False,
) -> list[tuple[Microbatch, PassStats]]:
    """Microbatches of the samples, and what the policy finds them to be."""
    samples = [
        TrainSample(prompt.token_ids, c.token_ids, c.sampler_logprobs_T, 1.0, c.adapter_version)
        for prompt, group in zip(prompts_N, groups_N, strict=True)
        for c in group
    ]
    (batches,) = pack_samples(samples, microbatch_tokens=4096)
    found = []
    with policy.adapter_off() if adapter_off else contextlib.nullcontext():
        for batch in batches:
            batch = to_device(batch, policy.device)
            logprobs_C, entropy_C = policy.token_logprobs(batch, 1.0)
            found.append((batch, PassStats(logprobs_C.sum(), logprobs_C, entropy_C)))
    return found


def rounding_kl(
    policy: Policy,
    exact: Policy,
    prompts_N: list[Prompt],
    groups_N: list[list[Completion]],
    *,
    adapter_off: bool = False,
) -> float:
    """KL between a policy and the same in float32 on samples, nats a token, as `mismatch/kl`.

    Args:
        policy: from which the samples are, up to rounding.
        exact: gets the policy's adapter.
    """
    with torch.no_grad():
        for mine, theirs in zip(
            exact.trainable().values(), policy.trainable().values(), strict=True
        ):
            mine.copy_(theirs)
    own_C, exact_C = (
        torch.cat([one.logprobs_C.double() for _, one in scored])
        for scored in (
            scores(one, prompts_N, groups_N, adapter_off=adapter_off) for one in (policy, exact)
        )
    )
    return float(k3(exact_C - own_C).mean())


def allowed_kl(found: dict[str, float], dtype: torch.dtype) -> float:
    """KL of sampler and learner that rounding explains: a run's limit in float32, and a
    multiple of the learner's own rounding in bfloat16."""
    limit = tolerances(dtype, None)[0]
    if "rounding/kl" not in found:
        return limit
    return min(limit, ROUNDING_FACTOR * found["rounding/kl"] + tolerances(torch.float32, None)[0])


def _parity(context: Context, dtype: torch.dtype) -> dict[str, Any]:
    folder = make_model("smollm2-135m", context)
    started = time.monotonic()
    policy = make_policy(folder, context, dtype, compiles=False)
    exact = None
    if dtype != torch.float32:
        exact = make_policy(folder, context, torch.float32, compiles=False)
    sampler = make_sampler(folder, context, dtype, lora=policy.lora, eager=True)
    figures: dict[str, Any] = {"start_s": round(time.monotonic() - started, 1)}
    count, length, cap = (32, 100, 64) if context.is_gpu else (4, 20, 12)
    prompts = random_prompts(policy.model.config.vocab_size, count, length)
    params = SampleParams(num_samples=4, max_tokens=cap, temperature=1.0, seed=1)
    adapters = context.work / "adapters" / str(dtype)

    def compared(adapter: Adapter | None) -> None:
        sampler.set_adapter(adapter)
        groups, off = sampler.sample(prompts, params), adapter is None
        found = mismatch(policy, prompts, groups, adapter_off=off)
        if exact is not None:
            found["rounding/kl"] = rounding_kl(policy, exact, prompts, groups, adapter_off=off)
        found["allowed/kl"] = allowed_kl(found, dtype)
        figures[adapter.name if adapter else "base"] = found
        context.keep(figures)
        check_step(found, dtype, None)
        if not found["mismatch/kl"] <= found["allowed/kl"]:
            raise CheckFailedError("sampler and learner differ by more than rounding", figures)

    with contextlib.closing(sampler):
        figures["at_start"] = check_at_start(policy, sampler, prompts[:4], adapters, None)
        versions = []
        for version in (1, 2):  # the second one is hot-loaded over the first
            shake(policy, seed=version)
            versions.append(save_adapter(policy, adapters, version=version, run_name="check"))
            compared(versions[-1])
        sampler.set_adapter(versions[0])  # an old version must show, or the check could not fail
        stale = mismatch(policy, prompts, sampler.sample(prompts, params))
        figures["stale_kl"] = stale["mismatch/kl"]
        context.keep(figures)
        if stale["mismatch/kl"] < STALE_FACTOR * figures[versions[-1].name]["allowed/kl"]:
            raise CheckFailedError("an old version looks like the new one", figures)
        compared(None)
        try:
            sampler.set_adapter(replace(versions[1], fingerprint="other"))
        except StaleAdapterError as error:
            figures["refused"] = str(error)[:60]
        else:
            raise CheckFailedError("a name already used for other weights was accepted", figures)
    return figures
