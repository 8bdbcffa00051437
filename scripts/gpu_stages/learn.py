"""The learner's speed on three model shapes, with compiled layers and eager: steps of two
microbatches, new lengths each time.

Runs have new lengths, too; a repeated batch would hide what is compiled or tuned per shape.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo.utils import counters

from gpu_stages.measures import (
    Device,
    at_depth,
    bound_s,
    launches_per_layer,
    measured_device,
    needed_flops,
    only_first,
    peak_bytes,
    synchronize,
)
from gpu_stages.models import make_model, make_policy
from gpu_stages.stages import CheckFailedError, Context
from rl_lora.batches import pack_samples
from rl_lora.learner import Learner
from rl_lora.policy import Policy
from rl_lora.types import Microbatch, TrainSample

GROUP = 8  # completions per prompt
KINDS = ("eager", "compiled")


def smollm2(context: Context) -> dict[str, Any]:
    """SmolLM2-135M's shape, whole; of 16,384 tokens kernels take longer to start than to run."""
    return _learn("smollm2-135m", context, tokens=(16_384, 65_536))


def qwen3_small(context: Context) -> dict[str, Any]:
    """Qwen3-0.6B's shape, whole."""
    return _learn("qwen3-0.6b", context, tokens=(16_384, 32_768))


def qwen3_large(context: Context) -> dict[str, Any]:
    """Qwen3-8B's shape, 8 of its 36 layers: more do not fit an 80 GB card at 16k tokens."""
    return _learn("qwen3-8b", context, num_layers=8, whole=36)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens of a microbatch, and the lengths that its samples are drawn from.

    Example: Sizes(tokens=(4096, 16384), prompt=(64, 256), completion=(64, 512), repetitions=4)
    """

    tokens: tuple[int, ...]
    prompt: tuple[int, int]
    completion: tuple[int, int]
    repetitions: int


ON_GPU = Sizes((4096, 16_384), prompt=(64, 256), completion=(64, 512), repetitions=4)
ON_CPU = Sizes((256, 1024), prompt=(8, 24), completion=(8, 48), repetitions=2)


def _learn(
    shape: str,
    context: Context,
    *,
    num_layers: int | None = None,
    whole: int | None = None,
    tokens: tuple[int, ...] = ON_GPU.tokens,
) -> dict[str, Any]:
    """Figures eager, then with compiled layers, by the microbatch's size; an error at one size
    keeps those of the others.

    whole: the model's full number of layers, where fewer are measured; figures of the full model
    are extrapolated. tokens: of a microbatch on a GPU.
    """
    sizes = dataclasses.replace(ON_GPU, tokens=tokens) if context.is_gpu else ON_CPU
    folder = make_model(shape, context, num_layers)
    dtype = torch.bfloat16 if context.is_gpu else torch.float32  # which most CPUs emulate
    figures: dict[str, Any] = {"eager": {}, "compiled": {}}
    learners = {}
    for name in KINDS:
        learner = Learner(make_policy(folder, context, dtype, compiles=name == "compiled"))
        figures["layers"] = learner.policy.model.config.num_hidden_layers
        figures[name]["first_s"] = first_s(learner, sizes)
        context.keep(figures)
        learners[name] = learner
    with context.turn():
        device = measured_device(context.device)
        figures["matmul_tflops"] = device.matmul_flops / 1e12
        figures["copy_gb_per_s"] = device.bytes_per_s / 1e9
        for name in KINDS:
            _measure(
                learners.pop(name),
                sizes,
                device,
                whole,
                figures[name],
                lambda: context.keep(figures),
            )
            _free()
    figures["graphs"] = counters["stats"]["unique_graphs"]
    failed = [text for name in KINDS for text in figures[name]["out_of_memory"]]
    if failed:
        raise CheckFailedError("; ".join(failed), figures)
    return figures


def first_s(learner: Learner, sizes: Sizes) -> float:
    """Seconds of the first step, with compilation."""
    batches = microbatches(learner.policy, sizes, sizes.tokens[0], seed=0, count=2)
    started = time.perf_counter()
    learner.update([batches])
    synchronize(learner.policy.device)
    return time.perf_counter() - started


def _measure(
    learner: Learner,
    sizes: Sizes,
    device: Device,
    whole: int | None,
    figures: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """Fills in the figures: by the microbatch's size, what `timed` measures; launches per layer,
    and bytes that a token's activations take (the peak's growth from one size to the next). keep:
    called as they become known."""
    policy = learner.policy
    layers = policy.model.config.num_hidden_layers
    figures["out_of_memory"] = []
    peaks: list[tuple[int, int]] = []
    for tokens in sizes.tokens:
        try:
            found = timed(learner, sizes, tokens, device)
            print(f"{tokens} tokens: {found}", flush=True)
            peaks.append((found["largest"], found["peak_bytes"]))
            if whole is not None:
                with only_first(layers // 2, policy):
                    few = timed(learner, sizes, tokens, device)
                found |= extrapolated(found, few, layers, layers // 2, whole)
            figures[f"{tokens}"] = found
            keep()
        except torch.OutOfMemoryError as error:
            figures["out_of_memory"].append(f"{tokens} tokens: {str(error).splitlines()[0]}")
        _free()  # out here, where the error no longer holds its frames
    if len(peaks) > 1:
        (few_tokens, low), *_, (many_tokens, high) = peaks
        figures["activation_bytes_per_token"] = (high - low) / (many_tokens - few_tokens)
    (batch,) = microbatches(policy, sizes, sizes.tokens[0], seed=1, count=1)
    figures["launches_per_layer"] = launches_per_layer(learner, batch)
    keep()


def timed(learner: Learner, sizes: Sizes, tokens: int, reached: Device) -> dict[str, Any]:
    """Steps of two microbatches, each of new lengths; the first is not counted.

    Returns:
        tokens_per_s over all counted steps, those of the slowest and of the fastest step; mfu, the
        needed FLOP/s (no recomputation) as a share of the matmul peak; roofline, the share of the
        bound; peak_bytes, of memory; largest, tokens of the largest microbatch.
    """
    policy, device = learner.policy, learner.policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, numbers, flops, bounds, largest = [], [], [], [], 0
    for repetition in range(sizes.repetitions + 1):
        batches = microbatches(policy, sizes, tokens, seed=tokens + repetition, count=2)
        synchronize(device)
        started = time.perf_counter()
        learner.update([batches])
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        numbers.append(sum(batch.num_tokens for batch in batches))
        flops.append(sum(needed_flops(policy, batch) for batch in batches))
        bounds.append(sum(bound_s(policy, batch, reached) for batch in batches))
        largest = max(largest, *(batch.num_tokens for batch in batches))
    speeds = [n / s for n, s in zip(numbers[1:], seconds[1:], strict=True)]
    counted_s = sum(seconds[1:])
    return {
        "tokens_per_s": sum(numbers[1:]) / counted_s,
        "slowest": min(speeds),
        "fastest": max(speeds),
        "mfu": sum(flops[1:]) / counted_s / reached.matmul_flops,
        "roofline": sum(bounds[1:]) / counted_s,
        "bound_tokens_per_s": sum(numbers[1:]) / sum(bounds[1:]),
        "peak_bytes": peak_bytes(device),
        "largest": largest,
    }


def extrapolated(
    many: dict[str, Any], few: dict[str, Any], num_many: int, num_few: int, depth: int
) -> dict[str, float | None]:
    """The whole model's tokens per second and share of the bound, from those at two depths.

    None where the deeper model was not the slower one: timings that noisy say nothing.
    """
    if many["tokens_per_s"] >= few["tokens_per_s"]:
        return {"tokens_per_s_whole": None, "roofline_whole": None}
    speed, bound = (
        at_depth(many[key], few[key], num_many, num_few, depth)
        for key in ("tokens_per_s", "bound_tokens_per_s")
    )
    return {"tokens_per_s_whole": speed, "roofline_whole": speed / bound}


def microbatches(
    policy: Policy, sizes: Sizes, tokens: int, *, seed: int, count: int
) -> list[Microbatch]:
    """`count` microbatches of about `tokens` tokens each: groups of GROUP random completions."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = policy.model.config.vocab_size

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())

    samples: list[TrainSample] = []
    widest = sizes.prompt[1] + GROUP * sizes.completion[1]
    total = 0
    while total < count * tokens + 2 * widest:
        prompt = ids(*sizes.prompt)
        total += len(prompt)
        for number in range(GROUP):
            completion = ids(*sizes.completion)
            total += len(completion)
            advantage = number - (GROUP - 1) / 2
            samples.append(TrainSample(prompt, completion, (-8.0,) * len(completion), advantage, 0))
    (batches,) = pack_samples(
        samples, microbatch_tokens=tokens, share_prompts=policy.can_share_prompts
    )
    return batches[:count]


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()
