"""Groups to microbatches: the only place that shifts tokens and makes masks and denominators.

A step's samples are split into `num_updates` optimizer batches, each into microbatches: sequences
sorted by length and right-padded, so that plain causal attention needs no mask (padding follows the
real tokens) and little of it is computed. Each completion token carries weights_C = 1/denominator of
its whole optimizer batch, so gradient accumulation equals one big batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from rl_lora.types import Microbatch, RolloutGroup, TrainSample


def make_samples(
    groups_N: Sequence[RolloutGroup], advantages_N_G: Sequence[Sequence[float]]
) -> list[TrainSample]:
    """One TrainSample a completion, in the groups' order; empty completions are left out."""
    return [
        TrainSample(
            prompt_ids=group.prompt.token_ids,
            completion_ids=rollout.completion.token_ids,
            sampler_logprobs_T=rollout.completion.sampler_logprobs_T,
            advantage=advantage,
            adapter_version=rollout.completion.adapter_version,
        )
        for group, advantages_G in zip(groups_N, advantages_N_G, strict=True)
        for rollout, advantage in zip(group.rollouts_G, advantages_G, strict=True)
        if rollout.completion.token_ids
    ]


def pack(
    samples: Sequence[TrainSample],
    *,
    denominator: str,
    max_tokens: int,
    microbatch_tokens: int,
    num_updates: int = 1,
    keep_zero_advantage: bool = False,
) -> list[list[Microbatch]]:
    """[num_updates][microbatches] for the learner.

    Args:
        denominator: "tokens": completion tokens of the update; "sequences": its sequences times the
            sequence's own length; "max_tokens": its sequences times max_tokens (Dr. GRPO).
        microbatch_tokens: bound on a microbatch's padded size; a longer sequence goes alone.
        keep_zero_advantage: keeps samples without gradient (needed for a KL loss). Without it they
            are skipped, still counted in the denominator; where every sample of an update is such a
            one, the shortest sequences stay, so that the sampler can still be checked.
    """
    updates = []
    for chunk in _split(samples, num_updates):
        weight_of = _weights(chunk, denominator, max_tokens)
        kept = [s for s in chunk if keep_zero_advantage or s.advantage != 0]
        kept.sort(key=_length)
        if not kept:
            kept = next(_by_budget(sorted(chunk, key=_length), microbatch_tokens), [])
        updates.append(
            [_microbatch(rows, weight_of) for rows in _by_budget(kept, microbatch_tokens)]
        )
    return updates


def _length(sample: TrainSample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)


def _split(samples: Sequence[TrainSample], num_updates: int) -> Iterator[list[TrainSample]]:
    """Round-robin, so that every update sees samples of every group."""
    for first in range(min(num_updates, len(samples))):
        yield list(itertools.islice(samples, first, None, num_updates))


def _weights(samples: Sequence[TrainSample], denominator: str, max_tokens: int) -> dict[int, float]:
    """Weight of one token, by the length of its completion."""
    lengths = [len(sample.completion_ids) for sample in samples]
    if denominator == "tokens":
        return dict.fromkeys(lengths, 1 / sum(lengths))
    if denominator == "sequences":
        return {length: 1 / (len(lengths) * length) for length in lengths}
    if denominator == "max_tokens":
        return dict.fromkeys(lengths, 1 / (len(lengths) * max_tokens))
    raise ValueError(f"denominator {denominator!r} is none of tokens, sequences, max_tokens")


def _by_budget(samples: Sequence[TrainSample], budget: int) -> Iterator[list[TrainSample]]:
    """Consecutive runs of length-sorted samples whose padded size keeps within the budget."""
    rows: list[TrainSample] = []
    for sample in samples:
        if rows and (len(rows) + 1) * _length(sample) > budget:
            yield rows
            rows = []
        rows.append(sample)
    if rows:
        yield rows


def _microbatch(rows: Sequence[TrainSample], weight_of: dict[int, float]) -> Microbatch:
    width = max(map(_length, rows))
    token_ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    row, column, target, sampler, advantage, weight = [], [], [], [], [], []
    for index, sample in enumerate(rows):
        ids = sample.prompt_ids + sample.completion_ids
        token_ids_BT[index, : len(ids)] = torch.tensor(ids)
        count = len(sample.completion_ids)
        row += [index] * count
        column += range(len(sample.prompt_ids) - 1, len(ids) - 1)  # one before the token's own
        target += sample.completion_ids
        sampler += sample.sampler_logprobs_T
        advantage += [sample.advantage] * count
        weight += [weight_of[count]] * count
    return Microbatch(
        token_ids_BT=token_ids_BT,
        row_C=torch.tensor(row),
        column_C=torch.tensor(column),
        target_ids_C=torch.tensor(target),
        sampler_logprobs_C=torch.tensor(sampler, dtype=torch.float32),
        advantages_C=torch.tensor(advantage, dtype=torch.float32),
        weights_C=torch.tensor(weight, dtype=torch.float32),
        num_sequences=len(rows),
        num_tokens=sum(map(_length, rows)),
    )
