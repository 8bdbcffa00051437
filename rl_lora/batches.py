"""Groups to microbatches: the only place that shifts tokens and makes masks and denominators.

A step's samples are split into `num_updates` optimizer batches, each into microbatches of rows. A
row is a prompt with one or more of its completions: the prompt is computed once for all of them,
each completion sees the prompt and itself alone, and its positions go on from the prompt's end, so
values and gradients are those of separate sequences. Rows are sorted by length and right-padded, so
that little padding is computed; where every row holds one completion, plain causal attention needs
no mask. Each completion token carries weights_C = 1/denominator of its whole optimizer batch, so
gradient accumulation equals one big batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

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
    row_tokens: int = 0,
    keep_zero_advantage: bool = False,
) -> list[list[Microbatch]]:
    """[num_updates][microbatches] for the learner.

    Args:
        denominator: "tokens": completion tokens of the update; "sequences": its sequences times the
            sequence's own length; "max_tokens": its sequences times max_tokens (Dr. GRPO).
        microbatch_tokens: bound on a microbatch's padded size; a longer sequence goes alone.
        row_tokens: bound on a row that holds several completions of one prompt; 0: one a row.
        keep_zero_advantage: keeps samples without gradient (needed for a KL loss). Without it they
            are skipped, still counted in the denominator; where every sample of an update is such a
            one, the shortest sequences stay, so that the sampler can still be checked.
    """
    updates = []
    for chunk in _split(samples, num_updates):
        weight_of = _weights(chunk, denominator, max_tokens)
        kept = [s for s in chunk if keep_zero_advantage or s.advantage != 0]
        if not kept:
            shortest = sorted(chunk, key=lambda s: len(s.prompt_ids) + len(s.completion_ids))
            some = next(_by_budget([_Row(s.prompt_ids, [s]) for s in shortest], microbatch_tokens))
            kept = [sample for row in some for sample in row.samples]
        rows = sorted(_rows(kept, row_tokens), key=lambda row: row.width)
        updates.append([_microbatch(r, weight_of) for r in _by_budget(rows, microbatch_tokens)])
    return updates


def whole_sequence(token_ids: Sequence[int]) -> Microbatch:
    """A microbatch that scores tokens 1, 2, ... of one sequence given those before."""
    zeros = (0.0,) * (len(token_ids) - 1)
    sample = TrainSample(tuple(token_ids[:1]), tuple(token_ids[1:]), zeros, 1.0, 0)
    ((batch,),) = pack([sample], denominator="tokens", max_tokens=1, microbatch_tokens=1)
    return batch


@dataclass
class _Row:
    """A prompt and the completions that share it."""

    prompt_ids: tuple[int, ...]
    samples: list[TrainSample]

    @property
    def width(self) -> int:
        return len(self.prompt_ids) + sum(len(s.completion_ids) for s in self.samples)


def _rows(samples: Sequence[TrainSample], row_tokens: int) -> list[_Row]:
    """Samples of equal prompts together, as many a row as fit row_tokens."""
    rows: list[_Row] = []
    open_rows: dict[tuple[int, ...], _Row] = {}
    for sample in samples:
        row = open_rows.get(sample.prompt_ids)
        if row is None or row.width + len(sample.completion_ids) > row_tokens:
            row = open_rows[sample.prompt_ids] = _Row(sample.prompt_ids, [])
            rows.append(row)
        row.samples.append(sample)
    return rows


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


def _by_budget(rows: Sequence[_Row], budget: int) -> Iterator[list[_Row]]:
    """Consecutive runs of rows, sorted by width, whose padded size keeps within the budget."""
    together: list[_Row] = []
    for row in rows:
        if together and (len(together) + 1) * row.width > budget:
            yield together
            together = []
        together.append(row)
    if together:
        yield together


def _microbatch(rows: Sequence[_Row], weight_of: dict[int, float]) -> Microbatch:
    width = max(row.width for row in rows)
    token_ids_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    position_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    segment_BT = torch.full(
        (len(rows), width), -1
    )  # 0: prompt; 1, 2, ...: completions; -1: padding
    row: list[int] = []
    column: list[int] = []
    target: list[int] = []
    sequence: list[int] = []
    sampler: list[float] = []
    advantage: list[float] = []
    weight: list[float] = []
    num_sequences = 0
    for index, packed in enumerate(rows):
        num_prompt = len(packed.prompt_ids)
        token_ids_BT[index, :num_prompt] = torch.tensor(packed.prompt_ids)
        position_BT[index, :num_prompt] = torch.arange(num_prompt)
        segment_BT[index, :num_prompt] = 0
        start = num_prompt
        for segment, sample in enumerate(packed.samples, start=1):
            count = len(sample.completion_ids)
            end = start + count
            token_ids_BT[index, start:end] = torch.tensor(sample.completion_ids)
            position_BT[index, start:end] = torch.arange(num_prompt, num_prompt + count)
            segment_BT[index, start:end] = segment
            row += [index] * count
            column += [num_prompt - 1, *range(start, end - 1)]  # one before the token's own
            target += sample.completion_ids
            sampler += sample.sampler_logprobs_T
            advantage += [sample.advantage] * count
            weight += [weight_of[count]] * count
            sequence += [num_sequences] * count
            num_sequences += 1
            start = end
    is_shared = num_sequences > len(rows)
    return Microbatch(
        token_ids_BT=token_ids_BT,
        position_BT=position_BT if is_shared else None,
        mask_B1TT=_shared_prompt_mask(segment_BT) if is_shared else None,
        row_C=torch.tensor(row),
        column_C=torch.tensor(column),
        target_ids_C=torch.tensor(target),
        sampler_logprobs_C=torch.tensor(sampler, dtype=torch.float32),
        advantages_C=torch.tensor(advantage, dtype=torch.float32),
        weights_C=torch.tensor(weight, dtype=torch.float32),
        sequence_C=torch.tensor(sequence),
        num_sequences=num_sequences,
        num_tokens=sum(packed.width for packed in rows),
    )


def _shared_prompt_mask(segment_BT: torch.Tensor) -> torch.Tensor:
    """bool [B, 1, T, T]: position t may look at s: earlier or equal, of the prompt or its own
    completion. Padding looks at the prompt, so that no row of the softmax is empty."""
    width = segment_BT.shape[1]
    causal_TT = torch.ones(width, width, dtype=torch.bool).tril()
    query_BT1, key_B1T = segment_BT.unsqueeze(2), segment_BT.unsqueeze(1)
    return (causal_TT & ((key_B1T == 0) | (key_B1T == query_BT1))).unsqueeze(1)
