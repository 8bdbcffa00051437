"""Token log-probs and entropies from hidden states, without [tokens x vocabulary] in memory.

Two ways, which differ in what the backward pass needs:

- `FrozenHead`: lm_head is a frozen matrix W without bias or adapter. The derivative of a token's
  log-prob by its hidden state, (W[target] - p W) / temperature, does not depend on the loss, so the
  forward pass computes it right away ([C, D]) and the backward pass is one multiplication: no
  logits are kept, and none are computed twice.
- `chunked`: any lm_head (with an adapter, trained in full, with bias). The backward pass recomputes
  a chunk's logits by activation checkpointing.

`plain` is the slow reference that the tests compare both with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl_lora.nn.context import CONTEXT

CHUNK_ELEMENTS = 2**23  # logits of `chunked` in memory at once, 32 MiB in float32
CHUNK_TOKENS = 4096  # of `FrozenHead` at once; only [tokens, D] is kept
CPU_BLOCK = 1024  # of the vocabulary: logits stay in the cache, and MKL is fastest (LOG.md)
BLOCK_ELEMENTS = 2**25  # logits of a block on a GPU, where large ones are faster


def score_hidden(
    hidden_CD: Tensor, lm_head: nn.Module, target_ids_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(logprobs_C with gradient, entropy_C without) of softmax(logits / temperature).

    Both float32, in nats.

    Args:
        hidden_CD: the final hidden states that predict the targets.
        lm_head: the output layer; a frozen linear layer takes the fast path.
        target_ids_C: int64.
        temperature: above 0.
    """
    is_plain = type(lm_head) is nn.Linear and lm_head.bias is None
    if is_plain and not lm_head.weight.requires_grad:
        logprobs_C, entropy_C = FrozenHead.apply(
            hidden_CD, lm_head.weight, target_ids_C, temperature
        )
        return logprobs_C, entropy_C
    return chunked(hidden_CD, lm_head, target_ids_C, temperature)


def take_positions(hidden_BTD: Tensor, row_C: Tensor, column_C: Tensor) -> Tensor:
    """[C, D]: the hidden states at (row, column), with a gradient summed in a fixed order.

    A prompt's last position is read once for each of its completions. On a CPU the gradient of
    hidden_BTD[row_C, column_C] adds those up on several threads by atomic additions, in no fixed
    order: two runs with one seed could then differ in their last digits.
    """
    return hidden_BTD.flatten(0, 1).index_select(0, row_C * hidden_BTD.shape[1] + column_C)


class FrozenHead(torch.autograd.Function):
    """Log-probs and entropies under a frozen lm_head; gradient to the hidden states only.

    The vocabulary is processed in blocks whose logits stay in the cache, with a running maximum (as
    in flash attention) and a running sum of p W. Letters: V vocabulary, D width, c tokens of a
    chunk, v of a block.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_CD: Tensor, weight_VD: Tensor, target_ids_C: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """One pass over the chunks: log-probs, entropies and, where asked, the unit gradients."""
        has_grad = ctx.needs_input_grad[0]
        logprobs_C = hidden_CD.new_empty(hidden_CD.shape[0], dtype=torch.float32)
        entropy_C = torch.empty_like(logprobs_C)
        unit_grad_CD = torch.empty_like(hidden_CD) if has_grad else None
        for start in range(0, hidden_CD.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            sums = _RunningSums(hidden_CD[part], target_ids_C[part], has_grad)
            for first in range(0, weight_VD.shape[0], sums.block):
                sums.add(first, weight_VD[first : first + sums.block], temperature)
            logprobs_C[part], entropy_C[part] = sums.logprobs(), sums.entropy()
            if unit_grad_CD is not None:
                unit_grad_CD[part] = sums.unit_grad(weight_VD, temperature)
        if unit_grad_CD is not None:
            ctx.save_for_backward(unit_grad_CD)
        ctx.mark_non_differentiable(entropy_C)
        return logprobs_C, entropy_C

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_C: Tensor, grad_entropy_C: Tensor
    ) -> tuple[Tensor, None, None, None]:
        """The unit gradients, each times its token's gradient."""
        (unit_grad_CD,) = ctx.saved_tensors
        return unit_grad_CD * grad_logprobs_C.unsqueeze(-1).to(unit_grad_CD.dtype), None, None, None


