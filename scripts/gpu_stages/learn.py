"""The learner's speed on three model shapes: steps of two microbatches, new lengths each time.

Runs have new lengths, too; a repeated batch would hide what is compiled or tuned per shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_stages.models import make_model, make_policy
from gpu_stages.stages import CheckFailedError, Context
from rl_lora.batches import pack_samples
from rl_lora.learner import Learner
from rl_lora.policy import Policy
from rl_lora.types import Microbatch, TrainSample

GROUP = 8  # completions per prompt


def smollm2(context: Context) -> dict[str, Any]:
    """SmolLM2-135M's shape, whole."""
    return _learn("smollm2-135m", context)


def qwen3_small(context: Context) -> dict[str, Any]:
    """Qwen3-0.6B's shape, whole."""
    return _learn("qwen3-0.6b", context)


def qwen3_large(context: Context) -> dict[str, Any]:
    """Qwen3-8B's shape, 8 of its 36 layers: more do not fit an 80 GB card at 16k tokens."""
    return _learn("qwen3-8b", context, num_layers=8, whole=36)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A microbatch's tokens, and the lengths that its samples are drawn from.

    Example: Sizes(tokens=(4096, 16384), prompt=(64, 256), completion=(64, 512), repetitions=4)
    """

    tokens: tuple[int, ...]
    prompt: tuple[int, int]
    completion: tuple[int, int]
    repetitions: int


ON_GPU = Sizes((4096, 16_384), prompt=(64, 256), completion=(64, 512), repetitions=4)
ON_CPU = Sizes((256, 1024), prompt=(8, 24), completion=(8, 48), repetitions=2)


def _learn(
    shape: str, context: Context, *, num_layers: int | None = None, whole: int | None = None
) -> dict[str, Any]:
    """Figures by the microbatch's size; an error at one size keeps those of the others.

    whole: the model's full number of layers, where fewer are measured; tokens/s of the full
    model are extrapolated.
    """
    policy = make_policy(make_model(shape, context, num_layers), context, _dtype(context))
    sizes = ON_GPU if context.is_gpu else ON_CPU
    peak = matmul_peak(context.device)
    layers = policy.model.config.num_hidden_layers
    figures: dict[str, Any] = {"layers": layers, "peak_tflops": peak / 1e12}
    failed = []
    learner = Learner(policy)
    for tokens in sizes.tokens:
        try:
            found = timed(learner, sizes, tokens, peak)
            if whole is not None:
                with only_first(layers // 2, policy):
                    few = timed(learner, sizes, tokens, peak)
                found["tokens_per_s_whole"] = at_depth(
                    found["tokens_per_s"], few["tokens_per_s"], layers, layers // 2, whole
                )
            figures[f"{tokens}"] = found
        except torch.OutOfMemoryError as error:
            failed.append(f"{tokens} tokens: {str(error).splitlines()[0]}")
        gc.collect()  # out here, where the error no longer holds its frames
        torch.cuda.empty_cache()
    figures["launches_per_layer"] = launches_per_layer(learner, sizes)
    if failed:
        raise CheckFailedError("; ".join(failed), figures)
    return figures


def _dtype(context: Context) -> torch.dtype:
    return torch.bfloat16 if context.is_gpu else torch.float32  # which most CPUs emulate


def timed(learner: Learner, sizes: Sizes, tokens: int, peak: float) -> dict[str, float]:
    """Steps of two microbatches, each of new lengths; the first is not counted, but reported.

    Returns:
        tokens_per_s (over all counted steps), slowest and fastest step; mfu, the needed FLOP/s
        (no recomputation) as a share of the matmul peak; first_s; peak_gb, memory.
    """
    policy, device = learner.policy, learner.policy.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, numbers, flops = [], [], []
    for repetition in range(sizes.repetitions + 1):
        batches = microbatches(policy, sizes, tokens, seed=tokens + repetition, count=2)
        synchronize(device)
        started = time.perf_counter()
        learner.update([batches])
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        numbers.append(sum(batch.num_tokens for batch in batches))
        flops.append(sum(needed_flops(policy, batch) for batch in batches))
    speeds = [n / s for n, s in zip(numbers[1:], seconds[1:], strict=True)]
    return {
        "tokens_per_s": sum(numbers[1:]) / sum(seconds[1:]),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "mfu": sum(flops[1:]) / sum(seconds[1:]) / peak,
        "first_s": seconds[0],
        "peak_gb": peak_bytes(device) / 1e9,
    }


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


def needed_flops(policy: Policy, batch: Microbatch) -> float:
    """Of one forward and backward pass: 4 per weight and token (the base weights get no gradient),
    12 per query dimension and key seen, lm_head at completion tokens; LoRA's own are left out."""
    config = policy.model.config
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    weights = 2 * config.hidden_size * (query + key) + 3 * config.hidden_size * (
        config.intermediate_size
    )
    position_BT = batch.position_BT
    if position_BT is None:  # every row is one sequence
        position_BT = torch.arange(batch.token_ids_BT.shape[1]).expand_as(batch.token_ids_BT)
    num_keys = float((position_BT + 1).sum())
    layers = config.num_hidden_layers * (4 * weights * batch.num_tokens + 12 * query * num_keys)
    return layers + 4.0 * config.hidden_size * config.vocab_size * len(batch.target_ids_C)


def matmul_peak(device: torch.device) -> float:
    """FLOP/s of a large square matmul of random numbers, the fastest of 10 after 3 to warm up."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        synchronize(device)
        started = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds[3:])


@contextlib.contextmanager
def only_first(num_layers: int, policy: Policy) -> Iterator[None]:
    """Within the context, the model runs only its first layers."""
    config = policy.model.config
    whole = config.num_hidden_layers
    config.num_hidden_layers = num_layers
    try:
        yield
    finally:
        config.num_hidden_layers = whole


def at_depth(many_per_s: float, few_per_s: float, many: int, few: int, depth: int) -> float:
    """Tokens per second at `depth` layers from those at two other depths: a token's time is linear
    in the number of layers.

    Example: 100 tokens/s of 8 layers and 150 of 4 give 1/100 + 28 * (1/100 - 1/150) / 4 seconds a
    token at 36, which is 30 tokens/s.
    """
    layer_s = (1 / many_per_s - 1 / few_per_s) / (many - few)
    return 1 / (1 / many_per_s + (depth - many) * layer_s)


def launches_per_layer(learner: Learner, sizes: Sizes) -> float:
    """Kernels (on a CPU: operators that call no other) per layer of one microbatch's forward and
    backward pass. The profiler's table goes to the log."""
    policy = learner.policy
    batches = microbatches(policy, sizes, sizes.tokens[0], seed=1, count=1)
    layers = policy.model.config.num_hidden_layers
    half = layers // 2
    whole = _launches(learner, batches, is_printed=True)
    with only_first(half, policy):
        few = _launches(learner, batches, is_printed=False)
    return (whole - few) / (layers - half)


def _launches(learner: Learner, batches: list[Microbatch], *, is_printed: bool) -> int:
    learner.update([batches])
    is_gpu = learner.policy.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_gpu else [])
    with profile(activities=kinds) as found:
        learner.update([batches])
        synchronize(learner.policy.device)
    if is_printed:
        order = "self_device_time_total" if is_gpu else "self_cpu_time_total"
        print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70))
    if is_gpu:
        kernels = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels)
    return sum(not event.cpu_children for event in found.events())


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory, bytes: on a GPU since its statistics were reset, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
