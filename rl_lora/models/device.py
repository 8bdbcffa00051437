"""Where a model runs and in which dtype: `model.device` and `model.dtype` with "auto" resolved."""

from __future__ import annotations

import time

import torch

from rl_lora.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of `model.device`; auto: cuda where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model.device={name!r} is not usable here: {reason}") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `model.dtype`; auto: bfloat16 where its matmul is faster than float32's.

    A CPU without AMX or AVX512-BF16 emulates bfloat16, so auto is decided by a timing (0.1 s).
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
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
