"""Attention over shared prompts by two calls of PyTorch's flash kernel: on a GPU, in 16 bits.

One call attends within the segments, the other one from completions to their prompts. The softmax
over both sets of keys follows from the two calls' outputs o and the logarithms l of their sums:
l = log(e^l1 + e^l2), o = o1 e^(l1 - l) + o2 e^(l2 - l). Backwards, a call that is given the merged
o and l computes its part of the whole softmax's gradient, so that the two parts only have to be
added.

Letters as in `segments`; A tokens of completions, P of prompts, H query heads, J key heads, D width
of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_lora.nn.segments import Sizes

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


# limits: an operator takes tensors and numbers only, so it gets a layout's fields one by one
@torch.library.custom_op("rl_lora::flash_parts", mutates_args=())
def attend_in_parts(
    query_THD: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    starts_S: Tensor,
    families_N: Tensor,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs [T, H, D] and log-sums [H, T] of the logits (float32) of all tokens over their own
    segments, then the same of the completions over their prompts, [A, H, D] and [H, A]."""
    own, prompts = _lengths(starts_S, families_N, Sizes(*sizes))
    first = sizes[0]
    out_THD, lse_HT = forward_part(query_THD, key_TJD, value_TJD, own, scale)
    out_AHD, lse_HA = forward_part(
        query_THD[first:], key_TJD[:first], value_TJD[:first], prompts, scale
    )
    return out_THD.contiguous(), lse_HT, out_AHD.contiguous(), lse_HA


# limits: what the forward pass took, and the merged outputs
@torch.library.custom_op("rl_lora::flash_parts_backward", mutates_args=())
def attend_in_parts_backward(
    grad_THD: Tensor,
    query_THD: Tensor,
    key_TJD: Tensor,
    value_TJD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    starts_S: Tensor,
    families_N: Tensor,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values by the tokens' own segments, then by the prompts: of
    the completions' queries, [A, H, D], and the prompts' keys and values, [P, J, D]."""
    own, prompts = _lengths(starts_S, families_N, Sizes(*sizes))
    first = sizes[0]
    of_own = backward_part(grad_THD, query_THD, key_TJD, value_TJD, out_THD, lse_HT, own, scale)
    of_prompts = backward_part(
        grad_THD[first:],
        query_THD[first:],
        key_TJD[:first],
        value_TJD[:first],
        out_THD[first:],
        lse_HT[:, first:].contiguous(),
        prompts,
        scale,
    )
    query_THD, key_TJD, value_TJD = (gradient.contiguous() for gradient in of_own)
    query_AHD, key_PJD, value_PJD = (gradient.contiguous() for gradient in of_prompts)
    return query_THD, key_TJD, value_TJD, query_AHD, key_PJD, value_PJD


@attend_in_parts.register_fake
def _fake_parts(query_THD: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    num_prompt_tokens = inputs[4][0]
    made: list[Tensor] = []
    for part_THD in (query_THD, query_THD[num_prompt_tokens:]):
        num_tokens, num_heads, _ = part_THD.shape
        made.append(part_THD.new_empty(part_THD.shape))
        made.append(part_THD.new_empty(num_heads, num_tokens, dtype=torch.float32))
    return tuple(made)


@attend_in_parts_backward.register_fake
def _fake_parts_backward(_: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    first = inputs[7][0]
    whole, parts = inputs[:3], (inputs[0][first:], inputs[1][:first], inputs[2][:first])
    return tuple(x.new_empty(x.shape) for x in (*whole, *parts))


class FlashAttention(torch.autograd.Function):
    """The merged outputs [T, H, D]. What is not the kernel's is plain PyTorch, so that a compiled
    layer joins it with what comes before and after."""

    # limits: autograd takes the tensors that it differentiates one by one
    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TJD: Tensor,
        value_TJD: Tensor,
        starts_S: Tensor,
        families_N: Tensor,
        sizes: Sequence[int],
        scale: float,
    ) -> Tensor:
        """As `attend_in_parts` takes them."""
        first = sizes[0]
        inputs = query_THD, key_TJD, value_TJD
        layout = starts_S, families_N, sizes
        out_THD, lse_HT, prompt_out_AHD, prompt_lse_HA = attend_in_parts(*inputs, *layout, scale)
        own_AHD, own_lse_HA = out_THD[first:], lse_HT[:, first:]
        # The prompt's share of the softmax, in the log-sums' dtype; so are the products with it.
        share_AH1 = torch.sigmoid(prompt_lse_HA - own_lse_HA).T.unsqueeze(-1)
        merged_AHD = own_AHD * (1 - share_AH1) + prompt_out_AHD * share_AH1
        merged_lse_HA = torch.logaddexp(own_lse_HA, prompt_lse_HA)
        out_THD = torch.cat([out_THD[:first], merged_AHD.to(out_THD.dtype)])
        lse_HT = torch.cat([lse_HT[:, :first], merged_lse_HA], dim=1)
        ctx.save_for_backward(*inputs, out_THD, lse_HT, starts_S, families_N)
        ctx.sizes, ctx.scale = sizes, scale
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        first = ctx.sizes[0]
        parts = attend_in_parts_backward(grad_THD, *ctx.saved_tensors, ctx.sizes, ctx.scale)
        query_THD, key_TJD, value_TJD, query_AHD, key_PJD, value_PJD = parts
        query_THD[first:].add_(query_AHD)
        key_TJD[:first].add_(key_PJD)
        value_TJD[:first].add_(value_PJD)
        return query_THD, key_TJD, value_TJD, None, None, None, None


def _lengths(starts: Tensor, families: Tensor, sizes: Sizes) -> tuple[Lengths, Lengths]:
    """Of the segments by themselves, and of the completions over their prompts."""
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
