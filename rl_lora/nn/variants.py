"""LoRA's variants: how an adapter is scaled, where it starts, and what of it is served.

    lora     alpha / r, A uniform, B zero ('LoRA Without Regret', set-up)
    rslora   alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732)
    pissa    starts at the base's r largest singular directions (Meng et al., arXiv 2404.02948)
    olora    starts at the first r columns of the base's QR (Büyükakyüz, arXiv 2406.01775)
    dora     direction and magnitude separate (Liu et al., arXiv 2402.09353)

LoRA+ (Hayou et al., arXiv 2402.12354) is a higher learning rate for B: `optim.lora_plus_ratio`.

Departure from the papers of PiSSA and OLoRA: those write W - s B0 A0 into the base and add B A to
it. Here the base is never written to, so the layer is W + s (B A - B0 A0) with B0 and A0 frozen:
the same function of A and B. It is computed, and served, as the adapter of rank 2r

    [B - B0, B0] [A; A - A0],

which is exactly zero at the start, where [B, -B0] [A; A0] cancels large numbers by rounding; in the
bfloat16 of an engine the latter would lose updates smaller than 1/256 of the start.

Letters: R rank, I inputs, O outputs of a layer.
"""

from __future__ import annotations

import math

import scipy.linalg
import torch
from torch import Tensor, nn

from rl_lora.config import LoraSection
from rl_lora.errors import UserError

_EXACT_UP_TO = 2048  # shorter side of a weight whose singular vectors are found by an eigensolver
_OVERSAMPLING = 8  # additional columns of the subspace iteration
_NUM_ROUNDS = 32


def scaling_of(variant: str, alpha: float, rank: int) -> float:
    """What B A is multiplied by: alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return alpha / math.sqrt(rank) if variant == "rslora" else alpha / rank


def is_shifted(variant: str) -> bool:
    """Whether the adapter starts away from zero, its start subtracted."""
    return variant in ("pissa", "olora")


def served_rank(section: LoraSection) -> int:
    """Rank of the published adapter: twice the trained one where the start is subtracted."""
    return section.rank * 2 if is_shifted(section.variant) else section.rank


def served_alpha(section: LoraSection) -> float:
    """alpha of the published adapter: with its rank the scaling stays what it is in training."""
    return section.alpha * 2 if is_shifted(section.variant) else section.alpha


def num_magnitudes(variant: str, num_outputs: int) -> int:
    """Trained parameters of one layer besides A and B, at any rank: DoRA's magnitudes."""
    return num_outputs if variant == "dora" else 0


