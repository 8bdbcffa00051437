"""silu(gate) * up and the LoRA layer after it as one autograd function.

Autograd keeps gate, silu(gate), up and their product, half of all the activations of a step; this
keeps only gate and up and recomputes the other two in the backward pass: two passes over memory, no
matrix product. The slow reference is the module's formula (tests/nn/test_lora_swiglu.py).
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from rl_lora.nn.context import CONTEXT
from rl_lora.nn.lora_matmul import low_rank_gradients

if TYPE_CHECKING:
    from rl_lora.nn.lora import LoraLinear


class SwigluDown(torch.autograd.Function):
    """Letters: T tokens, F the MLP's width, D outputs, R rank."""

    # limits: autograd takes the tensors that it differentiates one by one
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight_DF: Tensor,
        bias_D: Tensor | None,
        a_RF: Tensor,
        b_DR: Tensor,
        scaling: float,
    ) -> Tensor:
        """W h + bias + scaling B (A h), h = silu(gate) * up; weight and bias are frozen."""
        h_TF = silu(gate.reshape(-1, gate.shape[-1])).mul_(up.reshape(-1, up.shape[-1]))
        hidden_TR = h_TF @ a_RF.to(h_TF.dtype).T
        y_TD = h_TF @ weight_DF.T
        if bias_D is not None:
            y_TD += bias_D
        torch.addmm(y_TD, hidden_TR, b_DR.to(h_TF.dtype).T, alpha=scaling, out=y_TD)
        ctx.scaling = scaling
        ctx.save_for_backward(gate, up, hidden_TR, weight_DF, a_RF, b_DR)
        return y_TD.view(*gate.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of gate, up, A and B."""
        gate, up, hidden_TR, weight_DF, a_RF, b_DR = ctx.saved_tensors
        shape = gate.shape
        gate_TF, up_TF = gate.reshape(-1, shape[-1]), up.reshape(-1, shape[-1])
        grad_TD = grad_output.reshape(-1, grad_output.shape[-1])
        low_TR, grad_b = low_rank_gradients(grad_TD, hidden_TR, b_DR, ctx.scaling)
        grad_TF = grad_TD @ weight_DF
        torch.addmm(grad_TF, low_TR, a_RF.to(grad_TD.dtype), out=grad_TF)
        silu_TF = silu(gate_TF)
        grad_up_TF = grad_TF * silu_TF
        grad_a = (low_TR.T @ silu_TF.mul_(up_TF)).float()
        grad_gate_TF = torch.ops.aten.silu_backward(grad_TF.mul_(up_TF), gate_TF)
        return grad_gate_TF.view(shape), grad_up_TF.view(shape), None, None, grad_a, grad_b, None


def join_swiglu(parent: nn.Module) -> bool:
    """Makes an MLP of the form down(silu(gate(x)) * up(x)), down with LoRA, use `SwigluDown`.

    Returns whether the module has that form, which is decided by comparing outputs.
    """
    from rl_lora.nn.lora import LoraLinear

    gate, up = getattr(parent, "gate_proj", None), getattr(parent, "up_proj", None)
    down, act = getattr(parent, "down_proj", None), getattr(parent, "act_fn", None)
    if not isinstance(down, LoraLinear) or gate is None or up is None or act is None:
        return False
    width = down.base.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, gate.weight.shape[1], generator=generator).to(width)
    with torch.no_grad():
        wanted = down(silu(gate(x)) * up(x))
        try:
            found = parent(x)
        except TypeError:  # it takes more than x
            return False
    if not (isinstance(found, Tensor) and torch.equal(found, wanted)):
        return False
    parent.forward = MethodType(_forward, parent)
    return True


def _forward(parent: Any, x: Tensor) -> Tensor:
    gate, up = parent.gate_proj(x), parent.up_proj(x)
    down: LoraLinear = parent.down_proj
    is_plain = not CONTEXT.has_adapter or down.magnitude is not None
    if is_plain or torch.compiler.is_compiling():  # the compiler recomputes the same two itself
        return down(parent.act_fn(gate) * up)
    out: Tensor = SwigluDown.apply(
        gate, up, down.base.weight, down.base.bias, *down.factors(), down.scaling
    )
    return out
