"""Policy-gradient losses: pure functions of flat tensors over the C completion tokens.

Each takes `LossInputs` and returns (loss, num_clipped): the loss is a scalar
sum(weights_C * loss_C), so the mask and the step-wide denominator come in through weights_C and
nothing is divided here; num_clipped is the number of tokens whose gradient the bounds drop.
Log-probs are in nats at the sampling temperature.

Two ratios, and which loss takes which:

- `importance_sampling` and its truncated form: policy / SAMPLER, the very distribution that the
  tokens came from.
- Losses with bounds (`RATIO_TO_OLD`): the bounded ratio is policy / old, old being the policy
  itself when the step began, as the papers define it: it is 1 until the policy moves, however the
  sampler rounds and however old its version is. old / sampler is multiplied on as a weight without
  gradient, cut off at `algorithm.ratio_cap`: the decoupled objective (arXiv 2110.00641) with
  truncated importance sampling (Ionides 2008; V-trace, arXiv 1802.01561, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lora.config import AlgorithmSection


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One microbatch, seen by a loss.

    Example: LossInputs(policy_logprobs_C=tensor([-0.5]), sampler_logprobs_C=tensor([-0.7]),
    advantages_C=tensor([1.0]), weights_C=tensor([0.1]), sequence_C=tensor([0]), num_sequences=1,
    old_logprobs_C=tensor([-0.6]))
    """

    policy_logprobs_C: Tensor  # float32, nats, carries the gradient
    sampler_logprobs_C: Tensor  # float32, nats
    advantages_C: Tensor  # float32
    weights_C: Tensor  # float32, 1/denominator of the step
    sequence_C: Tensor  # int64, the token's sequence in the microbatch
    num_sequences: int
    # float32, nats, of the policy when the step began; None: it has not moved since
    old_logprobs_C: Tensor | None = None

    def log_ratio_to_old(self) -> Tensor:
        """log (policy / old) [C], with gradient; exactly 0 where the policy has not moved."""
        old_C = self.old_logprobs_C
        return self.policy_logprobs_C - (
            self.policy_logprobs_C.detach() if old_C is None else old_C
        )

    def log_ratio_of_old(self) -> Tensor:
        """log (old / sampler) [C], without gradient."""
        old_C = self.old_logprobs_C
        return (
            self.policy_logprobs_C.detach() if old_C is None else old_C
        ) - self.sampler_logprobs_C


MAX_LOG_RATIO = 20.0  # nats, of `k3`: e^20 is 5e8, and float32 gradients end at e^88

LossFn = Callable[[LossInputs, AlgorithmSection], tuple[Tensor, Tensor]]


def importance_sampling(x: LossInputs, options: AlgorithmSection) -> tuple[Tensor, Tensor]:
    """-sum w * (p_policy / p_sampler) * A, unclipped ('LoRA Without Regret', RL set-up).

    Its gradient is ratio * A * grad log p. With on-policy samples the ratio is 1, and this is
    REINFORCE.
    """
    ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).exp()
    return -(x.weights_C * ratio_C * x.advantages_C).sum(), _no_clips(ratio_C)


def truncated_importance_sampling(
    x: LossInputs, options: AlgorithmSection
) -> tuple[Tensor, Tensor]:
    """-sum w * min(ratio, cap) * A * log p, the weight without gradient.

    Truncated importance sampling (Ionides 2008, 'Truncated Importance Sampling'; in RL V-trace,
    arXiv 1802.01561, section 4.1). Below the cap its gradient is that of `importance_sampling`;
    above it the token still counts, with the capped weight: no gradient is dropped.
    """
    ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).detach().exp()
    weight_C = ratio_C.clamp(max=options.ratio_cap)
    loss = -(x.weights_C * weight_C * x.advantages_C * x.policy_logprobs_C).sum()
    return loss, _no_clips(ratio_C)


