"""Attention over completions that share their prompt, in one row of tokens without padding.

A microbatch is one long row: prompts, each followed by its completions; `segments` says which token
sees which. The blocks of its buckets are gathered from the row and go through SDPA, or, where they
are short and on a CPU, through plain products (`block_attention`).

Models call it through transformers' attention interface under `NAME`. Without a layout (decoding,
plain batches) it is transformers' SDPA attention.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rl_lora.nn import block_attention
from rl_lora.nn.block_attention import Blocks
from rl_lora.nn.context import CONTEXT, attending_by
from rl_lora.nn.segments import MAX_WASTED_PAIRS, AttentionLayout, Segment, make_layout

NAME = "rl_lora_shared_prompt"


def using(
    segments: tuple[Segment, ...] | None, device: torch.device
) -> AbstractContextManager[None]:
    """This thread's forward passes attend by the segments of a row; None: plain causal attention.

    The layout is kept for the next pass over the same row.
    """
    if segments is None:
        return attending_by(None)
    kept = CONTEXT.kept_layout
    if kept is None or kept[0] is not segments or kept[1] != device:
        layout = make_layout(segments, MAX_WASTED_PAIRS.get(device.type, 0)).to(device)
        kept = CONTEXT.kept_layout = segments, device, layout
    return attending_by(kept[2])


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a checkpointed layer's first computation and of its recomputation, which
    attends by the present layout.

    A GPU's backward pass runs in one of autograd's threads, which has no layout.
    """
    return contextlib.nullcontext(), attending_by(CONTEXT.layout)


def attend(
    query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, layout: AttentionLayout, scale: float
) -> Tensor:
    """[T, H, D] outputs; J key heads, each serving H / J query heads."""
    outputs = []
    has_groups = query_THD.shape[1] != key_TJD.shape[1]
    for bucket in layout.buckets:
        out_SHQD = scaled_dot_product_attention(
            _gather(query_THD, bucket.query_SQ),
            _gather(key_TJD, bucket.key_SK),
            _gather(value_TJD, bucket.key_SK),
            attn_mask=bucket.mask_S1QK,
            scale=scale,
            enable_gqa=has_groups,
        )
        outputs.append(out_SHQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, layout.output_T)


def attend_last(
    query_SH1D: Tensor,
    key_SJTD: Tensor,
    value_SJTD: Tensor,
    mask_S11T: Tensor | None,
    scale: float,
) -> Tensor:
    """[S, H, 1, D] outputs of the last tokens only, as in decoding; the mask is True where seen.

    The heads that share a key head are passed as its queries: transformers' SDPA repeats keys and
    values for each of them, at every token, which takes up to ten times as long on a CPU.
    """
    query_SJGD = query_SH1D.unflatten(1, (key_SJTD.shape[1], -1)).squeeze(3)
    out_SJGD = scaled_dot_product_attention(
        query_SJGD, key_SJTD, value_SJTD, attn_mask=mask_S11T, scale=scale
    )
    return out_SJGD.reshape(query_SH1D.shape)


class _Attend(torch.autograd.Function):
    """`attend` that keeps only its inputs and recomputes the rest in the backward pass.

    Attention is a few percent of the work, but its gathered blocks, with keys repeated for each
    group of query heads, would be a third of the activations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TJD: Tensor,
        value_TJD: Tensor,
        layout: AttentionLayout,
        scale: float,
    ) -> Tensor:
        """[T, H, D]."""
        ctx.save_for_backward(query_THD, key_TJD, value_TJD)
        ctx.layout, ctx.scale = layout, scale
        ctx.blocks = _blocks(query_THD, key_TJD, layout)
        if ctx.blocks is not None:
            return block_attention.attend(query_THD, key_TJD, value_TJD, ctx.blocks, scale)
        return attend(query_THD, key_TJD, value_TJD, layout, scale)

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        if ctx.blocks is not None:
            query_THD, key_TJD, value_TJD = ctx.saved_tensors
            gradients = block_attention.attend_backward(
                query_THD, key_TJD, value_TJD, grad_THD, ctx.blocks, ctx.scale
            )
            return (*gradients, None, None)
        query_THD, key_TJD, value_TJD = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            out_THD = attend(query_THD, key_TJD, value_TJD, ctx.layout, ctx.scale)
        inputs = (query_THD, key_TJD, value_TJD)
        return (*torch.autograd.grad(out_THD, inputs, grad_THD), None, None)


def _blocks(query_THD: Tensor, key_TJD: Tensor, layout: AttentionLayout) -> Blocks | None:
    """The layout's blocks, made once for all layers; None where SDPA is faster."""
    if query_THD.device.type != "cpu" or query_THD.dtype != torch.float32:
        return None
    num_key_heads = key_TJD.shape[1]
    key = (num_key_heads, query_THD.shape[1] // num_key_heads)
    kept = CONTEXT.kept_blocks
    if kept is None or kept[0] is not layout or kept[1] != key:
        kept = CONTEXT.kept_blocks = layout, key, block_attention.make_blocks(layout, *key)
    return kept[2]


def _gather(x_THD: Tensor, index_SQ: Tensor) -> Tensor:
    """[S, H, Q, D]."""
    out = x_THD.index_select(0, index_SQ.flatten())
    return out.view(*index_SQ.shape, *x_THD.shape[1:]).transpose(1, 2)


# limits: transformers' attention interface
def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: [1, heads, T, D] in, [1, T, heads, D] out."""
    layout = CONTEXT.layout
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is None and query.shape[2] == 1:
        return attend_last(query, key, value, attention_mask, scale).transpose(1, 2), None
    if layout is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    query_THD, key_TJD, value_TJD = (x[0].transpose(0, 1) for x in (query, key, value))
    out_THD: Tensor = _Attend.apply(query_THD, key_TJD, value_TJD, layout, scale)
    return out_THD.unsqueeze(0), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """SDPA's mask; None where a layout replaces it."""
    return None if CONTEXT.layout is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, _mask)
