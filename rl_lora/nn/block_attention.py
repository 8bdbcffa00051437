"""Attention of short segments by batched matrix products, for a CPU and in float32.

SDPA's CPU kernel is built for long rows: it repeats the keys for each query head, and for segments
of tens of tokens it takes 1.5 times as long as plain products over blocks that stay in the cache;
in bfloat16, of which these convert inputs and outputs, its backward pass takes 4 times as long
(LOG.md). The backward pass recomputes the probabilities, so only queries, keys and values are kept.

Letters: S segments, J key heads, G query heads that share a key head (J G = H query heads), Q
queries and K keys of a segment, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl_lora.nn.segments import Bucket, Buckets

BLOCK_ELEMENTS = 2**19  # probabilities of a block, 2 MiB; more segments make more blocks
SEGMENT_ELEMENTS = 2**21  # of one segment at most: above, SDPA's kernel is faster


@dataclass(frozen=True, slots=True)
class Block:
    """Segments computed together.

    query_rows: int64 [S J G Q], rows of the queries as [T H, D]; key_rows: int64 [S J K], rows of
    the keys as [T J, D]; bias_S11QK: 0 where the query sees the key, else -inf; padding_N: which of
    the query rows repeat a token; sizes: (S, J, G, Q, K).

    Example: only a prompt of 2 tokens, one head: Block(query_rows=[0, 1], key_rows=[0, 1],
    bias_S11QK=[[[[[0, -inf], [0, 0]]]]], padding_N=[], sizes=(1, 1, 1, 2, 2))
    """

    query_rows: Tensor
    key_rows: Tensor
    bias_S11QK: Tensor
    padding_N: Tensor
    sizes: tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A row's blocks, and the position of each row [T H] among their concatenated query rows."""

    blocks: tuple[Block, ...]
    output_rows: Tensor


