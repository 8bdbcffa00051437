"""The LoRA layer's product, y = W x + bias + scale B (A x), W and bias frozen.

Eagerly one autograd function: the low-rank term is added in place, the backward pass sums the
input's gradient in one buffer and never forms one of W, and only x and A x are kept for it. In a
compiled decoder layer (`compiled`) the plain formula, with memory and gradients planned by the
compiler; of rank 1 `RankOne`. Slow references: tests/nn/test_fast_paths.py, and for compiled layers
the eager ones.

Letters: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

# Weighted sums of the same rows in one product, of which the first is wanted: cuBLAS computes eight
# in half the time of one (LOG.md).
_NUM_SUMS = {"cuda": 8}


# limits: the terms of the formula
def lora_product(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """[..., I] to [..., O]; A and B are float32 whatever the dtype of x."""
    if not torch.compiler.is_compiling():
        out: Tensor = LoraProduct.apply(x, weight_OI, bias_O, a_RI, b_OR, scaling)
        return out
    y = linear(x, weight_OI, bias_O)
    if a_RI.shape[0] == 1:
        out = RankOne.apply(x, y, a_RI, b_OR, scaling)
        return out
    return y + linear(linear(x, a_RI.to(x.dtype)), (scaling * b_OR).to(x.dtype))


class RankOne(torch.autograd.Function):
    """y + scaling B (A x) of rank 1 in a compiled layer, in float32: A x and the addition become a
    part of the kernels before and after, which pass over the same rows.

    The gradients of A and B are sums over all tokens, and separate products: as a part of other
    kernels they would recompute, down a column, what those compute along a row.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor, a_1I: Tensor, b_O1: Tensor, scaling: float
    ) -> Tensor:
        """[..., O], in the dtype of x."""
        hidden_1 = scaling * (x * a_1I[0]).sum(-1, keepdim=True)
        ctx.scaling = scaling
        ctx.save_for_backward(x, hidden_1, a_1I, b_O1)
        out = y + hidden_1 * b_O1[:, 0]
        # To return `out.to` where it is `out` itself loses all gradients in PyTorch 2.11's Dynamo.
        return out if out.dtype == x.dtype else out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, y, A and B."""
        x, hidden_1, a_1I, b_O1 = ctx.saved_tensors
        low_1 = ctx.scaling * (grad_output * b_O1[:, 0]).sum(-1, keepdim=True)
        grad_a, grad_b = _weighted_sum(low_1, x), _weighted_sum(hidden_1, grad_output)
        return (low_1 * a_1I[0]).to(x.dtype), grad_output, grad_a, grad_b.T, None


def _weighted_sum(weights_1: Tensor, rows: Tensor) -> Tensor:
    """Of all rows, float32 [1, their length]."""
    weights_TR = weights_1.reshape(-1, 1).to(rows.dtype)
    if (num_sums := _NUM_SUMS.get(rows.device.type, 1)) > 1:
        weights_TR = pad(weights_TR, (0, num_sums - 1))
    return (weights_TR.T @ rows.reshape(-1, rows.shape[-1]))[:1].float()


class LoraProduct(torch.autograd.Function):
    """`lora_product` eagerly."""

    # limits: autograd takes the tensors that it differentiates one by one
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        """[..., O]."""
        x_TI = x.reshape(-1, x.shape[-1])
        a_RI = a_RI.to(x.dtype)
        hidden_TR = x_TI @ a_RI.T
        y_TO = x_TI @ weight_OI.T
        if bias_O is not None:
            y_TO += bias_O
        torch.addmm(y_TO, hidden_TR, b_OR.to(x.dtype).T, alpha=scaling, out=y_TO)
        ctx.scaling = scaling
        ctx.save_for_backward(x_TI, a_RI, hidden_TR, weight_OI, b_OR)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A and B."""
        x_TI, a_RI, hidden_TR, weight_OI, b_OR = ctx.saved_tensors
        grad_TO = grad_output.reshape(-1, grad_output.shape[-1])
        low_TR, grad_b = low_rank_gradients(grad_TO, hidden_TR, b_OR, ctx.scaling)
        grad_a = (low_TR.T @ x_TI).float()
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_TI = grad_TO @ weight_OI
            torch.addmm(grad_TI, low_TR, a_RI, out=grad_TI)
            grad_x = grad_TI.view(*grad_output.shape[:-1], -1)
        return grad_x, None, None, grad_a, grad_b, None


def low_rank_gradients(
    grad_TO: Tensor, hidden_TR: Tensor, b_OR: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradients of A x, [T, R], and of B, float32 [O, R], where scaling B (A x) is added to y.

    Thin products in the form that MKL computes up to ten times faster, from rank 2 on (LOG.md).
    """
    b_RO = b_OR.to(grad_TO.dtype).T.contiguous()
    low_TR = (grad_TO @ b_RO.T).mul_(scaling)
    return low_TR, (hidden_TR.T @ grad_TO).T.float().mul_(scaling)
