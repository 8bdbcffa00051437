"""Groups to microbatches: the only place that shifts tokens and makes masks and denominators.

A step's samples are split into `num_updates` optimizer batches, and each of those into microbatches
by a token budget. Where prompts are shared, a microbatch is one row without padding: each prompt
once, then all completions, which see only their prompt and themselves and whose positions continue
from the prompt's end, so that values and gradients are those of separate sequences.
Otherwise each row is a prompt with one completion; rows are sorted by length and right-padded. Each
completion token has the weight 1/denominator of its whole optimizer batch (weights_C), so that
gradient accumulation equals one big batch.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_lora import distributed
from rl_lora.nn.segments import make_layout, moved
from rl_lora.types import Microbatch, RolloutGroup, TrainSample

_ROOM = (1, 1.02, 1.05)  # microbatches are made so much larger than a rank's even share of rows


def make_samples(
    groups_N: Sequence[RolloutGroup],
    advantages_N_G: Sequence[Sequence[float]],
    *,
    skip_truncated: bool = False,
) -> list[TrainSample]:
    """One TrainSample per completion, in the groups' order; empty completions are skipped.

    skip_truncated: completions that the token limit has cut off are skipped, too: they have had
    their part in their group's advantages, and none in the denominator (DAPO's overlong filtering,
    arXiv 2503.14476, section 3.4).
    """
    return [
        TrainSample(
            prompt_ids=group.prompt.token_ids,
            completion_ids=rollout.completion.token_ids,
            sampler_logprobs_T=rollout.completion.sampler_logprobs_T,
            advantage=advantage,
            adapter_version=rollout.completion.adapter_version,
            is_sampled_T=rollout.completion.is_sampled_T,
        )
        for group, advantages_G in zip(groups_N, advantages_N_G, strict=True)
        for rollout, advantage in zip(group.rollouts_G, advantages_G, strict=True)
        if rollout.completion.token_ids and not (skip_truncated and rollout.completion.is_truncated)
    ]


# limits: one keyword each for denominator, microbatch size, updates and layout, all with defaults
def pack(
    groups_N: Sequence[RolloutGroup],
    advantages_N_G: Sequence[Sequence[float]],
    *,
    denominator: str | int = "tokens",
    microbatch_tokens: int = 4096,
    num_ranks: int = 1,
    num_updates: int = 1,
    share_prompts: bool = False,
    keep_zero_advantage: bool = False,
    skip_truncated: bool = False,
) -> list[list[Microbatch]]:
    """[num_updates][microbatches] for the learner, from scored groups; keywords as
    `make_samples` and `pack_samples`."""
    return pack_samples(
        make_samples(groups_N, advantages_N_G, skip_truncated=skip_truncated),
        denominator=denominator,
        microbatch_tokens=microbatch_tokens,
        num_ranks=num_ranks,
        num_updates=num_updates,
        share_prompts=share_prompts,
        keep_zero_advantage=keep_zero_advantage,
    )


# limits: as `pack`
def pack_samples(
    samples: Sequence[TrainSample],
    *,
    denominator: str | int = "tokens",
    microbatch_tokens: int = 4096,
    num_ranks: int = 1,
    num_updates: int = 1,
    share_prompts: bool = False,
    keep_zero_advantage: bool = False,
) -> list[list[Microbatch]]:
    """[num_updates][microbatches] for the learner; an update that no sample is left for is empty.

    Args:
        samples: sequences to learn from.
        denominator: "tokens": sampled tokens of the update; "sequences": its sequences times the
            sequence's own length, in sampled tokens; a number: its sequences times that number (Dr.
            GRPO, with the cap on a completion's tokens).
        microbatch_tokens: limit on a microbatch's size with padding; a longer sequence gets one to
            itself.
        num_ranks: processes that divide an update's microbatches, which are made such that all have
            about as many tokens.
        num_updates: optimizer steps that the samples are dealt out to, in turn.
        share_prompts: completions of one prompt share it, in one row without padding; only for a
            policy with `can_share_prompts`.
        keep_zero_advantage: keeps samples without gradient (needed for a KL loss). Otherwise they
            are skipped but still counted in the denominator; where every sample of an update is
            such a one, the shortest sequences stay, so that the sampler can still be checked.
    """
    updates = []
    for first in range(num_updates):
        chunk = list(itertools.islice(samples, first, None, num_updates))
        weight_of = _weights(chunk, denominator)
        kept = [s for s in chunk if keep_zero_advantage or s.advantage != 0]
        if chunk and not kept:
            shortest = sorted(chunk, key=lambda s: len(s.prompt_ids) + len(s.completion_ids))
            some = next(_by_budget([_Row(s.prompt_ids, [s]) for s in shortest], microbatch_tokens))
            kept = [sample for row in some for sample in row.samples]
        rows = _families(kept) if share_prompts else [_Row(s.prompt_ids, [s]) for s in kept]
        parts = _evenly(rows, microbatch_tokens, num_ranks, is_flat=share_prompts)
        updates.append([_microbatch(part, weight_of, is_flat=share_prompts) for part in parts])
    return updates


def halves(batch: Microbatch) -> list[Microbatch]:
    """Two microbatches with half of the sequences each, of the same weights; one of a single
    sequence as it is."""
    if batch.num_sequences < 2:
        return [batch]
    tokens_S = [batch.sequence_C == number for number in range(batch.num_sequences)]
    weight_of = {
        sample.num_sampled: float(batch.weights_C[tokens_C][0])
        for sample, tokens_C in zip(batch.samples_S, tokens_S, strict=True)
    }
    middle = batch.num_sequences // 2
    parts = []
    for chosen in (slice(middle), slice(middle, None)):
        samples = batch.samples_S[chosen]
        is_flat = batch.layout is not None
        rows = _families(samples) if is_flat else [_Row(s.prompt_ids, [s]) for s in samples]
        part = _microbatch(rows, weight_of, is_flat=is_flat)
        if batch.old_logprobs_C is not None:
            old_of = {
                id(sample): batch.old_logprobs_C[tokens_C.to(batch.old_logprobs_C.device)]
                for sample, tokens_C in zip(samples, tokens_S[chosen], strict=True)
            }
            part = replace(part, old_logprobs_C=torch.cat([old_of[id(s)] for s in part.samples_S]))
        parts.append(part)
    return parts


def whole_sequence(token_ids: Sequence[int]) -> Microbatch:
    """A microbatch that scores tokens 1, 2, ... of one sequence given those before."""
    zeros = (0.0,) * (len(token_ids) - 1)
    sample = TrainSample(tuple(token_ids[:1]), tuple(token_ids[1:]), zeros, 1.0, 0)
    ((batch,),) = pack_samples([sample])
    return batch


def to_device(batch: Microbatch, device: torch.device) -> Microbatch:
    """The microbatch with its tensors on the device."""
    if batch.token_ids_BT.device == device:
        return batch
    tensors: dict[str, Any] = {
        name: moved(value, device)
        for name in Microbatch.__slots__
        if isinstance(value := getattr(batch, name), Tensor)
    }
    layout = None if batch.layout is None else batch.layout.to(device)
    return replace(batch, **tensors, layout=layout)


@dataclass
class _Row:
    """A prompt and some of its completions."""

    prompt_ids: tuple[int, ...]
    samples: list[TrainSample]

    @property
    def width(self) -> int:
        return len(self.prompt_ids) + sum(len(s.completion_ids) for s in self.samples)


def _families(samples: Sequence[TrainSample]) -> list[_Row]:
    """Samples grouped by prompt, in the order in which prompts first appear."""
    families: dict[tuple[int, ...], _Row] = {}
    for sample in samples:
        families.setdefault(sample.prompt_ids, _Row(sample.prompt_ids, [])).samples.append(sample)
    return list(families.values())


def _evenly(rows: Sequence[_Row], limit: int, num_ranks: int, *, is_flat: bool) -> list[list[_Row]]:
    """Microbatches up to the limit that let all ranks finish together.

    Each rank gets as few as the limit allows, or one more. Rows rarely fill a microbatch to the
    last token, and what is left over makes another one, so that a few sizes are tried.
    """
    if num_ranks == 1 or not rows:
        return _packed(rows, limit, is_flat=is_flat)
    mean = sum(row.width for row in rows) / num_ranks
    fewest = math.ceil(mean / limit)
    numbers = (fewest, fewest + 1)
    even = [math.ceil(room * mean / number) for number in numbers for room in _ROOM]
    budgets = sorted({limit, *(min(limit, one) for one in even)})

    def largest_share(parts: list[list[_Row]]) -> tuple[float, int]:
        """Tokens, in hundredths of the mean, and microbatches."""
        sizes = [_size(part, is_flat=is_flat) for part in parts]
        shares = distributed.share(sizes, num_ranks)
        tokens = max(sum(sizes[index] for index in share) for share in shares)
        return round(tokens / mean, 2), max(map(len, shares))

    packed = (_packed(rows, budget, is_flat=is_flat) for budget in budgets)
    return min(packed, key=largest_share)


def _packed(rows: Sequence[_Row], budget: int, *, is_flat: bool) -> list[list[_Row]]:
    """Microbatches within the budget."""
    if is_flat:
        return _whole_families(rows, budget)
    return list(_by_budget(sorted(rows, key=lambda row: row.width), budget))


def _size(rows: Sequence[_Row], *, is_flat: bool) -> int:
    """Tokens of a microbatch, with padding."""
    widths = [row.width for row in rows]
    return sum(widths) if is_flat else len(widths) * max(widths)


def _whole_families(families: Sequence[_Row], budget: int) -> list[list[_Row]]:
    """Microbatches within the budget that keep families whole: each prompt is computed once.

    A family over the budget is split into pieces, with the prompt in each. Pieces are placed,
    largest first, in the first microbatch with room; microbatches are ordered largest first, so
    that workers that take them in turn finish together.
    """
    pieces = [piece for family in families for piece in _pieces(family, budget)]
    bins: list[list[_Row]] = []
    sizes: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -piece.width):
        room = next((i for i, size in enumerate(sizes) if size + piece.width <= budget), None)
        if room is None:
            bins.append([piece])
            sizes.append(piece.width)
        else:
            bins[room].append(piece)
            sizes[room] += piece.width
    return [bins[i] for i in sorted(range(len(bins)), key=lambda i: -sizes[i])]


def _pieces(family: _Row, budget: int) -> Iterator[_Row]:
    """The family in as few pieces as the budget allows, of about the same size."""
    num_prompt = len(family.prompt_ids)
    num_completion = family.width - num_prompt
    count = -(-num_completion // max(1, budget - num_prompt))
    target = num_prompt + -(-num_completion // count)
    piece, width = _Row(family.prompt_ids, []), num_prompt
    for sample in family.samples:
        length = len(sample.completion_ids)
        if piece.samples and (width >= target or width + length > budget):
            yield piece
            piece, width = _Row(family.prompt_ids, []), num_prompt
        piece.samples.append(sample)
        width += length
    yield piece


def _weights(samples: Sequence[TrainSample], denominator: str | int) -> dict[int, float]:
    """Weight of one token, by the number of sampled tokens of its completion."""
    lengths = [sample.num_sampled for sample in samples]
    if not lengths:
        return {}
    if denominator == "tokens":
        return dict.fromkeys(lengths, 1 / sum(lengths))
    if denominator == "sequences":
        return {length: 1 / (len(lengths) * length) for length in lengths}
    if isinstance(denominator, int):
        return dict.fromkeys(lengths, 1 / (len(lengths) * denominator))
    raise ValueError(f"denominator {denominator!r} is not tokens, sequences or a number")


def _by_budget(rows: Sequence[_Row], budget: int) -> Iterator[list[_Row]]:
    """Groups of consecutive rows, sorted by width, whose padded size is within the budget."""
    together: list[_Row] = []
    for row in rows:
        if together and (len(together) + 1) * row.width > budget:
            yield together
            together = []
        together.append(row)
    if together:
        yield together


def _microbatch(rows: Sequence[_Row], weight_of: dict[int, float], *, is_flat: bool) -> Microbatch:
    """Rows in one, all prompts before all completions (flat), or stacked with padding."""
    num_tokens = sum(row.width for row in rows)
    shape = (1, num_tokens) if is_flat else (len(rows), max(row.width for row in rows))
    token_ids_BT = torch.zeros(shape, dtype=torch.int64)
    position_BT = torch.zeros(shape, dtype=torch.int64)
    places_S = []
    prompt_lengths = [len(family.prompt_ids) for family in rows]
    first, start = 0, sum(prompt_lengths)  # of a prompt and a completion in the flat row
    for index, (family, num_prompt) in enumerate(zip(rows, prompt_lengths, strict=True)):
        row = 0 if is_flat else index
        if not is_flat:
            first, start = 0, num_prompt
        prompt_end = first + num_prompt
        token_ids_BT[row, first:prompt_end] = _numbers("q", family.prompt_ids)
        position_BT[row, first:prompt_end] = torch.arange(num_prompt)
        for sample in family.samples:
            count = len(sample.completion_ids)
            end = start + count
            token_ids_BT[row, start:end] = _numbers("q", sample.completion_ids)
            position_BT[row, start:end] = torch.arange(num_prompt, num_prompt + count)
            places_S.append(_Place(row, prompt_end - 1, start))
            start = end
        first = prompt_end
    samples_S = [sample for family in rows for sample in family.samples]
    completion_lengths = [[len(s.completion_ids) for s in family.samples] for family in rows]
    return Microbatch(
        token_ids_BT=token_ids_BT,
        position_BT=position_BT if is_flat else None,
        layout=make_layout(prompt_lengths, completion_lengths) if is_flat else None,
        **_scored(samples_S, places_S, [weight_of[s.num_sampled] for s in samples_S], token_ids_BT),
        samples_S=tuple(samples_S),
        num_tokens=num_tokens,
    )


class _Place(NamedTuple):
    """Where a completion is."""

    row: int
    before: int  # the column of its prompt's last token
    first: int  # its own first column


def _scored(
    samples_S: Sequence[TrainSample],
    places_S: Sequence[_Place],
    weights_S: Sequence[float],
    token_ids_BT: Tensor,
) -> dict[str, Tensor]:
    """The fields of a microbatch with one entry per completion token that was sampled."""
    column_S, target_S, logprobs = [], [], array("d")
    for sample, place in zip(samples_S, places_S, strict=True):
        end = place.first + len(sample.completion_ids)
        column_T = torch.arange(place.first - 1, end - 1)  # one before the token's own
        column_T[:1] = place.before
        target_T = token_ids_BT[place.row, place.first : end]
        logprobs_T: Iterable[float] = sample.sampler_logprobs_T
        if sample.is_sampled_T:
            is_sampled_T = torch.tensor(sample.is_sampled_T)
            column_T, target_T = column_T[is_sampled_T], target_T[is_sampled_T]
            logprobs_T = itertools.compress(logprobs_T, sample.is_sampled_T)
        column_S.append(column_T)
        target_S.append(target_T)
        logprobs.extend(logprobs_T)

    def each(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        counted = zip(values, map(len, target_S), strict=True)
        return torch.cat([torch.full((count,), value, dtype=dtype) for value, count in counted])

    return {
        "row_C": each([place.row for place in places_S], torch.int64),
        "column_C": torch.cat(column_S),
        "target_ids_C": torch.cat(target_S),
        "sampler_logprobs_C": _numbers("d", logprobs).float(),
        "advantages_C": each([sample.advantage for sample in samples_S], torch.float32),
        "weights_C": each(weights_S, torch.float32),
        "sequence_C": each(range(len(samples_S)), torch.int64),
    }


def _numbers(code: str, values: Sequence[float]) -> Tensor:
    """Python's numbers as int64 ("q") or float64 ("d"); `torch.tensor` takes ten times as long."""
    dtype = {"q": torch.int64, "d": torch.float64}[code]
    if not values:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(array(code, values), dtype=dtype)
