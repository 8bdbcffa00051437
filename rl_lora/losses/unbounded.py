"""Losses that follow the policy gradient from wherever the tokens came from: no bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from rl_lora.losses.inputs import Floor, Level, LossInputs

if TYPE_CHECKING:
    from torch import Tensor


def importance_sampling(x: LossInputs) -> tuple[Tensor, int]:
    """-sum w * (p_policy / p_sampler) * A, unclipped ('LoRA Without Regret', RL set-up).

    Its gradient is ratio * A * grad log p. With on-policy samples the ratio is 1, and this is
    REINFORCE.
    """
    ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).exp()
    return -(x.weights_C * ratio_C * x.advantages_C).sum(), 0


def truncated_importance_sampling(
    x: LossInputs,
    *,
    ratio_cap: PositiveFloat = 2.0,
    ratio_floor: Floor = 0.0,
    ratio_level: Level = "token",
) -> tuple[Tensor, int]:
    """-sum w * min(ratio, cap) * A * log p, the weight without gradient.

    Truncated importance sampling (Ionides 2008, 'Truncated Importance Sampling'; in RL V-trace,
    arXiv 1802.01561, section 4.1). Between floor and cap its gradient is that of
    `importance_sampling`; outside the token still counts, with the bound as its weight: no gradient
    is dropped. The ratio is the token's own, its sequence's, or the geometric mean of the
    sequence's.
    """
    log_ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).detach()
    weight_C = x.at_level(log_ratio_C, ratio_level).exp().clamp(ratio_floor, ratio_cap)
    return -(x.weights_C * weight_C * x.advantages_C * x.policy_logprobs_C).sum(), 0


def log_loss(x: LossInputs) -> tuple[Tensor, int]:
    """-sum w * log p, for supervised fine-tuning; advantages and sampler log-probs are unused."""
    return -(x.weights_C * x.policy_logprobs_C).sum(), 0