def ppo(x: LossInputs, options: AlgorithmSection) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) with DAPO's separate bounds
    (arXiv 2503.14476, equation 10): min(r A, clip(r, 1 - low, 1 + high) A), r = policy / old, times
    the truncated weight old / sampler."""
    ratio_C = x.log_ratio_to_old().exp()
    return _clipped_surrogate(x, ratio_C, x.log_ratio_of_old(), options)


def gspo(x: LossInputs, options: AlgorithmSection) -> tuple[Tensor, Tensor]:
    """GSPO (arXiv 2507.18071, equations 5-7): one ratio a sequence, the geometric mean over its
    tokens, clipped as in PPO; of the weight old / sampler the geometric mean as well.

    Needs algorithm.denominator = "sequences".
    """
    ratio_C = _sequence_means(x, x.log_ratio_to_old()).exp()
    return _clipped_surrogate(x, ratio_C, _sequence_means(x, x.log_ratio_of_old()), options)


def cispo(x: LossInputs, options: AlgorithmSection) -> tuple[Tensor, Tensor]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): the clipped ratio policy / old is a weight
    without gradient, so no token's gradient is dropped; the truncated weight old / sampler is
    another one."""
    low, high = options.clip_bounds
    weight_C = x.log_ratio_to_old().detach().exp().clamp(1 - low, 1 + high)
    weight_C = weight_C * _truncated(x.log_ratio_of_old(), options)
    loss = -(x.weights_C * weight_C * x.advantages_C * x.policy_logprobs_C).sum()
    return loss, _no_clips(weight_C)


def log_loss(x: LossInputs, options: AlgorithmSection | None = None) -> tuple[Tensor, Tensor]:
    """-sum w * log p: supervised fine-tuning; advantages and the sampler play no part."""
    return -(x.weights_C * x.policy_logprobs_C).sum(), _no_clips(x.policy_logprobs_C)


def kl_penalty(
    policy_logprobs_C: Tensor, reference_logprobs_C: Tensor, weights_C: Tensor
) -> Tensor:
    """sum w * k3 (GRPO, arXiv 2402.03300, equation 4); a float64 scalar.

    For tokens that the policy samples the value is an unbiased estimate of KL(policy || reference).
    Its gradient is not one of that KL's gradient: its mean, -E_reference[grad log p_policy], is the
    gradient of KL(reference || policy). `algorithm.kl = "reward"` follows the gradient of
    KL(policy || reference).
    """
    return (weights_C * k3(reference_logprobs_C.double() - policy_logprobs_C.double())).sum()


def k3(log_ratio_C: Tensor) -> Tensor:
    """exp(d) - d - 1 in float64: a non-negative estimate of KL(p || q) for tokens from p.

    In float32 all below 4e-9 nats would be rounding, of either sign. Above MAX_LOG_RATIO the
    exponential is replaced by its tangent there: values and gradients stay finite, and a token that
    is further off is still pulled back.

    Args:
        log_ratio_C: d = log q - log p, nats, subtracted in float64.
    """
    d_C = log_ratio_C.double()
    bounded_C = d_C.clamp(max=MAX_LOG_RATIO)
    return bounded_C.expm1() * (1 + d_C - bounded_C) - bounded_C


LOSSES: dict[str, LossFn] = {
    "importance_sampling": importance_sampling,
    "truncated_importance_sampling": truncated_importance_sampling,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
}
RATIO_TO_OLD = frozenset({"ppo", "gspo", "cispo"})  # with several updates they need old_logprobs_C


def _clipped_surrogate(
    x: LossInputs, ratio_C: Tensor, log_weight_C: Tensor, options: AlgorithmSection
) -> tuple[Tensor, Tensor]:
    low, high = options.clip_bounds
    plain_C = ratio_C * x.advantages_C
    clipped_C = ratio_C.clamp(1 - low, 1 + high) * x.advantages_C
    surrogate_C = torch.minimum(plain_C, clipped_C) * _truncated(log_weight_C, options)
    return -(x.weights_C * surrogate_C).sum(), (clipped_C < plain_C).sum()


def _truncated(log_weight_C: Tensor, options: AlgorithmSection) -> Tensor:
    return log_weight_C.exp().clamp(max=options.ratio_cap)


def _sequence_means(x: LossInputs, values_C: Tensor) -> Tensor:
    """[C]: each token's value replaced by the mean over its sequence."""
    zeros_B = values_C.new_zeros(x.num_sequences)
    total_B = zeros_B.index_add(0, x.sequence_C, values_C)
    count_B = zeros_B.index_add(0, x.sequence_C, torch.ones_like(values_C))
    return (total_B / count_B.clamp(min=1))[x.sequence_C]


def _no_clips(like_C: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=like_C.device)
