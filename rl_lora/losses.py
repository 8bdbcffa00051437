"""Policy-gradient losses: pure functions of flat tensors over the C completion tokens.

Each takes policy_logprobs_C (with gradient), sampler_logprobs_C, advantages_C and weights_C, all
float32 [C], and returns (loss, num_clipped): the loss is a scalar sum(weights_C * loss_C), so the
mask and the step-wide denominator come in through weights_C and nothing is divided here;
num_clipped is the number of tokens whose ratio lies outside the bounds. Log-probs are in nats at
the sampling temperature. The ratio is taken against the SAMPLER's log-probs: those of the very
distribution that the tokens came from.
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
    advantages_C=tensor([1.0]), weights_C=tensor([0.1]), sequence_C=tensor([0]), num_sequences=1)
    """

    policy_logprobs_C: Tensor  # float32, nats, carries the gradient
    sampler_logprobs_C: Tensor  # float32, nats
    advantages_C: Tensor  # float32
    weights_C: Tensor  # float32, 1/denominator of the step
    sequence_C: Tensor  # int64, the token's sequence in the microbatch
    num_sequences: int


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
    above it the token still counts, with the capped weight.
    """
    ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).detach().exp()
    weight_C = ratio_C.clamp(max=options.ratio_cap)
    loss = -(x.weights_C * weight_C * x.advantages_C * x.policy_logprobs_C).sum()
    return loss, (ratio_C > options.ratio_cap).sum()


def ppo(x: LossInputs, options: AlgorithmSection) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) with DAPO's separate bounds
    (arXiv 2503.14476, equation 10): min(r A, clip(r, 1 - low, 1 + high) A)."""
    ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).exp()
    return _clipped_surrogate(x, ratio_C, *options.clip_bounds)


def gspo(x: LossInputs, options: AlgorithmSection) -> tuple[Tensor, Tensor]:
    """GSPO (arXiv 2507.18071, equations 5-7): one ratio a sequence, the geometric mean over its
    tokens, clipped as in PPO. Needs algorithm.denominator = "sequences"."""
    log_ratio_C = x.policy_logprobs_C - x.sampler_logprobs_C
    zeros_B = log_ratio_C.new_zeros(x.num_sequences)
    total_B = zeros_B.index_add(0, x.sequence_C, log_ratio_C)
    count_B = zeros_B.index_add(0, x.sequence_C, torch.ones_like(log_ratio_C))
    ratio_B = (total_B / count_B.clamp(min=1)).exp()
    return _clipped_surrogate(x, ratio_B[x.sequence_C], *options.clip_bounds)


def cispo(x: LossInputs, options: AlgorithmSection) -> tuple[Tensor, Tensor]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): the clipped ratio is a weight without
    gradient, so no token's gradient is dropped."""
    low, high = options.clip_bounds
    ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).detach().exp()
    weight_C = ratio_C.clamp(1 - low, 1 + high)
    loss = -(x.weights_C * weight_C * x.advantages_C * x.policy_logprobs_C).sum()
    return loss, (weight_C != ratio_C).sum()


def log_loss(x: LossInputs, options: AlgorithmSection | None = None) -> tuple[Tensor, Tensor]:
    """-sum w * log p: supervised fine-tuning; advantages and the sampler play no part."""
    return -(x.weights_C * x.policy_logprobs_C).sum(), _no_clips(x.policy_logprobs_C)


def kl_penalty(
    policy_logprobs_C: Tensor, reference_logprobs_C: Tensor, weights_C: Tensor
) -> Tensor:
    """sum w * k3: the unbiased, non-negative estimate exp(d) - d - 1 of KL(policy || reference)
    with d = log p_reference - log p_policy (GRPO, arXiv 2402.03300, equation 4)."""
    difference_C = reference_logprobs_C - policy_logprobs_C
    return (weights_C * (difference_C.exp() - difference_C - 1)).sum()


LOSSES: dict[str, LossFn] = {
    "importance_sampling": importance_sampling,
    "truncated_importance_sampling": truncated_importance_sampling,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
}


def _clipped_surrogate(
    x: LossInputs, ratio_C: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    clipped_C = ratio_C.clamp(1 - low, 1 + high)
    surrogate_C = torch.minimum(ratio_C * x.advantages_C, clipped_C * x.advantages_C)
    return -(x.weights_C * surrogate_C).sum(), (clipped_C != ratio_C).sum()


def _no_clips(like_C: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=like_C.device)