@torch.no_grad()
def initial_factors(
    variant: str, weight_OI: Tensor, rank: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """(A0 [R, I], B0 [O, R]) of PiSSA or OLoRA, float32, from the base's weight only.

    Equal to PEFT's init_lora_weights "pissa" and "olora", singular vectors up to their sign, which
    is chosen so that the largest number of each row of A0 is positive.

    Raises:
        UserError: the rank exceeds the weight's shorter side.
    """
    if rank > min(weight_OI.shape):
        raise UserError(
            f"lora.rank={rank} with lora.variant={variant!r}: a layer of {weight_OI.shape[0]} "
            f"outputs and {weight_OI.shape[1]} inputs has no more than {min(weight_OI.shape)} "
            "directions; lower lora.rank"
        )
    if variant == "olora":
        weight = weight_OI.double()
        # The first r columns of Q depend on the first r columns of W only.
        b_OR = torch.linalg.qr(weight[:, :rank]).Q
        return (b_OR.T @ weight).float().contiguous(), b_OR.float().contiguous()
    left_OR, values_R, right_RI = top_singular(weight_OI, rank)
    root_R = (values_R / scaling).sqrt()
    return (root_R[:, None] * right_RI).float(), (left_OR * root_R).float()


def top_singular(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(U [O, R], S [R], V^T [R, I]) of the largest singular values, the same at every call.

    Up to _EXACT_UP_TO by the eigenvectors of the smaller Gram matrix in float64 (a sixth of a full
    SVD's time at 576 x 1536); above by subspace iteration on the weight's device, which converges
    by the values' ratios: after 32 rounds the function at step 0 is still exactly the base's.
    """
    is_tall = weight_OI.shape[0] >= weight_OI.shape[1]
    side = min(weight_OI.shape)
    if side <= _EXACT_UP_TO:
        weight = weight_OI.double().cpu()
        gram = weight.T @ weight if is_tall else weight @ weight.T
        _, vectors = scipy.linalg.eigh(gram.numpy(), subset_by_index=[side - rank, side - 1])
        inner = torch.from_numpy(vectors[:, ::-1].copy())  # largest first
        outer = weight @ inner if is_tall else weight.T @ inner
        values_R = outer.norm(dim=0)
        outer = outer / values_R.clamp(min=torch.finfo(torch.float32).tiny)
        left_OR, right_RI = (outer, inner.T) if is_tall else (inner, outer.T)
    else:
        left_OR, values_R, right_RI = _subspace(weight_OI.float(), rank)
    largest = right_RI.abs().argmax(dim=1, keepdim=True)
    sign_R = right_RI.gather(1, largest).sign().squeeze(1)
    found = (left_OR * sign_R, values_R, right_RI * sign_R[:, None])
    left_OR, values_R, right_RI = (part.to(weight_OI.device) for part in found)
    return left_OR, values_R, right_RI


def _subspace(weight_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Randomised subspace iteration (Halko et al., arXiv 0909.4061, algorithm 4.4)."""
    num = min(rank + _OVERSAMPLING, *weight_OI.shape)
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same start on any device
    start = torch.randn(weight_OI.shape[1], num, generator=generator).to(weight_OI)
    basis = torch.linalg.qr(weight_OI @ start).Q
    for _ in range(_NUM_ROUNDS):
        basis = torch.linalg.qr(weight_OI.T @ basis).Q
        basis = torch.linalg.qr(weight_OI @ basis).Q
    left, values, right = torch.linalg.svd(basis.T @ weight_OI, full_matrices=False)
    return basis @ left[:, :rank], values[:rank], right[:rank]


def shifted_factors(a_RI: Tensor, b_OR: Tensor, a0_RI: Tensor, b0_OR: Tensor) -> list[Tensor]:
    """[A; A - A0] and [B - B0, B0], whose product is B A - B0 A0."""
    return [torch.cat([a_RI, a_RI - a0_RI]), torch.cat([b_OR - b0_OR, b0_OR], dim=1)]


def squared_norms(weight_OI: Tensor) -> Tensor:
    """Squared length of each row of W, float32 [O]."""
    return weight_OI.detach().float().square().sum(dim=1)


@torch.no_grad()
def row_norms(
    squared_O: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """Length of each row of W + scaling B A, float32 [O], without forming the product.

    |w + s b A|^2 = |w|^2 + 2 s b . (A w) + s^2 b (A A^T) b: with B = 0 exactly the base's.

    Args:
        squared_O: `squared_norms` of W.
    """
    cross_OR = weight_OI.float() @ a_RI.T
    gram_RR = a_RI @ a_RI.T
    change_O = (b_OR * (2 * scaling * cross_OR + scaling**2 * (b_OR @ gram_RR))).sum(dim=1)
    return (squared_O + change_O).clamp(min=0).sqrt()


def merged_dora(
    weight_OI: Tensor, magnitude_O: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float
) -> Tensor:
    """m (W + s B A) / |W + s B A|, row by row, in float32 (arXiv 2402.09353, equation 5)."""
    moved_OI = torch.addmm(weight_OI.float(), b_OR.float(), a_RI.float(), alpha=scaling)
    return moved_OI * (magnitude_O.float() / moved_OI.norm(dim=1))[:, None]


class Magnitude(nn.Module):
    """DoRA's trained length of each output row; the direction is that of W + s B A.

    The norm of the direction is a constant of the backward pass (the paper's section 4.3, and
    PEFT's). `value` is float32 [O].
    """

    def __init__(self, weight_OI: Tensor) -> None:
        super().__init__()
        squared_O = squared_norms(weight_OI)
        self.register_buffer("squared_O", squared_O)
        self.value = nn.Parameter(squared_O.sqrt())

    def forward(
        self,
        out: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scaling: float,
    ) -> Tensor:
        """[..., O] of W + s B A without bias to the layer's output, in the same dtype."""
        assert isinstance(self.squared_O, Tensor)
        norms_O = row_norms(self.squared_O, weight_OI, a_RI, b_OR, scaling)
        # A scale near 1 does not survive bfloat16.
        scaled = (out * (self.value / norms_O)).to(out.dtype)
        return scaled if bias_O is None else scaled + bias_O
