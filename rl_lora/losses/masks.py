"""Masks: which tokens are too far off the sampler to learn from.

A mask takes `LossInputs` and keyword options and returns [C] booleans, true for the tokens that
stay. It looks at the ratio old / sampler without gradient (policy / sampler where the loss does not
use the old policy): rounding, an older adapter version, another kernel. A token that is dropped
still counts in the step's denominator, so that dropping some does not give the others more weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from rl_lora.losses.inputs import Floor, Level, LossInputs

if TYPE_CHECKING:
    from torch import Tensor

MaskFn = Callable[..., "Tensor"]  # of LossInputs and the mask's own keywords


def token(x: LossInputs, *, mask_low: Floor = 0.5, mask_high: PositiveFloat = 5.0) -> Tensor:
    """Tokens whose own ratio is within the bounds (IcePop, in Ring-1T, arXiv 2510.18855, section
    2.3.2). The default bounds are IcePop's."""
    return _within(x, "token", mask_low, mask_high)


def sequence(x: LossInputs, *, mask_low: Floor = 0.0, mask_high: PositiveFloat = 2.0) -> Tensor:
    """Sequences whose ratio, the product over their tokens, is within the bounds: masked importance
    sampling (Liu, Li et al. 2025, 'When Speed Kills Stability', richardli.xyz/rl-collapse).

    The default bounds are none below and 2 above, as verl's documentation has it. The product's
    spread grows with the length: over thousands of tokens, rounding by itself can drop most
    sequences.
    """
    return _within(x, "sequence", mask_low, mask_high)


def geometric(
    x: LossInputs, *, mask_low: Floor = 0.999, mask_high: PositiveFloat = 1.001
) -> Tensor:
    """Sequences the geometric mean of whose tokens' ratios is within the bounds, whatever their
    length. The default bounds are those that verl's documentation of rollout correction uses."""
    return _within(x, "geometric", mask_low, mask_high)


MASKS: dict[str, MaskFn] = {"token": token, "sequence": sequence, "geometric": geometric}


def _within(x: LossInputs, level: Level, low: float, high: float) -> Tensor:
    ratio_C = x.at_level(x.log_mismatch(), level).exp()
    return (ratio_C >= low) & (ratio_C <= high)
