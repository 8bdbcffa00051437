"""Learning rates: over optimizer steps, and of A and B."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

_KL_STEP, _KL_RANGE = 1.5, 100.0  # of `Schedule.adapted`


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate over optimizer steps; constant is the article's choice.

    Example: Schedule("cosine", warmup_steps=10, num_steps=200)
    """

    kind: Literal["constant", "linear", "cosine", "kl"] = "constant"
    warmup_steps: int = 0  # rising linearly to the full rate
    num_steps: int = 0  # optimizer steps in all, at whose end linear and cosine are at 0
    target_kl: float = 0.0  # nats a token by which a step moves the policy, of kl

    def rate(self, lr: float, step: int, factor: float = 1.0) -> float:
        """The rate of optimizer step `step` = 1, 2, ... where `lr` is the full one and `factor`
        what `adapted` has made of it so far."""
        lr *= factor
        if step <= self.warmup_steps:
            return lr * step / self.warmup_steps
        span = max(1, self.num_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps - 1) / span)
        if self.kind == "linear":
            return lr * (1.0 - done)
        if self.kind == "cosine":
            return lr * 0.5 * (1.0 + math.cos(math.pi * done))
        return lr

    def adapted(self, factor: float, kl: float) -> float:
        """The factor after a step that has moved the policy by `kl` nats a token.

        A KL over twice the target divides it by 1.5, one under half the target multiplies it by
        1.5 (Rudin et al., arXiv 2109.11978, whose code has this rule; after the adaptive penalty of
        PPO, arXiv 1707.06347, section 4). It stays within 1/100 and 100. A KL that is not a number
        counts as too high.
        """
        if not kl <= 2 * self.target_kl:
            return max(factor / _KL_STEP, 1 / _KL_RANGE)
        if kl < self.target_kl / 2:
            return min(factor * _KL_STEP, _KL_RANGE)
        return factor


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter], ratio: float
) -> list[dict[str, Any]]:
    """One group with all parameters, or LoRA+'s two (Hayou et al., arXiv 2402.12354, section 5).

    B has `lr_ratio` times the rate of A; DoRA's magnitudes are in B's group, as in PEFT.

    Args:
        parameters: the tensors of `Policy.optimized`.
        ratio: the rate of B over that of A; 1: one group, in the parameters' order.
    """
    if ratio == 1:
        return [{"params": list(parameters.values())}]
    return [
        {"params": [parameters["lora_A"]]},
        {"params": [parameters["lora_B"]], "lr_ratio": ratio},
    ]
