"""Token log-probs and entropies from hidden states, without [tokens x vocabulary] in memory.

Both work through lm_head in chunks of tokens, in one buffer that is used again, and differ in what
the backward pass needs:

- `FrozenHead`: lm_head is a frozen matrix W without bias or adapter. The derivative of a token's
  log-prob by its hidden state, (W[target] - p W) / temperature, does not depend on the loss, so the
  forward pass makes it at once ([C, D]) and the backward pass is one multiplication: no logits are
  kept and none computed twice.
- `chunked`: any lm_head (adapter on it, trained in full, bias). The chunk's logits are remade in
  the backward pass by activation checkpointing.

`plain` is the slow reference that the tests hold both against.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**23  # logits held at once, 32 MiB in float32

_buffers = threading.local()


def score_hidden(
    hidden_CD: Tensor, lm_head: nn.Module, target_ids_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(logprobs_C with gradient, entropy_C without) of softmax(logits / temperature).

    Both float32, in nats.

    Args:
        hidden_CD: the final hidden states that predict the targets.
        lm_head: the output layer; the fast path is taken where it is a frozen linear layer.
        target_ids_C: int64.
        temperature: over 0.
    """
    is_plain = type(lm_head) is nn.Linear and lm_head.bias is None
    if is_plain and not lm_head.weight.requires_grad:
        logprobs_C, entropy_C = FrozenHead.apply(
            hidden_CD, lm_head.weight, target_ids_C, temperature
        )
        return logprobs_C, entropy_C
    return chunked(hidden_CD, lm_head, target_ids_C, temperature)


class FrozenHead(torch.autograd.Function):
    """Log-probs and entropies under a frozen lm_head; gradient to the hidden states alone."""

    @staticmethod
    def forward(
        ctx: Any, hidden_CD: Tensor, weight_VD: Tensor, target_ids_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """One pass over the chunks: log-probs, entropies and, where asked, the unit gradients."""
        has_grad = ctx.needs_input_grad[0]
        num_tokens, num_vocab = hidden_CD.shape[0], weight_VD.shape[0]
        logprobs_C = hidden_CD.new_empty(num_tokens, dtype=torch.float32)
        entropy_C = torch.empty_like(logprobs_C)
        unit_grad_CD = torch.empty_like(hidden_CD) if has_grad else None
        chunk = max(1, CHUNK_ELEMENTS // num_vocab)
        for start in range(0, num_tokens, chunk):
            part = slice(start, min(start + chunk, num_tokens))
            hidden_cD, target_ids_c1 = hidden_CD[part], target_ids_C[part].unsqueeze(-1)
            logits_cV, buffer = _logits(hidden_cD, weight_VD, temperature)
            target_c1 = logits_cV.gather(-1, target_ids_c1)
            shift_c1 = logits_cV.amax(-1, keepdim=True)
            probs_cV, mean_c1 = _exp_and_mean(logits_cV.sub_(shift_c1))
            total_c1 = probs_cV.sum(-1, keepdim=True)
            log_total_c1 = total_c1.log()
            logprobs_C[part] = (target_c1 - shift_c1 - log_total_c1).squeeze(-1)
            entropy_C[part] = (log_total_c1 - mean_c1 / total_c1).squeeze(-1)
            if unit_grad_CD is not None:
                # W[target] - p W as one product: -p plus one at the target.
                probs_cV.mul_(-1 / total_c1)
                probs_cV.scatter_add_(-1, target_ids_c1, torch.ones_like(total_c1))
                scaled_cV = probs_cV if buffer is None else buffer.copy_(probs_cV)
                torch.mm(scaled_cV, weight_VD, out=unit_grad_CD[part])
        if unit_grad_CD is not None:
            if temperature != 1:
                unit_grad_CD.div_(temperature)
            ctx.save_for_backward(unit_grad_CD)
        ctx.mark_non_differentiable(entropy_C)
        return logprobs_C, entropy_C

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_C: Tensor, grad_entropy_C: Tensor
    ) -> tuple[Tensor, None, None, None]:
        """The unit gradients, each times its token's."""
        (unit_grad_CD,) = ctx.saved_tensors
        return unit_grad_CD * grad_logprobs_C.unsqueeze(-1).to(unit_grad_CD.dtype), None, None, None


def chunked(
    hidden_CD: Tensor, lm_head: nn.Module, target_ids_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `score_hidden`, through any lm_head; logits are remade in the backward pass."""
    num_vocab = int(lm_head.weight.shape[0])  # type: ignore[index]
    chunk = max(1, CHUNK_ELEMENTS // num_vocab)

    def score_chunk(hidden_cD: Tensor, target_ids_c: Tensor) -> tuple[Tensor, Tensor]:
        return plain(hidden_cD, lm_head, target_ids_c, temperature)

    pairs = zip(hidden_CD.split(chunk), target_ids_C.split(chunk), strict=True)
    scored = [
        checkpoint(score_chunk, h, t, use_reentrant=False)
        if torch.is_grad_enabled()
        else score_chunk(h, t)
        for h, t in pairs
    ]
    logprobs, entropies = zip(*scored, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


def plain(
    hidden_CD: Tensor, lm_head: nn.Module, target_ids_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The definition, with the whole [C, V] in memory."""
    logprobs_CV = (lm_head(hidden_CD).float() / temperature).log_softmax(-1)
    fixed_CV = logprobs_CV.detach()
    entropy_C = -(fixed_CV.exp() * fixed_CV).sum(-1)
    return logprobs_CV.gather(-1, target_ids_C.unsqueeze(-1)).squeeze(-1), entropy_C


def _logits(
    hidden_cD: Tensor, weight_VD: Tensor, temperature: float
) -> tuple[Tensor, Tensor | None]:
    """(float32 logits / temperature in a buffer of their own, a buffer in the weight's dtype).

    The second is None in float32. Buffers are kept for the thread's next chunk: memory fresh from
    the system costs a page fault every 4 KiB.
    """
    shape = (hidden_cD.shape[0], weight_VD.shape[0])
    logits_cV = _buffer("logits", shape, weight_VD.dtype, weight_VD.device)
    torch.mm(hidden_cD, weight_VD.T, out=logits_cV)
    if weight_VD.dtype == torch.float32:
        return (logits_cV if temperature == 1 else logits_cV.div_(temperature)), None
    wide_cV = _buffer("wide", shape, torch.float32, weight_VD.device)
    wide_cV.copy_(logits_cV)
    return (wide_cV if temperature == 1 else wide_cV.div_(temperature)), logits_cV


def _exp_and_mean(logits_cV: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(logits) in a buffer, sum over the vocabulary of exp(logits) * logits)."""
    exp_cV = _buffer("exp", tuple(logits_cV.shape), torch.float32, logits_cV.device)
    torch.exp(logits_cV, out=exp_cV)
    return exp_cV, torch.linalg.vecdot(exp_cV, logits_cV).unsqueeze(-1)


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """This thread's buffer of that name, grown where it is too small."""
    size = shape[0] * shape[1]
    key = (name, dtype, device)
    kept: dict[Any, Tensor] = _buffers.__dict__.setdefault("kept", {})
    if key not in kept or kept[key].numel() < size:
        kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size].view(shape)
