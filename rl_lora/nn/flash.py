"""Attention over shared prompts by two calls of PyTorch's flash kernel: on a GPU, in 16 bits.

One call attends within the segments, the other one from completions to their prompts. The softmax
over both sets of keys follows from the two calls' outputs o and the logarithms l of their sums:
l = log(e^l1 + e^l2), o = o1 e^(l1 - l) + o2 e^(l2 - l). Backwards, a call that is given the merged
o and l computes its part of the whole softmax's gradient, so that the two parts only have to be
added.

Letters as in `segments`; A tokens of completions, H query heads, J key heads, D width of a head.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_lora.nn.segments import AttentionLayout

Gradients = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values


def can_run(query_THD: Tensor) -> bool:
    """Whether the kernel exists for this device, dtype and width of a head."""
    return (
        query_THD.device.type == "cuda"
        and query_THD.dtype in (torch.bfloat16, torch.float16)
        and query_THD.shape[-1] % 8 == 0
        and query_THD.shape[-1] <= 256
        and _has_kernel(query_THD.device)
    )


@cache
def _has_kernel(device: torch.device) -> bool:
    """On AMD's GPUs the kernel returns log-sums of another shape."""
    return (
        torch.version.hip is None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class Lengths(NamedTuple):
    """Which queries see which keys: sequence i has the queries from queries[i] to queries[i + 1]
    and the keys from keys[i] to keys[i + 1], int32; causally, or all of them."""

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int
    is_causal: bool


def attend(
    query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, layout: AttentionLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [T, H, D] and log-sums [H, T] of the logits (float32), without gradient."""
    own, prompts = _lengths(layout)
    first = layout.sizes.prompts
    out_THD, lse_HT = forward_part(query_THD, key_TJD, value_TJD, own, scale)
    prompt_out_AHD, prompt_lse_HA = forward_part(
        query_THD[first:], key_TJD[:first], value_TJD[:first], prompts, scale
    )
    own_lse_HA = lse_HT[:, first:]
    # The prompt's share of the softmax, in the log-sums' dtype; so are the products with it.
    share_AH1 = torch.sigmoid(prompt_lse_HA - own_lse_HA).T.unsqueeze(-1)
    out_THD[first:].mul_(1 - share_AH1).addcmul_(prompt_out_AHD, share_AH1)
    torch.logaddexp(own_lse_HA, prompt_lse_HA, out=own_lse_HA)
    return out_THD, lse_HT


# limits: what the forward pass took and returned
def attend_backward(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    layout: AttentionLayout,
    scale: float,
) -> Gradients:
    """Gradients of queries, keys and values, from that of the outputs."""
    own, prompts = _lengths(layout)
    first = layout.sizes.prompts
    gradients = backward_part(grad_THD, query_THD, key_TJD, value_TJD, out_THD, lse_HT, own, scale)
    query_AHD, key_PJD, value_PJD = backward_part(
        grad_THD[first:],
        query_THD[first:],
        key_TJD[:first],
        value_TJD[:first],
        out_THD[first:],
        lse_HT[:, first:].contiguous(),
        prompts,
        scale,
    )
    gradients[0][first:].add_(query_AHD)
    gradients[1][:first].add_(key_PJD)
    gradients[2][:first].add_(value_PJD)
    return gradients


def _lengths(layout: AttentionLayout) -> tuple[Lengths, Lengths]:
    """Of the segments by themselves, and of the completions over their prompts."""
    starts, families, sizes = layout
    longest, prompt_starts = sizes.longest_segment, starts[: len(families)]  # prompts come first
    return (
        Lengths(starts, starts, longest, longest, is_causal=True),
        Lengths(
            families, prompt_starts, sizes.largest_family, sizes.longest_prompt, is_causal=False
        ),
    )


def forward_part(
    query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel's outputs [queries, H, D] and log-sums of the logits [H, queries]."""
    call: Any = torch.ops.aten._flash_attention_forward
    *bounds, is_causal = lengths
    dropout, has_debug_mask = 0.0, False
    out_THD, lse_HT, *_ = call(
        query_THD, key_TJD, value_TJD, *bounds, dropout, is_causal, has_debug_mask, scale=scale
    )
    return out_THD, lse_HT


# limits: the kernel's signature
def backward_part(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    lengths: Lengths,
    scale: float,
) -> Gradients:
    """The kernel's gradients of queries, keys and values, given the outputs and log-sums of a
    softmax over these keys and perhaps others; the log-sums have to be contiguous."""
    call: Any = torch.ops.aten._flash_attention_backward
    *bounds, is_causal = lengths
    dropout, unread = 0.0, lengths.queries  # the state of a random generator, for dropout
    kept = (query_THD, key_TJD, value_TJD, out_THD, lse_HT)
    gradients: Gradients = call(
        grad_THD, *kept, *bounds, dropout, is_causal, unread, unread, scale=scale
    )
    return gradients
