"""Losses that bound how far one step moves the policy: PPO, GSPO, CISPO, SAPO, DPPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from rl_lora.losses.inputs import Floor, Level, LossInputs, LowerBound, needs

if TYPE_CHECKING:
    from torch import Tensor


@needs(old_logprobs=True)
def ppo(
    x: LossInputs,
    *,
    clip_low: LowerBound = 0.2,
    clip_high: PositiveFloat = 0.28,
    ratio_cap: PositiveFloat = 2.0,
    ratio_floor: Floor = 0.0,
    ratio_level: Level = "token",
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) with DAPO's separate bounds
    (arXiv 2503.14476, equation 10): min(r A, clip(r, 1 - low, 1 + high) A), r = policy / old, times
    the truncated weight old / sampler. The default bounds are DAPO's."""
    weight_C = _sampler_weight(x, ratio_level, ratio_floor, ratio_cap)
    return _clipped_surrogate(x, x.log_ratio_to_old().exp(), weight_C, clip_low, clip_high)


@needs(old_logprobs=True, denominator="sequences")
def gspo(
    x: LossInputs,
    *,
    clip_low: LowerBound = 3e-4,
    clip_high: PositiveFloat = 4e-4,
    ratio_cap: PositiveFloat = 2.0,
    ratio_floor: Floor = 0.0,
    ratio_level: Level = "geometric",
) -> tuple[Tensor, Tensor]:
    """GSPO (arXiv 2507.18071, equations 5-7): one ratio a sequence, the geometric mean over its
    tokens, clipped as in PPO; the weight old / sampler is the sequence's geometric mean as well.
    The default bounds are the paper's (section 5.1)."""
    ratio_C = x.at_level(x.log_ratio_to_old(), "geometric").exp()
    weight_C = _sampler_weight(x, ratio_level, ratio_floor, ratio_cap)
    return _clipped_surrogate(x, ratio_C, weight_C, clip_low, clip_high)


@needs(old_logprobs=True)
def cispo(
    x: LossInputs,
    *,
    clip_low: LowerBound = 1.0,
    clip_high: PositiveFloat = 0.28,
    ratio_cap: PositiveFloat = 2.0,
    ratio_floor: Floor = 0.0,
    ratio_level: Level = "token",
) -> tuple[Tensor, int]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): the clipped ratio policy / old is a weight
    without gradient, so no token's gradient is dropped; it is multiplied by the truncated weight
    old / sampler.

    The paper (section 3.1) has no lower bound and tunes the upper one without giving its value:
    0.28 is DAPO's for PPO, and our choice here.
    """
    weight_C = x.log_ratio_to_old().detach().exp().clamp(1 - clip_low, 1 + clip_high)
    weight_C = weight_C * _sampler_weight(x, ratio_level, ratio_floor, ratio_cap)
    return -(x.weights_C * weight_C * x.advantages_C * x.policy_logprobs_C).sum(), 0


@needs(old_logprobs=True)
def sapo(
    x: LossInputs,
    *,
    tau_positive: PositiveFloat = 1.0,
    tau_negative: PositiveFloat = 1.05,
    ratio_cap: PositiveFloat = 2.0,
    ratio_floor: Floor = 0.0,
    ratio_level: Level = "token",
) -> tuple[Tensor, int]:
    """SAPO (arXiv 2511.20347, equations 5-6): a soft gate instead of bounds, (4 / tau) *
    sigmoid(tau (r - 1)) * A with r = policy / old, times the truncated weight old / sampler.

    Its gradient is r A grad log p, times 1 at r = 1 and less the further r is from it: 4 s (1 - s),
    s being the sigmoid. tau is another one for tokens whose advantage is not positive, which push
    up all other tokens; the default temperatures are the paper's.
    """
    tau_C = x.advantages_C.new_full(x.advantages_C.shape, tau_negative)
    tau_C = tau_C.masked_fill(x.advantages_C > 0, tau_positive)
    gate_C = (tau_C * (x.log_ratio_to_old().exp() - 1)).sigmoid() * 4 / tau_C
    weight_C = _sampler_weight(x, ratio_level, ratio_floor, ratio_cap)
    return -(x.weights_C * weight_C * gate_C * x.advantages_C).sum(), 0


def dppo_tv(x: LossInputs, *, max_divergence: PositiveFloat = 0.15) -> tuple[Tensor, Tensor]:
    """DPPO with the binary total variation |p_policy - p_sampler| (arXiv 2602.04879).

    -sum w * r * A with r = policy / sampler, without the tokens that have moved further than
    `max_divergence` from the sampler in the direction that A pushes to. The bound is on
    probabilities: a rare token may move by a large ratio, a frequent one by little. It is on the
    distance to the sampler and not to the old policy, so that it bounds the mismatch as well. The
    default is the threshold of the authors' recipe.
    """
    policy_C, sampler_C = x.policy_logprobs_C.detach().exp(), x.sampler_logprobs_C.exp()
    return _without_far(x, (policy_C - sampler_C).abs() > max_divergence)


def dppo_kl(x: LossInputs, *, max_divergence: PositiveFloat = 0.05) -> tuple[Tensor, Tensor]:
    """DPPO with the binary KL(sampler || policy) of 'this token or another', in nats; otherwise as
    `dppo_tv`."""
    policy_C, sampler_C = x.policy_logprobs_C.detach(), x.sampler_logprobs_C
    chance_C = sampler_C.exp()
    others_C = _log_of_others(sampler_C) - _log_of_others(policy_C)
    divergence_C = chance_C * (sampler_C - policy_C) + (1 - chance_C) * others_C
    return _without_far(x, divergence_C > max_divergence)


def _sampler_weight(x: LossInputs, level: Level, floor: float, cap: float) -> Tensor:
    """The truncated weight old / sampler [C], without gradient."""
    return x.at_level(x.log_ratio_of_old(), level).exp().clamp(floor, cap)


def _clipped_surrogate(
    x: LossInputs, ratio_C: Tensor, weight_C: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    plain_C = ratio_C * x.advantages_C
    clipped_C = ratio_C.clamp(1 - low, 1 + high) * x.advantages_C
    surrogate_C = plain_C.minimum(clipped_C) * weight_C
    return -(x.weights_C * surrogate_C).sum(), (clipped_C < plain_C).sum()


def _without_far(x: LossInputs, is_far_C: Tensor) -> tuple[Tensor, Tensor]:
    """Importance sampling without the tokens that are far off where the advantage pushes to."""
    log_ratio_C = x.policy_logprobs_C - x.sampler_logprobs_C
    is_dropped_C = is_far_C & (log_ratio_C.detach() * x.advantages_C > 0)
    surrogate_C = (log_ratio_C.exp() * x.advantages_C).masked_fill(is_dropped_C, 0.0)
    return -(x.weights_C * surrogate_C).sum(), is_dropped_C.sum()


def _log_of_others(logprobs_C: Tensor) -> Tensor:
    """log (1 - p) of log p, finite where p rounds to 1."""
    return (-logprobs_C.expm1()).clamp(min=2.0**-24).log()
