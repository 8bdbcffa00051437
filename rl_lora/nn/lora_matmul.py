"""The LoRA layers of one input as one autograd function: y_i = W_i x + scale (B_i (A_i x)).

x A^T is one product for all layers, the low-rank terms are added in place, and the backward pass
sums the input's gradient in one buffer and never forms a gradient of W. Only x and A x are kept
for it. The slow reference is the same formula in autograd's operations
(tests/nn/test_fast_paths.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rl_lora.nn.lora import LoraLinear


def lora_products(x: Tensor, layers: Sequence[LoraLinear]) -> tuple[Tensor, ...]:
    """[..., d_in] to one [..., d_out] per layer; the layers' base weights are frozen."""
    tensors: list[Tensor | None] = []
    for layer in layers:
        bias = layer.base.bias if layer.magnitude is None else None
        tensors += [layer.base.weight, bias, *layer.factors()]
    outputs: tuple[Tensor, ...] = LoraProducts.apply(
        x, tuple(layer.scaling for layer in layers), *tensors
    )
    return tuple(layer.finished(out) for layer, out in zip(layers, outputs, strict=True))


class LoraProducts(torch.autograd.Function):
    """Letters: T tokens, I inputs, O outputs, R the layers' ranks together."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scalings: tuple[float, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        """tensors: W [O, I], bias [O] or None, A [R_i, I] and B [O, R_i] of each layer in turn."""
        x_TI = x.reshape(-1, x.shape[-1])
        parts_of: list[Any] = [tensors[i::4] for i in range(4)]
        weights, biases, a_parts, b_parts = parts_of
        ranks = [a.shape[0] for a in a_parts]
        a_RI = torch.cat(a_parts).to(x.dtype) if len(ranks) > 1 else a_parts[0].to(x.dtype)
        # Each contiguous: MKL takes three times as long for columns of a wider matrix.
        hidden_parts = [part.contiguous() for part in (x_TI @ a_RI.T).split(ranks, 1)]
        outputs = []
        parts = zip(weights, biases, hidden_parts, b_parts, scalings, strict=True)
        for weight_OI, bias_O, hidden_Tr, b_Or, scaling in parts:
            y_TO = x_TI @ weight_OI.T
            if bias_O is not None:
                y_TO += bias_O
            torch.addmm(y_TO, hidden_Tr, b_Or.to(x.dtype).T, alpha=scaling, out=y_TO)
            outputs.append(y_TO.view(*x.shape[:-1], -1))
        ctx.scalings, ctx.ranks = scalings, ranks
        ctx.save_for_backward(x_TI, a_RI, *hidden_parts, *weights, *b_parts)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, and of each layer's A and B."""
        x_TI, a_RI, *rest = ctx.saved_tensors
        count = len(ctx.ranks)
        hidden_parts, weights, b_parts = rest[:count], rest[count : 2 * count], rest[2 * count :]
        grads_TO = [grad.reshape(-1, grad.shape[-1]) for grad in grad_outputs]
        low_TR = x_TI.new_empty(x_TI.shape[0], sum(ctx.ranks))
        grad_b = []
        parts = zip(
            grads_TO, low_TR.split(ctx.ranks, 1), hidden_parts, b_parts, ctx.scalings, strict=True
        )  # fmt: skip
        for grad_TO, low_Tr, hidden_Tr, b_Or, scaling in parts:
            low, grad = low_rank_gradients(grad_TO, hidden_Tr, b_Or, scaling)
            low_Tr.copy_(low)
            grad_b.append(grad)
        grad_a = (low_TR.T @ x_TI).float().split(ctx.ranks)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_TI = grads_TO[0] @ weights[0]
            for grad_TO, weight_OI in zip(grads_TO[1:], weights[1:], strict=True):
                torch.addmm(grad_TI, grad_TO, weight_OI, out=grad_TI)
            torch.addmm(grad_TI, low_TR, a_RI, out=grad_TI)
            grad_x = grad_TI.view(*grad_outputs[0].shape[:-1], -1)
        flat = [g for a, b in zip(grad_a, grad_b, strict=True) for g in (None, None, a, b)]
        return grad_x, None, *flat


def low_rank_gradients(
    grad_TO: Tensor, hidden_TR: Tensor, b_OR: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Gradients of A x, [T, R], and of B, float32 [O, R], where scaling B (A x) is added to y.

    Thin products in the form that MKL computes up to ten times faster, from rank 2 on (LOG.md).
    """
    b_RO = b_OR.to(grad_TO.dtype).T.contiguous()
    low_TR = (grad_TO @ b_RO.T).mul_(scaling)
    return low_TR, (hidden_TR.T @ grad_TO).T.float().mul_(scaling)
