"""What a device reaches and what a pass of the learner costs: speeds, kernel launches, memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_stages.roofline import Card
from rl_lora.learner import Learner
from rl_lora.policy import Policy
from rl_lora.types import Microbatch


def measured_card(device: torch.device) -> Card:
    """Speeds of a large square product and of a large copy of random numbers."""
    is_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if is_gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**28 if is_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    return Card(
        matmul_flops=2 * size**3 / fastest(lambda: a @ b, device),
        bytes_per_s=2 * source.nbytes / fastest(lambda: target.copy_(source), device),
    )


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of 10 calls, after 3 to warm up."""
    seconds = []
    for _ in range(13):
        synchronize(device)
        started = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[3:])


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


def launches_per_layer(learner: Learner, batch: Microbatch) -> float:
    """Kernels (on a CPU: operators that call no other) per layer of one microbatch's forward and
    backward pass. The profiler's table goes to the log."""
    policy = learner.policy
    layers = policy.model.config.num_hidden_layers
    half = layers // 2
    whole = _launches(learner, batch, is_printed=True)
    with only_first(half, policy):
        few = _launches(learner, batch, is_printed=False)
    return (whole - few) / (layers - half)


def _launches(learner: Learner, batch: Microbatch, *, is_printed: bool) -> int:
    learner.update([[batch]])
    is_gpu = learner.policy.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_gpu else [])
    with profile(activities=kinds) as found:
        learner.update([[batch]])
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
