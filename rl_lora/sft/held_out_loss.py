"""The test loss: negative log-likelihood of held-out completions per token, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch

from rl_lora import distributed
from rl_lora.batches import pack_samples, to_device
from rl_lora.learner import own_share
from rl_lora.policy import Policy
from rl_lora.types import TrainSample


@torch.no_grad()
def sequence_nll(
    policy: Policy, samples: Sequence[TrainSample], microbatch_tokens: int
) -> tuple[list[float], list[int]]:
    """(nll_N in nats, num_tokens_N) of each sequence's completion, in the order of microbatches.

    A job's processes divide the microbatches; all get the whole result.
    """
    (batches,) = pack_samples(
        samples, microbatch_tokens=microbatch_tokens, num_ranks=distributed.world_size()
    )
    share = own_share(policy, batches)
    index_of = {id(batch): index for index, batch in enumerate(batches)}
    found: dict[int, tuple[list[float], list[int]]] = {}
    for batch in (*share.own, *share.idle):
        moved = to_device(batch, policy.device)
        logprobs_C, _ = policy.token_logprobs(moved, temperature=1.0)
        total_N = torch.zeros(batch.num_sequences, dtype=torch.float64)
        total_N.index_add_(0, batch.sequence_C, -logprobs_C.double().cpu())
        counts_N = torch.bincount(batch.sequence_C, minlength=batch.num_sequences)
        if (index := index_of.get(id(batch))) is not None:  # None: an idle one
            found[index] = total_N.tolist(), counts_N.tolist()
    for part in distributed.gather(found, "the test loss"):
        found |= part
    nlls = [nll for index in range(len(batches)) for nll in found[index][0]]
    counts = [count for index in range(len(batches)) for count in found[index][1]]
    return nlls, counts


def mean_with_interval(nll_N: Sequence[float], num_tokens_N: Sequence[int]) -> dict[str, float]:
    """test/nll, the sum of nats over the sum of tokens, with the 95 % interval of a ratio of sums
    over N sequences: test/nll_low, test/nll_high; and test/tokens.

    By linearization (Cochran, Sampling Techniques, section 6.5) the standard error is
    sqrt(N / (N - 1) sum (nll_i - ratio tokens_i)^2) / sum tokens; infinite for one sequence.
    """
    total, num = sum(num_tokens_N), len(nll_N)
    ratio = sum(nll_N) / total
    squares = sum(
        (nll - ratio * count) ** 2 for nll, count in zip(nll_N, num_tokens_N, strict=True)
    )
    error = math.sqrt(num / (num - 1) * squares) / total if num > 1 else math.inf
    half_width = NormalDist().inv_cdf(0.975) * error
    return {
        "test/nll": ratio,
        "test/nll_low": ratio - half_width,
        "test/nll_high": ratio + half_width,
        "test/tokens": float(total),
    }
