"""Where a model runs and in which dtype: `model.device` and `model.dtype` with "auto" resolved.

In a job of several processes all ranks call these functions, and what is open is decided on rank 0.
"""

from __future__ import annotations

import time

import torch

from rl_lora import distributed
from rl_lora.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of `model.device`; auto: cuda where there is one.

    In a job of several processes cuda is the process's own GPU: of those that it sees, the one with
    its number on the node (accelerate's choice, too).

    Raises:
        UserError: there is no such device, or several processes would share one GPU.
    """
    if name == "auto":
        name = distributed.from_main(
            lambda: "cuda" if torch.cuda.is_available() else "cpu", "the choice of a device"
        )
    try:
        device = torch.device(name)
        if is_shared := distributed.world_size() > 1 and device.type == "cuda":
            device = _own_gpu(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device={name!r} is not usable here: {reason}") from error
    if is_shared:
        _check_one_each(device)
    return device


def _own_gpu(device: torch.device) -> torch.device:
    if ":" in str(device):
        raise UserError(
            f"model.device={str(device)!r} is one GPU for all of the job's processes: set "
            "model.device='cuda', which gives each its own GPU (CUDA_VISIBLE_DEVICES says "
            "which may be used)"
        )
    num_gpus = torch.cuda.device_count()  # of a launcher that shows each process its own, 1
    return torch.device("cuda", distributed.local_rank() % num_gpus if num_gpus else 0)


def _check_one_each(device: torch.device) -> None:
    own = str(torch.cuda.get_device_properties(device).uuid)
    uuids = distributed.gather(own, "the choice of a GPU")
    if len(set(uuids)) < len(uuids):
        first = next(uuid for uuid in uuids if uuids.count(uuid) > 1)
        ranks = ", ".join(str(rank) for rank, uuid in enumerate(uuids) if uuid == first)
        raise UserError(
            f"ranks {ranks} have the same GPU: start as many processes on a node as it has GPUs "
            "(--num_processes, --nproc_per_node)"
        )


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `model.dtype`; auto: bfloat16 where its matmul is faster than float32's.

    A CPU without AMX or AVX512-BF16 emulates bfloat16, so auto is decided by a timing (0.1 s).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return distributed.from_main(lambda: _fast_dtype(device), "the choice of a dtype")


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {dtype: _matmul_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return min(seconds, key=lambda dtype: seconds[dtype])


def _matmul_seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The fastest of 5 matmuls of 512 x 512 x 512, after 2 to warm up."""
    a, b = (torch.ones(512, 512, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return min(seconds[2:])
