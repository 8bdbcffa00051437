"""Memory that an idle sampler leaves to the learner, and that it samples the same afterwards."""

from __future__ import annotations

import contextlib
from typing import Any

import psutil
import torch

from gpu_stages.models import make_model, make_policy, shake
from gpu_stages.parity import make_sampler, random_prompts
from gpu_stages.stages import CheckFailedError, Context
from rl_lora.adapters.files import save_adapter

LEAST_SHARE = 0.9  # of what the engine takes, on a GPU
MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # nats


def release(context: Context) -> dict[str, Any]:
    """Used memory before the engine, with it, while it rests and once it has sampled again; the
    largest difference of log-probs from before the rest to after it.

    Under an adapter, so that a lost or damaged adapter shows as well. On a GPU the released memory
    is overwritten during the rest, as a learner does.
    """
    dtype = torch.bfloat16 if context.is_gpu else torch.float32
    folder = make_model("smollm2-135m", context)
    policy = make_policy(folder, context, dtype, compiles=False)
    shake(policy, seed=1)
    adapter = save_adapter(policy, context.work / "adapters/release", version=1, run_name="release")
    prompts = random_prompts(policy.model.config.vocab_size, 8, 100 if context.is_gpu else 20)
    token_ids = [prompt.token_ids for prompt in prompts]
    figures: dict[str, Any] = {}
    with context.turn():  # others would change what the GPU has free
        figures["used_gb_before"] = used_bytes(context.device) / 1e9
        sampler = make_sampler(folder, context, dtype, lora=policy.lora, eager=True)
        with contextlib.closing(sampler):
            sampler.set_adapter(adapter)
            first = sampler.token_logprobs(token_ids)
            figures["used_gb_awake"] = used_bytes(context.device) / 1e9
            sampler.release_memory()
            figures["used_gb_released"] = used_bytes(context.device) / 1e9
            context.keep(figures)
            overwrite(figures, context.device)
            again = sampler.token_logprobs(token_ids)
            figures["used_gb_awake_again"] = used_bytes(context.device) / 1e9
    figures["max_difference"] = largest_difference(first, again)
    check(figures, context, MAX_DIFFERENCE[dtype])
    return figures


def check(figures: dict[str, Any], context: Context, max_difference: float) -> None:
    """Raises CheckFailedError if log-probs differ, or a GPU's memory was not released."""
    if not figures["max_difference"] <= max_difference:
        raise CheckFailedError("other log-probs after the rest", figures)
    before, awake, released = (
        figures[f"used_gb_{name}"] for name in ("before", "awake", "released")
    )
    if context.is_gpu and awake - released < LEAST_SHARE * (awake - before):
        raise CheckFailedError("an idle engine keeps its memory", figures)


def overwrite(figures: dict[str, Any], device: torch.device) -> None:
    """Fills 90 % of a GPU's released memory and frees it."""
    if device.type == "cuda":
        released = figures["used_gb_awake"] - figures["used_gb_released"]
        torch.full((int(0.9e9 * max(released, 0)),), 255, dtype=torch.uint8, device=device)
        torch.cuda.empty_cache()


def largest_difference(first: list[list[float]], again: list[list[float]]) -> float:
    """Of all log-probs, nats."""
    return max(
        abs(a - b)
        for one, other in zip(first, again, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def used_bytes(device: torch.device) -> int:
    """A GPU's memory in use by anyone; on a CPU this process's resident memory."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    return psutil.Process().memory_info().rss