def make_blocks(buckets: Buckets, num_key_heads: int, num_groups: int) -> Blocks | None:
    """The blocks of the buckets of a row; None where a segment is too long for them to pay off."""
    num_heads = num_key_heads * num_groups
    blocks: list[Block] = []
    output_rows = torch.empty(len(buckets.output_T) * num_heads, dtype=torch.int64)
    is_real_N = torch.zeros(sum(b.query_SQ.numel() for b in buckets.buckets), dtype=torch.bool)
    is_real_N[buckets.output_T] = True
    offset = position = 0
    for bucket in buckets.buckets:
        num_elements = num_heads * bucket.query_SQ.shape[1] * bucket.key_SK.shape[1]
        if num_elements > SEGMENT_ELEMENTS:
            return None
        is_real_SQ = is_real_N[position : position + bucket.query_SQ.numel()]
        is_real_SQ = is_real_SQ.view(bucket.query_SQ.shape)
        position += bucket.query_SQ.numel()
        per_block = max(1, BLOCK_ELEMENTS // num_elements)
        for first in range(0, len(bucket.query_SQ), per_block):
            part = slice(first, first + per_block)
            block, real_N = _block(bucket, is_real_SQ, part, num_key_heads, num_groups)
            output_rows[block.query_rows[real_N]] = offset + real_N
            offset += len(block.query_rows)
            blocks.append(block)
    return Blocks(tuple(blocks), output_rows)


def _block(
    bucket: Bucket, is_real_SQ: Tensor, part: slice, num_key_heads: int, num_groups: int
) -> tuple[Block, Tensor]:
    """A block of some of a bucket's segments, and which of its query rows are not padding."""
    query_SQ, key_SK, mask_S1QK = (
        x[part] for x in (bucket.query_SQ, bucket.key_SK, bucket.mask_S1QK)
    )
    head_J = torch.arange(num_key_heads)
    head_JG1 = torch.arange(num_key_heads * num_groups).view(num_key_heads, num_groups, 1)
    query_SJGQ = query_SQ[:, None, None] * head_JG1.numel() + head_JG1
    is_real_SJGQ = is_real_SQ[part][:, None, None].expand(query_SJGQ.shape)
    bias_S11QK = torch.zeros(mask_S1QK.unsqueeze(1).shape)
    block = Block(
        query_rows=query_SJGQ.flatten(),
        key_rows=(key_SK.unsqueeze(1) * num_key_heads + head_J.view(-1, 1)).flatten(),
        bias_S11QK=bias_S11QK.masked_fill_(~mask_S1QK.unsqueeze(1), -torch.inf),
        padding_N=(~is_real_SJGQ).flatten().nonzero().squeeze(1),
        sizes=(*query_SJGQ.shape, key_SK.shape[1]),
    )
    return block, is_real_SJGQ.flatten().nonzero().squeeze(1)


def attend(
    query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, blocks: Blocks, scale: float
) -> Tensor:
    """[T, H, D] outputs, without gradient: `attend_backward` computes it."""
    inputs = [x.reshape(-1, x.shape[-1]) for x in (query_THD, key_TJD, value_TJD)]
    outputs = []
    for block in blocks.blocks:
        query_bqD, key_bKD, value_bKD = _gather(inputs, block)
        probs_bqK = _probabilities(query_bqD, key_bKD, block, scale)
        outputs.append(torch.bmm(probs_bqK, value_bKD).flatten(0, 1))
    return torch.cat(outputs).index_select(0, blocks.output_rows).view(query_THD.shape)


def attend_backward(
    query_THD: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    grad_THD: Tensor,
    blocks: Blocks,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, from that of the outputs."""
    inputs = [x.reshape(-1, x.shape[-1]) for x in (query_THD, key_TJD, value_TJD)]
    grad_rows = grad_THD.reshape(-1, grad_THD.shape[-1])
    grads_query = []
    grad_key, grad_value = (torch.zeros_like(x) for x in inputs[1:])
    for block in blocks.blocks:
        query_bqD, key_bKD, value_bKD = _gather(inputs, block)
        grad_bqD = grad_rows.index_select(0, block.query_rows)
        grad_bqD = grad_bqD.index_fill_(0, block.padding_N, 0).view(query_bqD.shape)
        probs_bqK = _probabilities(query_bqD, key_bKD, block, scale)
        _add_rows(grad_value, block, torch.bmm(probs_bqK.transpose(1, 2), grad_bqD))
        grad_probs_bqK = torch.bmm(grad_bqD, value_bKD.transpose(1, 2))
        grad_logits_bqK = torch.ops.aten._softmax_backward_data(
            grad_probs_bqK, probs_bqK, -1, probs_bqK.dtype
        )
        grad_key_bKD = torch.bmm(grad_logits_bqK.transpose(1, 2), query_bqD)
        _add_rows(grad_key, block, grad_key_bKD.mul_(scale))
        grads_query.append(torch.bmm(grad_logits_bqK, key_bKD).mul_(scale).flatten(0, 1))
    grad_query = torch.cat(grads_query).index_select(0, blocks.output_rows)
    return (
        grad_query.view(query_THD.shape),
        grad_key.view(key_TJD.shape),
        grad_value.view(value_TJD.shape),
    )


def _gather(inputs: list[Tensor], block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [S J, G Q, D], keys and values [S J, K, D]."""
    num_segments, num_key_heads, num_groups, num_queries, num_keys = block.sizes
    query, key, value = inputs
    rows, width = num_segments * num_key_heads, query.shape[-1]
    return (
        query.index_select(0, block.query_rows).view(rows, num_groups * num_queries, width),
        key.index_select(0, block.key_rows).view(rows, num_keys, width),
        value.index_select(0, block.key_rows).view(rows, num_keys, width),
    )


def _probabilities(query_bqD: Tensor, key_bKD: Tensor, block: Block, scale: float) -> Tensor:
    """[S J, G Q, K]: softmax of scale * q k + bias."""
    logits_bqK = query_bqD.new_empty(*query_bqD.shape[:2], key_bKD.shape[1])
    logits_bqK.view(block.sizes).copy_(block.bias_S11QK.expand(block.sizes))
    logits_bqK.baddbmm_(query_bqD, key_bKD.transpose(1, 2), alpha=scale)
    return torch.softmax(logits_bqK, -1)


def _add_rows(total: Tensor, block: Block, part_bKD: Tensor) -> None:
    total.index_add_(0, block.key_rows, part_bKD.flatten(0, 1))
