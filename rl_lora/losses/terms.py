"""Terms that are added to a loss: KL to the base, entropy. Pure functions of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from rl_lora.losses.inputs import LossInputs

MAX_LOG_RATIO = 20.0  # nats, of `k3`: e^20 is 5e8, and float32 gradients end at e^88
Estimator = Literal["k2", "k3"]


def kl_penalty(
    policy_logprobs_C: Tensor,
    reference_logprobs_C: Tensor,
    weights_C: Tensor,
    estimator: Estimator = "k3",
) -> Tensor:
    """sum w * k3 (GRPO, arXiv 2402.03300, equation 4), or sum w * k2; a float64 scalar.

    Of k3, for tokens that the policy samples, the value is an unbiased estimate of
    KL(policy || reference). Its gradient is not one of that KL's gradient: its mean,
    -E_reference[grad log p_policy], is the gradient of KL(reference || policy).

    k2 = (log p_policy - log p_reference)^2 / 2 is the reverse: its value is biased, and its
    gradient's mean is the gradient of KL(policy || reference) (Tang & Munos, arXiv 2506.09477).
    `algorithm.kl = "reward"` follows that gradient as well, over the whole sequence. k1, the plain
    log-ratio, has no place here: the mean of its gradient is zero.
    """
    log_ratio_C = reference_logprobs_C.double() - policy_logprobs_C.double()
    values_C = k3(log_ratio_C) if estimator == "k3" else log_ratio_C.square() / 2
    return (weights_C * values_C).sum()


def k3(log_ratio_C: Tensor) -> Tensor:
    """exp(d) - d - 1 in float64: a non-negative estimate of KL(p || q) for tokens from p.

    In float32 everything below 4e-9 nats would be rounding noise of either sign. Above
    MAX_LOG_RATIO the exponential is replaced by its tangent there: values and gradients stay
    finite, and a token that is further off is still pulled back.

    Args:
        log_ratio_C: d = log q - log p, nats, subtracted in float64.
    """
    d_C = log_ratio_C.double()
    bounded_C = d_C.clamp(max=MAX_LOG_RATIO)
    return bounded_C.expm1() * (1 + d_C - bounded_C) - bounded_C


def entropy_bonus(x: LossInputs, entropy_C: Tensor) -> Tensor:
    """A scalar whose gradient is, in the mean over sampled tokens, that of sum w * entropy.

    sum w * sg(r (-log p - entropy)) * log p with r = policy / sampler: the likelihood-ratio form of
    the gradient of -E[log p], the entropy itself its baseline, so that the entropy needs no
    gradient through the vocabulary. Only the tokens' own entropies count, not those that an earlier
    token leads to (A3C, arXiv 1602.01783, section 4; PPO, arXiv 1707.06347, equation 9).

    Args:
        x: the microbatch.
        entropy_C: of the policy at each token, nats, without gradient.
    """
    policy_C = x.policy_logprobs_C
    surprise_C = -policy_C.detach() - entropy_C
    ratio_C = (policy_C.detach() - x.sampler_logprobs_C).exp()
    return (x.weights_C * ratio_C * surprise_C * policy_C).sum()
