"""How a row of prompts and completions attends: by segments.

All prompts come first in the row, then all completions, those of a prompt together and in the order
of the prompts. Each of these segments attends causally to itself, and a completion also to the
whole of its prompt. So what a kernel needs are the places where segments begin: one call attends
within the segments, another one from each prompt's completions, taken together, to the prompt.

Where there is no such kernel, the queries of segments of similar length, with the keys that each
sees, make small padded blocks (`make_buckets`), so that little more than the needed products is
computed; a mask over the whole row would compute them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

_WASTE = 1.3  # largest ratio of a bucket's padded block to what is needed


class Sizes(NamedTuple):
    """Numbers of tokens, known without waiting for a GPU."""

    prompts: int  # of all prompts together, and so where the completions begin
    longest_segment: int
    longest_prompt: int
    largest_family: int  # all completions of one prompt


class AttentionLayout(NamedTuple):
    """A row of S segments, N of which are prompts; every prompt has a completion.

    Example: prompts of 2 and 1 tokens, the first with completions of 2 and 1, the second with one
    of 3: AttentionLayout(starts_S=[0, 2, 3, 5, 6, 9], families_N=[0, 3, 6], sizes=(3, 3, 2, 3))
    """

    starts_S: Tensor  # int32 [S + 1], where segments begin in the row, and the row's end
    # int32 [N + 1], where each prompt's completions begin among completion tokens, and their end
    families_N: Tensor
    sizes: Sizes

    def to(self, device: torch.device) -> AttentionLayout:
        """The layout with its tensors on the device."""
        starts_S, families_N, sizes = self
        return AttentionLayout(moved(starts_S, device), moved(families_N, device), sizes)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; the host does not wait for a copy to a GPU, from pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def make_layout(
    prompt_lengths_N: Sequence[int], completion_lengths_N_G: Sequence[Sequence[int]]
) -> AttentionLayout:
    """The layout of a row, from the lengths (at least 1) of prompts and their completions."""
    lengths_S = [*prompt_lengths_N, *(n for group in completion_lengths_N_G for n in group)]
    families = [sum(group) for group in completion_lengths_N_G]
    starts_S = torch.tensor([0, *accumulate(lengths_S)], dtype=torch.int32)
    families_N = torch.tensor([0, *accumulate(families)], dtype=torch.int32)
    sizes = Sizes(sum(prompt_lengths_N), max(lengths_S), max(prompt_lengths_N), max(families))
    return AttentionLayout(starts_S, families_N, sizes)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, start + length) of the row, after prefix_length tokens at prefix_start.

    Example: Segment(start=10, length=4, prefix_start=0, prefix_length=10)
    """

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True, slots=True)
class Bucket:
    """S segments as padded blocks of Q queries and K keys: int64 [S, Q] and [S, K] positions in the
    row, and which key each query sees, bool [S, 1, Q, K]. Padding repeats a segment's last token.

    Example: only a prompt of 2 tokens: Bucket(query_SQ=[[0, 1]], key_SK=[[0, 1]],
    mask_S1QK=[[[[True, False], [True, True]]]])
    """

    query_SQ: Tensor
    key_SK: Tensor
    mask_S1QK: Tensor


@dataclass(frozen=True, slots=True)
class Buckets:
    """All buckets of a row, and each token's position in their concatenated outputs."""

    buckets: tuple[Bucket, ...]
    output_T: Tensor  # int64 [T]


def make_buckets(starts_S: Tensor, families_N: Tensor) -> Buckets:
    """The buckets of a row of this layout, on its device."""
    segments = segments_of(starts_S, families_N)
    device = starts_S.device
    buckets, offset = [], 0
    output_T = torch.empty(sum(s.length for s in segments), dtype=torch.int64)
    for together in _alike(segments):
        bucket = _bucket(together, device)
        num_queries = bucket.query_SQ.shape[1]
        for index, segment in enumerate(together):
            first = offset + index * num_queries
            end = segment.start + segment.length
            output_T[segment.start : end] = torch.arange(first, first + segment.length)
        offset += bucket.query_SQ.numel()
        buckets.append(bucket)
    return Buckets(tuple(buckets), output_T.to(device))


def segments_of(starts_S: Tensor, families_N: Tensor) -> list[Segment]:
    """The segments of a layout, in the order of the row."""
    starts, families = starts_S.tolist(), families_N.tolist()
    num_prompts = len(families) - 1
    prompts = [Segment(start, end - start) for start, end in pairwise(starts[: num_prompts + 1])]
    completions, prompt = [], 0
    for start, end in pairwise(starts[num_prompts:]):
        while start - starts[num_prompts] >= families[prompt + 1]:
            prompt += 1
        prefix = prompts[prompt]
        completions.append(Segment(start, end - start, prefix.start, prefix.length))
    return prompts + completions


def _alike(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Groups of segments, consecutive by length, whose common block wastes little."""
    together: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (s.length, s.prefix_length)):
        trial = [*together, segment]
        needed = sum(s.length * (s.prefix_length + s.length) for s in trial)
        num_keys = max(s.prefix_length + s.length for s in trial)
        if together and len(trial) * segment.length * num_keys > _WASTE * needed:
            yield together
            trial = [segment]
        together = trial
    if together:
        yield together


def _bucket(segments: Sequence[Segment], device: torch.device) -> Bucket:
    num_queries = max(s.length for s in segments)
    num_keys = max(s.prefix_length + s.length for s in segments)
    queries, keys, masks = [], [], []
    query_Q1, key_1K = torch.arange(num_queries).unsqueeze(1), torch.arange(num_keys).unsqueeze(0)
    for segment in segments:
        own = torch.arange(segment.start, segment.start + segment.length)
        prefix = torch.arange(segment.prefix_start, segment.prefix_start + segment.prefix_length)
        seen = torch.cat([prefix, own])
        queries.append(torch.cat([own, own[-1:].expand(num_queries - len(own))]))
        keys.append(torch.cat([seen, own[-1:].expand(num_keys - len(seen))]))
        masks.append(key_1K <= query_Q1 + segment.prefix_length)
    return Bucket(
        torch.stack(queries).to(device),
        torch.stack(keys).to(device),
        torch.stack(masks).unsqueeze(1).to(device),
    )
