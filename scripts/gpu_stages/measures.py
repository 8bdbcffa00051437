"""What a device reaches, and what a pass of the learner needs and costs: operations, the bound of
its speed, kernel launches, memory."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from rl_lora.config import OptimSection, RunConfig
from rl_lora.learner import Learner
from rl_lora.planning.cards import Card
from rl_lora.planning.roofline import learner_token_s, shape_of
from rl_lora.policy import Policy
from rl_lora.types import Microbatch

# Of a data sheet's figures, what a large square product and a large copy reach: on an H100 795 of
# 989 TFLOP/s and 3.0 of 3.35 TB/s.
_PRODUCT_SHARE, _COPY_SHARE = 0.8, 0.9


@dataclass(frozen=True, slots=True)
class Device:
    """What a device reaches.

    Example, an H100 in bfloat16: Device(matmul_flops=795e12, bytes_per_s=3.0e12)
    """

    matmul_flops: float  # FLOP/s of a large square product
    bytes_per_s: float  # read and written by a large copy

    @property
    def card(self) -> Card:
        """Figures of a data sheet that would let it reach as much."""
        tflops = self.matmul_flops / _PRODUCT_SHARE / 1e12
        terabytes_s = self.bytes_per_s / _COPY_SHARE / 1e12
        return Card("measured", 0, tflops=tflops, terabytes_s=terabytes_s, link_gb_s=0)


def needed_flops(policy: Policy, batch: Microbatch) -> float:
    """Of one forward and backward pass: 4 per weight and token (the base weights get no gradient),
    12 per query dimension and key seen, lm_head at completion tokens; LoRA's own are left out."""
    shape = shape_of(policy.model.config)
    per_token = 4 * shape.layer_weights + 12 * shape.query * mean_keys(batch)
    head = 4 * shape.hidden * shape.vocabulary * len(batch.target_ids_C)
    return float(shape.layers * per_token * batch.num_tokens + head)


def bound_s(policy: Policy, batch: Microbatch, device: Device) -> float:
    """Seconds of one forward and backward pass that the device's figures allow
    (`planning.roofline`)."""
    shape = shape_of(policy.model.config)
    job = RunConfig.model_construct(lora=policy.lora, optim=OptimSection())
    layers_s, head_s = learner_token_s(job, shape, device.card, mean_keys(batch))
    return batch.num_tokens * layers_s + len(batch.target_ids_C) * head_s


def mean_keys(batch: Microbatch) -> float:
    """Keys that a token attends to, on average."""
    position_BT = batch.position_BT
    if position_BT is None:  # every row is one sequence
        position_BT = torch.arange(batch.token_ids_BT.shape[1]).expand_as(batch.token_ids_BT)
    return float((position_BT + 1).sum()) / batch.num_tokens


def measured_device(device: torch.device) -> Device:
    """Speeds of a large square product and of a large copy of random numbers."""
    is_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if is_gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(2**28 if is_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    return Device(
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
