"""How a row of prompts and completions attends: segments, in buckets of similar length.

A segment (a prompt or a completion) attends to its prompt and causally to itself. The queries of
segments of similar length, with the keys that each sees, make small padded blocks, so that little
more than the needed products is computed; a mask over the whole row would compute them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WASTE = 1.3  # largest ratio of a bucket's padded block to what is needed
# Query-key pairs that a bucket may waste in any case, by kind of device: a GPU computes this many
# (1 Mi pairs of 16 heads of 64 are 4 GFLOP) faster than it launches the kernels of another bucket.
MAX_WASTED_PAIRS = {"cpu": 0, "cuda": 2**20}


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
class AttentionLayout:
    """All buckets of a row, and each token's position in their concatenated outputs."""

    buckets: tuple[Bucket, ...]
    output_T: Tensor  # int64 [T]

    def to(self, device: torch.device) -> AttentionLayout:
        """The layout with its tensors on the device."""
        buckets = tuple(
            Bucket(b.query_SQ.to(device), b.key_SK.to(device), b.mask_S1QK.to(device))
            for b in self.buckets
        )
        return AttentionLayout(buckets, self.output_T.to(device))


def make_layout(segments: Sequence[Segment], max_wasted_pairs: int = 0) -> AttentionLayout:
    """Buckets of segments that together cover a row; max_wasted_pairs: see MAX_WASTED_PAIRS."""
    num_tokens = sum(segment.length for segment in segments)
    buckets, output_T, offset = [], torch.empty(num_tokens, dtype=torch.int64), 0
    for together in _alike(segments, max_wasted_pairs):
        bucket = _bucket(together)
        num_queries = bucket.query_SQ.shape[1]
        for index, segment in enumerate(together):
            first = offset + index * num_queries
            end = segment.start + segment.length
            output_T[segment.start : end] = torch.arange(first, first + segment.length)
        offset += bucket.query_SQ.numel()
        buckets.append(bucket)
    return AttentionLayout(tuple(buckets), output_T)


def _alike(segments: Sequence[Segment], max_wasted_pairs: int) -> Iterator[list[Segment]]:
    """Groups of segments, consecutive by length, whose common block wastes little."""
    together: list[Segment] = []
    for segment in sorted(segments, key=lambda s: (s.length, s.prefix_length)):
        trial = [*together, segment]
        needed = sum(s.length * (s.prefix_length + s.length) for s in trial)
        num_keys = max(s.prefix_length + s.length for s in trial)
        computed = len(trial) * segment.length * num_keys
        if together and computed > _WASTE * needed and computed - needed > max_wasted_pairs:
            yield together
            trial = [segment]
        together = trial
    if together:
        yield together


def _bucket(segments: Sequence[Segment]) -> Bucket:
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
    return Bucket(torch.stack(queries), torch.stack(keys), torch.stack(masks).unsqueeze(1))