def chunked(
    hidden_CD: Tensor, lm_head: nn.Module, target_ids_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As `score_hidden`, through any lm_head; logits are recomputed in the backward pass."""
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


class _RunningSums:
    """Sums over a chunk's logits, shifted by the largest logit so far."""

    def __init__(self, hidden_cD: Tensor, target_ids_c: Tensor, has_grad: bool) -> None:
        self.hidden_cD, self.target_ids_c1 = hidden_cD, target_ids_c.unsqueeze(-1)
        wide = hidden_cD.new_zeros(hidden_cD.shape[0], 1, dtype=torch.float32)
        self.shift_c1 = torch.full_like(wide, -torch.inf)
        self.target_c1 = wide.clone()  # the target's logit
        self.total_c1 = wide.clone()  # sum of exp(logit - shift)
        self.mean_c1 = wide.clone()  # sum of exp(logit - shift) * (logit - shift)
        self.weighted_cD = torch.zeros_like(hidden_cD, dtype=torch.float32) if has_grad else None
        is_on_cpu = hidden_cD.device.type == "cpu"
        self.block = CPU_BLOCK if is_on_cpu else max(1, BLOCK_ELEMENTS // hidden_cD.shape[0])

    def add(self, first: int, weight_vD: Tensor, temperature: float) -> None:
        """The block of the vocabulary that starts with token `first`."""
        shape = (self.hidden_cD.shape[0], weight_vD.shape[0])
        logits_cv = _buffer("logits", shape, weight_vD.dtype, weight_vD.device)
        torch.mm(self.hidden_cD, weight_vD.T, out=logits_cv)
        if logits_cv.dtype != torch.float32:
            wide_cv = _buffer("wide", shape, torch.float32, weight_vD.device)
            logits_cv = wide_cv.copy_(logits_cv)
        if temperature != 1:
            logits_cv.div_(temperature)
        place_c1 = self.target_ids_c1 - first
        is_here_c1 = (place_c1 >= 0) & (place_c1 < shape[1])
        found_c1 = logits_cv.gather(-1, place_c1.clamp_(0, shape[1] - 1))
        self.target_c1 = torch.where(is_here_c1, found_c1, self.target_c1)
        self._shift_to(torch.maximum(self.shift_c1, logits_cv.amax(-1, keepdim=True)))
        logits_cv.sub_(self.shift_c1)
        exp_cv = _buffer("exp", shape, torch.float32, logits_cv.device)
        torch.exp(logits_cv, out=exp_cv)
        self.mean_c1 += torch.linalg.vecdot(exp_cv, logits_cv).unsqueeze(-1)
        self.total_c1 += exp_cv.sum(-1, keepdim=True)
        if self.weighted_cD is None:
            return
        if weight_vD.dtype == torch.float32:
            torch.addmm(self.weighted_cD, exp_cv, weight_vD, out=self.weighted_cD)
        else:
            self.weighted_cD += exp_cv.to(weight_vD.dtype) @ weight_vD

    def _shift_to(self, shift_c1: Tensor) -> None:
        """Rescales the sums to a new shift."""
        if self.shift_c1.device.type == "cpu" and torch.equal(shift_c1, self.shift_c1):
            return
        lowered_c1 = self.shift_c1 - shift_c1  # at the first block -inf, and the sums are 0
        factor_c1 = lowered_c1.exp()
        lowered_c1 = torch.where(self.total_c1 > 0, lowered_c1, 0.0)
        self.mean_c1 = factor_c1 * (self.mean_c1 + lowered_c1 * self.total_c1)
        self.total_c1 = factor_c1 * self.total_c1
        if self.weighted_cD is not None:
            self.weighted_cD.mul_(factor_c1)
        self.shift_c1 = shift_c1

    def logprobs(self) -> Tensor:
        """[c]."""
        return (self.target_c1 - self.shift_c1 - self.total_c1.log()).squeeze(-1)

    def entropy(self) -> Tensor:
        """[c]."""
        return (self.total_c1.log() - self.mean_c1 / self.total_c1).squeeze(-1)

    def unit_grad(self, weight_VD: Tensor, temperature: float) -> Tensor:
        """[c, D]: (W[target] - p W) / temperature."""
        assert self.weighted_cD is not None
        expected_cD = self.weighted_cD.div_(self.total_c1)
        target_cD = weight_VD.index_select(0, self.target_ids_c1.squeeze(-1))
        return (target_cD - expected_cD).div_(temperature).to(weight_VD.dtype)


def _buffer(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """This thread's buffer of that name, enlarged if it is too small.

    Buffers are kept: fresh memory costs a page fault every 4 KiB.
    """
    size = shape[0] * shape[1]
    key = (name, dtype, device)
    kept = CONTEXT.buffers
    if key not in kept or kept[key].numel() < size:
        kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size].view(shape)
