"""What 'LoRA Without Regret' states exactly, on the real layer with torch's own optimizers.

The four-to-two invariance needs other initial sizes and rates for A and B than the product offers
(one rate, one init): the tests scale the layer's own matrices and give the optimizer two groups.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rl_lora.config import LoraSection
from rl_lora.nn.lora import LoraLinear
from rl_lora.planning.counts import matmul_counts

D_IN, D_OUT, RANK, ALPHA, RATE = 12, 10, 3, 32.0, 1e-2
P, Q = 4.0, 0.5  # powers of two: scaling by them is exact in floating point


def make_layer(rank: int, alpha: float, seed: int = 0) -> LoraLinear:
    """A LoRA layer in float64 over one and the same base weight."""
    base = nn.Linear(D_IN, D_OUT, bias=False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        base.weight.copy_(torch.randn(D_OUT, D_IN, generator=generator))
    base.requires_grad_(False)
    return LoraLinear(base, rank, alpha, seed).double()


def make_adam(
    layer: LoraLinear, rate_a: float, rate_b: float, eps_a: float, eps_b: float
) -> torch.optim.Adam:
    groups = [
        {"params": [layer.lora_A], "lr": rate_a, "eps": eps_a},
        {"params": [layer.lora_B], "lr": rate_b, "eps": eps_b},
    ]
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def trajectory(layer: LoraLinear, optimizer: torch.optim.Adam, num_steps: int = 20) -> list[Tensor]:
    """The layer's change of W, (alpha / rank) B A, after each step of a small regression."""
    generator = torch.Generator().manual_seed(3)
    deltas = []
    for _ in range(num_steps):
        x_BI = torch.randn(16, D_IN, generator=generator, dtype=torch.float64)
        y_BO = torch.randn(16, D_OUT, generator=generator, dtype=torch.float64)
        loss = (layer(x_BI) - y_BO).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        deltas.append((layer.scaling * layer.lora_B @ layer.lora_A).detach().clone())
    return deltas


