"""The test loss: negative log-likelihood a token of held-out completions, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from rl_lora.batches import pack_samples, to_device
from rl_lora.policy import Policy
from rl_lora.types import TrainSample


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """Mean negative log-likelihood, in nats per token.

    Example: HeldOutLoss(nll=1.62, low=1.55, high=1.69, num_tokens=9120)
    """

    nll: float
    low: float  # 95 % interval, sequences being the sampling unit
    high: float
    num_tokens: int

    def metrics(self) -> dict[str, float]:
        """As in a line of metrics.jsonl."""
        return {
            "test/nll": self.nll,
            "test/nll_low": self.low,
            "test/nll_high": self.high,
            "test/tokens": float(self.num_tokens),
        }


@torch.no_grad()
def sequence_nll(
    policy: Policy, samples: Sequence[TrainSample], microbatch_tokens: int
) -> tuple[list[float], list[int]]:
    """(nll_N in nats, num_tokens_N) of each sequence's completion, in the order of microbatches."""
    nlls: list[float] = []
    counts: list[int] = []
    (batches,) = pack_samples(samples, microbatch_tokens=microbatch_tokens)
    for batch in batches:
        moved = to_device(batch, policy.device)
        logprobs_C, _ = policy.token_logprobs(moved, temperature=1.0)
        total_N = torch.zeros(batch.num_sequences, dtype=torch.float64)
        total_N.index_add_(0, batch.sequence_C, -logprobs_C.double().cpu())
        nlls += total_N.tolist()
        counts += torch.bincount(batch.sequence_C, minlength=batch.num_sequences).tolist()
    return nlls, counts


def mean_with_interval(
    nll_N: Sequence[float], num_tokens_N: Sequence[int], confidence: float = 0.95
) -> HeldOutLoss:
    """Sum of nats over sum of tokens, with the interval of a ratio of sums over N sequences.

    By linearization (Cochran, Sampling Techniques, section 6.5) the standard error is
    sqrt(N / (N - 1) sum (nll_i - ratio tokens_i)^2) / sum tokens; infinite for one sequence.

    Raises:
        ValueError: no tokens.
    """
    total, num = sum(num_tokens_N), len(nll_N)
    if total == 0:
        raise ValueError("no tokens to take the mean over")
    ratio = sum(nll_N) / total
    squares = sum(
        (nll - ratio * count) ** 2 for nll, count in zip(nll_N, num_tokens_N, strict=True)
    )
    error = math.sqrt(num / (num - 1) * squares) / total if num > 1 else math.inf
    half_width = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return HeldOutLoss(ratio, ratio - half_width, ratio + half_width, total)


def held_out_loss(
    policy: Policy, samples: Sequence[TrainSample], microbatch_tokens: int
) -> HeldOutLoss:
    """The policy's loss on held-out sequences."""
    return mean_with_interval(*sequence_nll(policy, samples, microbatch_tokens))
