"""RMSNorm on vLLM's CPU back end by vLLM's own kernels for CPUs.

vLLM 0.32 has such kernels but only chooses among kernels on GPUs; on a CPU an engine that is not
compiled normalizes with eight PyTorch operators, 60 times per step: 5 % of a decoding step with
many sequences, 10 % with few (LOG.md). They are registered here through vLLM's own registry of
implementations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROVIDER = "rl_lora_cpu"
WIDTH_UNIT = 64  # the kernels take whole vectors, of 8 to 32 elements by machine and dtype


def rms_norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    """x / rms(x) * weight. vLLM compares the signature with its own, so the names are vLLM's."""
    out = torch.empty(x.shape, dtype=x.dtype)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


def fused_add_rms_norm(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(norm of x + x_residual, x + x_residual), in the inputs' memory."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def priorities() -> dict[str, list[str]]:
    """Registers the kernels; returns vLLM's setting `ir_op_priority`, empty if it has none."""
    try:
        import vllm._custom_ops  # noqa: F401  # loads the kernels
        from vllm.ir import ops
    except ImportError:
        return {}
    chosen = {}
    for function, is_inplace in ((rms_norm, False), (fused_add_rms_norm, True)):
        name = function.__name__
        op = getattr(ops, name, None)
        if op is None or not hasattr(torch.ops._C, name):
            continue
        if PROVIDER not in op.impls:
            supports = _whole_rows_of_sums if is_inplace else _whole_rows
            op.register_impl(PROVIDER, supports_args=supports, inplace=is_inplace)(function)
        chosen[name] = [PROVIDER, "native"]
    return chosen


def _whole_rows(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    """Whether the kernel can compute it: the whole width, one dtype, rows without gaps."""
    return variance_size is None and _fits(x, weight)


def _whole_rows_of_sums(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    has_same = x_residual.dtype == x.dtype and x_residual.is_contiguous()
    return variance_size is None and has_same and _fits(x, weight)


def _fits(x: Tensor, weight: Any) -> bool:
    is_whole = x.is_contiguous() and x.shape[-1] % WIDTH_UNIT == 0
    return is_whole and weight is not None and weight.dtype == x.dtype