def shake_b(layer: LoraLinear, factor: float) -> None:
    """B off zero, the same B times `factor`: at B = 0 and eps = 0 Adam divides 0 by 0 for A."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        noise = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
        layer.lora_B.copy_(0.01 * factor * noise)


def plain_and_scaled(eps: float, eps_a: float, eps_b: float) -> tuple[list[Tensor], list[Tensor]]:
    """Trajectories with (alpha, init A, rates) and with (alpha / PQ, P init A, P rate A, Q rate B).

    B = 0 at the start has no scale; off zero it scales by Q as its rate does.
    """
    plain = make_layer(RANK, ALPHA)
    shake_b(plain, 1.0)
    scaled = make_layer(RANK, ALPHA / (P * Q))
    shake_b(scaled, Q)
    with torch.no_grad():
        scaled.lora_A.mul_(P)
    return (
        trajectory(plain, make_adam(plain, RATE, RATE, eps, eps)),
        trajectory(scaled, make_adam(scaled, P * RATE, Q * RATE, eps_a, eps_b)),
    )


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def test_four_hyperparameters_act_as_two_under_adam_without_eps() -> None:
    plain, scaled = plain_and_scaled(0.0, 0.0, 0.0)
    assert largest_difference(plain, scaled) < 1e-12
    assert float((plain[-1] - plain[0]).abs().max()) > 0.1  # it did go somewhere


def test_with_eps_the_invariance_needs_eps_scaled_as_the_gradients() -> None:
    # The gradient of A is 1/P, that of B 1/Q of the plain one.
    eps = 1e-3
    plain, scaled = plain_and_scaled(eps, eps / P, eps / Q)
    assert largest_difference(plain, scaled) < 1e-12
    plain, unscaled = plain_and_scaled(eps, eps, eps)
    assert largest_difference(plain, unscaled) > 1e-4


def test_from_b_at_zero_the_invariance_holds_as_the_layer_starts() -> None:
    eps = 1e-30  # not 0: A's first gradient is 0
    plain, scaled = make_layer(RANK, ALPHA), make_layer(RANK, ALPHA / (P * Q))
    with torch.no_grad():
        scaled.lora_A.mul_(P)
    assert not plain.lora_B.any()
    one = trajectory(plain, make_adam(plain, RATE, RATE, eps, eps))
    other = trajectory(scaled, make_adam(scaled, P * RATE, Q * RATE, eps / P, eps / Q))
    assert largest_difference(one, other) < 1e-12


def test_another_alpha_is_another_run() -> None:
    one, other = make_layer(RANK, ALPHA), make_layer(RANK, ALPHA / 2)
    first = trajectory(one, make_adam(one, RATE, RATE, 1e-8, 1e-8))
    second = trajectory(other, make_adam(other, RATE, RATE, 1e-8, 1e-8))
    assert largest_difference(first, second) > 1e-2


# --- the first update -----------------------------------------------------------------------------


def first_update(rank: int, seed: int) -> Tensor:
    """The change of W after one step of gradient descent, over the rate; B = 0 at the start."""
    layer = make_layer(rank, ALPHA, seed)
    generator = torch.Generator().manual_seed(11)
    x_BI = torch.randn(8, D_IN, generator=generator, dtype=torch.float64)
    y_BO = torch.randn(8, D_OUT, generator=generator, dtype=torch.float64)
    (layer(x_BI) - y_BO).square().mean().backward()
    assert layer.lora_B.grad is not None
    assert layer.lora_A.grad is not None
    assert not layer.lora_A.grad.any()
    return -(layer.scaling * layer.lora_B.grad @ layer.lora_A).detach()


def gradient_of_w() -> Tensor:
    """The gradient of the full weight at the same point."""
    weight = make_layer(1, ALPHA).base.weight.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(11)
    x_BI = torch.randn(8, D_IN, generator=generator, dtype=torch.float64)
    y_BO = torch.randn(8, D_OUT, generator=generator, dtype=torch.float64)
    (x_BI @ weight.T - y_BO).square().mean().backward()
    assert weight.grad is not None
    return weight.grad


def test_the_first_update_is_independent_of_rank_in_expectation() -> None:
    """With dW = -(alpha / r)^2 G A^T A and E[A^T A] = (r / 3 d_in) I for A ~ U(+-1/sqrt(d_in)), the
    mean over seeds is -(alpha^2 / r) G / (3 d_in) for gradient descent: times r it is one matrix.

    Adam's first step is the sign of B's gradient instead, whose entries do not depend on alpha / r:
    dW = -(alpha / r) sign(G A^T) A, a mean over r equal terms: independent of the rank itself.
    """
    expected = -(ALPHA**2) * gradient_of_w() / (3 * D_IN)
    for rank in (1, 4, 16):
        seeds = range(2400 // rank)  # as many rows of A for each rank
        mean = rank * torch.stack([first_update(rank, seed) for seed in seeds]).mean(0)
        error = float((mean - expected).norm() / expected.norm())
        assert error < 0.12, (rank, error)


def first_adam_update(rank: int, seed: int) -> Tensor:
    """The change of W after Adam's first step, over the rate."""
    layer = make_layer(rank, ALPHA, seed)
    optimizer = make_adam(layer, RATE, RATE, 1e-12, 1e-12)
    (delta,) = trajectory(layer, optimizer, num_steps=1)
    return delta / RATE


def test_adams_first_update_is_independent_of_rank_in_expectation() -> None:
    means = {
        rank: torch.stack([first_adam_update(rank, seed) for seed in range(3000 // rank)]).mean(0)
        for rank in (1, 4, 16)
    }
    for rank in (4, 16):
        error = float((means[rank] - means[1]).norm() / means[1].norm())
        assert error < 0.15, (rank, error)  # two means, each off by about 0.06
    # Only in the mean: one sample of rank 1 is far from it.
    single = float((first_adam_update(1, 0) - means[1]).norm() / means[1].norm())
    assert single > 0.5


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_arithmetic_of_a_layer_is_2nn_plus_6nr_against_3nn(rank: int) -> None:
    """Multiply-adds a token by torch's own counter, forward and backward of the real layer."""
    size, num_tokens = 64, 5
    layer = LoraLinear(nn.Linear(size, size, bias=False).requires_grad_(False), rank, ALPHA, 0)
    lora = counted(layer, size, num_tokens)
    full = counted(nn.Linear(size, size, bias=False), size, num_tokens)
    assert lora == num_tokens * (2 * size * size + 6 * size * rank)
    assert full == num_tokens * 3 * size * size
    plan = matmul_counts(nn.ModuleDict({"mlp": nn.Linear(size, size)}), LoraSection(rank=rank))
    assert (plan.lora * num_tokens, plan.full * num_tokens) == (lora, full)
    if rank == 1:
        assert math.isclose(lora / full, 2 / 3 + 2 / size)


def counted(module: nn.Module, size: int, num_tokens: int) -> int:
    x_TI = torch.randn(num_tokens, size, requires_grad=True)  # the layers below want its gradient
    with FlopCounterMode(display=False) as counter:
        module(x_TI).sum().backward()
    return counter.get_total_flops() // 2  # it counts a multiply-add as two
