"""What `rl_lora.nn.flash` asks of its kernel, by plain products over whole score matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from rl_lora.nn.flash import Gradients, Lengths


def forward_part(
    query_THD: Tensor, key_TJD: Tensor, value_TJD: Tensor, lengths: Lengths, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs [queries, H, D] and log-sums [H, queries]."""
    key_HTD, value_HTD = (_for_each_query_head(x, query_THD) for x in (key_TJD, value_TJD))
    logits_HQK = _logits(query_THD, key_HTD, lengths, scale)
    lse_HT = logits_HQK.logsumexp(-1)
    probs_HQK = (logits_HQK - lse_HT.unsqueeze(-1)).exp()
    out_THD = (probs_HQK @ value_HTD).transpose(0, 1).contiguous().to(query_THD.dtype)
    return out_THD, lse_HT


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
    """Gradients of queries, keys and values through these lengths' part of the softmax."""
    assert lse_HT.is_contiguous()
    key_HTD, value_HTD = (_for_each_query_head(x, query_THD) for x in (key_TJD, value_TJD))
    grad_HTD, query_HTD, out_HTD = (
        x.transpose(0, 1).to(lse_HT.dtype) for x in (grad_THD, query_THD, out_THD)
    )
    logits_HQK = _logits(query_THD, key_HTD, lengths, scale)
    probs_HQK = (logits_HQK - lse_HT.unsqueeze(-1)).exp()
    grad_probs_HQK = grad_HTD @ value_HTD.mT - (grad_HTD * out_HTD).sum(-1, keepdim=True)
    grad_logits_HQK = probs_HQK * grad_probs_HQK * scale
    gradients_HTD = (
        grad_logits_HQK @ key_HTD,
        grad_logits_HQK.mT @ query_HTD,
        probs_HQK.mT @ grad_HTD,
    )
    query, key, value = (
        x.transpose(0, 1).unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype)
        for x, like in zip(gradients_HTD, (query_THD, key_TJD, value_TJD), strict=True)
    )
    return query, key, value


def _for_each_query_head(x_TJD: Tensor, query_THD: Tensor) -> Tensor:
    """[H, T, D], in float32 at least."""
    groups = query_THD.shape[1] // x_TJD.shape[1]
    wide = torch.promote_types(x_TJD.dtype, torch.float32)
    return x_TJD.repeat_interleave(groups, 1).transpose(0, 1).to(wide)


def _logits(query_THD: Tensor, key_HTD: Tensor, lengths: Lengths, scale: float) -> Tensor:
    """[H, Q, K]; -inf where the query does not see the key."""
    query_Q = torch.arange(query_THD.shape[0], device=query_THD.device)
    key_K = torch.arange(key_HTD.shape[1], device=query_THD.device)
    of_query_Q = torch.bucketize(query_Q, lengths.queries[1:], right=True)
    of_key_K = torch.bucketize(key_K, lengths.keys[1:], right=True)
    is_seen_QK = of_query_Q.unsqueeze(1) == of_key_K
    if lengths.is_causal:  # queries and keys are the same tokens
        is_seen_QK &= key_K <= query_Q.unsqueeze(1)
    for starts, longest in (
        (lengths.queries, lengths.max_queries),
        (lengths.keys, lengths.max_keys),
    ):
        assert int(starts.diff().max()) == longest
    logits_HQK = query_THD.transpose(0, 1).to(key_HTD.dtype) @ key_HTD.mT * scale
    return logits_HQK.masked_fill(~is_seen_QK, -torch.inf)
