"""Attention over completions that share their prompt, in one row of tokens without padding.

`attend` has an implementation by device and dtype: two calls of the flash kernel (`flash`); plain
products over short blocks, on a CPU (`block_attention`); else SDPA over padded blocks
(`segments.make_buckets`). To autograd and the compiler each is an opaque node, whatever the
lengths, and so are flash's two calls.

Models call it through transformers' attention interface under `NAME`. They are given the row's
layout as a keyword, `model(..., layout=layout)`, which they hand on to every layer. Without a
layout (decoding, plain batches) it is transformers' SDPA attention.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rl_lora.nn import block_attention, flash
from rl_lora.nn.block_attention import Blocks
from rl_lora.nn.segments import AttentionLayout, Buckets, make_buckets

NAME = "rl_lora_shared_prompt"

Made = TypeVar("Made")
_MADE = WeakTensorKeyDictionary()  # by a layout's first tensor: what was made of the layout


def attend(
    query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, layout: AttentionLayout, scale: float
) -> Tensor:
    """Outputs [T, H, D] of a row; J key heads, each serving H / J query heads."""
    inputs = query_THD, key_TJD, value_TJD
    if flash.can_run(query_THD):
        out_THD: Tensor = flash.FlashAttention.apply(*inputs, *layout, scale)
        return out_THD
    return attend_in_blocks(*inputs, layout.starts_S, layout.families_N, scale)


# limits: an operator takes tensors and numbers only, so it gets a layout's fields one by one
@torch.library.custom_op("rl_lora::attend", mutates_args=())
def attend_in_blocks(
    query_THD: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    starts_S: Tensor,
    families_N: Tensor,
    scale: float,
) -> Tensor:
    """`attend` by `block_attention`, or else SDPA."""
    inputs = query_THD, key_TJD, value_TJD
    blocks = _blocks(query_THD, key_TJD, starts_S, families_N)
    if blocks is not None:
        wide = query_THD.float(), key_TJD.float(), value_TJD.float()
        return block_attention.attend(*wide, blocks, scale).to(query_THD.dtype)
    return attend_in_buckets(*inputs, _buckets(starts_S, families_N), scale)


# limits: as `attend_in_blocks`
@torch.library.custom_op("rl_lora::attend_backward", mutates_args=())
def attend_backward(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    starts_S: Tensor,
    families_N: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    blocks = _blocks(query_THD, key_TJD, starts_S, families_N)
    if blocks is not None:
        wide = query_THD.float(), key_TJD.float(), value_TJD.float(), grad_THD.float()
        query, key, value = block_attention.attend_backward(*wide, blocks, scale)
        return query.to(query_THD.dtype), key.to(key_TJD.dtype), value.to(value_TJD.dtype)
    inputs = query_THD, key_TJD, value_TJD
    query_THD, key_TJD, value_TJD = (x.detach().requires_grad_() for x in inputs)
    inputs = query_THD, key_TJD, value_TJD
    with torch.enable_grad(), _recording():
        out_THD = attend_in_buckets(*inputs, _buckets(starts_S, families_N), scale)
        query_THD, key_TJD, value_TJD = torch.autograd.grad(out_THD, inputs, grad_THD)
    return query_THD, key_TJD, value_TJD


def _recording() -> AbstractContextManager[None]:
    """Lets autograd record, which it does not within an operator."""
    guard: Any = torch._C._SetExcludeDispatchKeyGuard
    context: AbstractContextManager[None] = guard(torch._C.DispatchKey.AutogradFunctionality, False)
    return context


@attend_in_blocks.register_fake
def _fake_attend(query_THD: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query_THD, memory_format=torch.contiguous_format)


@attend_backward.register_fake
def _fake_attend_backward(_: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs[:3])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)  # the backward pass recomputes everything from the inputs


def _backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
    return *attend_backward(grad_THD, *ctx.saved_tensors, ctx.scale), None, None, None


attend_in_blocks.register_autograd(_backward, setup_context=_setup_context)


def attend_in_buckets(
    query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, buckets: Buckets, scale: float
) -> Tensor:
    """[T, H, D] outputs by SDPA, with gradient."""
    outputs = []
    has_groups = query_THD.shape[1] != key_TJD.shape[1]
    for bucket in buckets.buckets:
        out_SHQD = scaled_dot_product_attention(
            _gather(query_THD, bucket.query_SQ),
            _gather(key_TJD, bucket.key_SK),
            _gather(value_TJD, bucket.key_SK),
            attn_mask=bucket.mask_S1QK,
            scale=scale,
            enable_gqa=has_groups,
        )
        outputs.append(out_SHQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, buckets.output_T)


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


def _gather(x_THD: Tensor, index_SQ: Tensor) -> Tensor:
    """[S, H, Q, D]."""
    out = x_THD.index_select(0, index_SQ.flatten())
    return out.view(*index_SQ.shape, *x_THD.shape[1:]).transpose(1, 2)


def _blocks(
    query_THD: Tensor, key_TJD: Tensor, starts_S: Tensor, families_N: Tensor
) -> Blocks | None:
    """The layout's blocks; None where SDPA is faster."""
    if query_THD.device.type != "cpu" or query_THD.dtype == torch.float64:
        return None
    num_key_heads = key_TJD.shape[1]
    heads = num_key_heads, query_THD.shape[1] // num_key_heads
    return _once(
        starts_S,
        heads,
        lambda: block_attention.make_blocks(_buckets(starts_S, families_N), *heads),
    )


def _buckets(starts_S: Tensor, families_N: Tensor) -> Buckets:
    return _once(starts_S, "buckets", lambda: make_buckets(starts_S, families_N))


def _once(starts_S: Tensor, name: Hashable, make: Callable[[], Made]) -> Made:
    """What `make` returns, made once for all layers and passes that attend by a layout."""
    made: dict[Hashable, Any] = _MADE.setdefault(starts_S, {})
    if name not in made:
        made[name] = make()
    found: Made = made[name]
    return found


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some layers see only the nearest tokens, which a layout cannot say."""
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        return True
    kinds = getattr(config, "layer_types", None) or ()
    return not {"sliding_attention", "chunked_attention"}.isdisjoint(kinds)


# limits: transformers' attention interface
def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: AttentionLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: [1, heads, T, D] in, [1, T, heads, D] out."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layout is not None:
        query_THD, key_TJD, value_TJD = (x[0].transpose(0, 1) for x in (query, key, value))
        out_THD = attend(query_THD, key_TJD, value_TJD, layout, scale)
        return out_THD.unsqueeze(0), None
    if query.shape[2] == 1:
        return attend_last(query, key, value, attention_mask, scale).transpose(1, 2), None
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return out, None


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
