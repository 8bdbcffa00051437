"""The MLP's second half as one function, against the module's own formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from rl_lora.nn.context import adapters_off
from rl_lora.nn.lora import LoraLinear
from rl_lora.nn.lora_swiglu import SwigluDown, join_swiglu


class Mlp(nn.Module):
    def __init__(self, act: nn.Module, *, has_bias: bool = False) -> None:
        super().__init__()
        for seed, (name, d_in, d_out) in enumerate(
            (("gate_proj", 6, 10), ("up_proj", 6, 10), ("down_proj", 10, 6))
        ):
            base = nn.Linear(d_in, d_out, bias=has_bias).requires_grad_(False)
            layer = LoraLinear(base, 2, 32.0, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            layer.lora_B.data = 0.1 * torch.randn(d_out, 2, generator=generator)
            setattr(self, name, layer)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def outputs_and_gradients(mlp: nn.Module) -> list[Tensor]:
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(9)).requires_grad_()
    out = mlp(x)
    parameters: list[Any] = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad((out * out).sum(), parameters)]


@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients_are_those_of_the_formula(has_bias: bool) -> None:
    mlp = Mlp(nn.SiLU(), has_bias=has_bias)
    expected = outputs_and_gradients(mlp)
    assert join_swiglu(mlp)
    for found, value in zip(outputs_and_gradients(mlp), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def test_neither_the_activation_nor_the_product_is_kept() -> None:
    mlp = Mlp(nn.SiLU())
    kept = []
    for is_joined in (False, True):
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(tensor.reshape(-1, tensor.shape[-1]).shape))
            return tensor

        if is_joined:
            assert join_swiglu(mlp)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            mlp(torch.randn(1, 7, 6, requires_grad=True))
        kept.append(shapes.count((7, 10)))
    before, after = kept
    assert before >= 4
    assert after == 2


def test_with_the_adapters_off_it_is_the_base() -> None:
    mlp = Mlp(nn.SiLU())
    assert join_swiglu(mlp)
    x = torch.randn(1, 3, 6)
    base = [getattr(mlp, name).base for name in ("gate_proj", "up_proj", "down_proj")]
    with adapters_off():
        found = mlp(x)
    assert torch.equal(found, base[2](silu(base[0](x)) * base[1](x)))


def test_other_mlps_are_left_alone() -> None:
    """Another activation, or another formula, seen by its numbers."""

    class Scaled(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for mlp in (Mlp(nn.GELU()), Scaled(nn.SiLU())):
        before = outputs_and_gradients(mlp)
        assert not join_swiglu(mlp)
        assert torch.equal(outputs_and_gradients(mlp)[0], before[0])


def test_the_function_by_hand() -> None:
    """One number: silu(2) * 3, W 5, A 7, B 11, scaling 13."""
    numbers = [torch.tensor([[v]], dtype=torch.float64) for v in (2.0, 3.0, 5.0, 7.0, 11.0)]
    gate, up, weight, a, b = numbers
    out = SwigluDown.apply(gate, up, weight, None, a, b, 13.0)
    h = 3 * 2 / (1 + float(torch.exp(torch.tensor(-2.0, dtype=torch.float64))))
    assert float(out) == pytest.approx(h * (5 + 13 * 7 * 11))
