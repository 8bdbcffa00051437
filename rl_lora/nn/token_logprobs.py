"""Token log-probs and entropies from hidden states, without [tokens x vocabulary] in memory.

Two ways, which differ in what the backward pass needs:

- `FrozenHead`: lm_head is a frozen matrix W without bias or adapter. The derivative of a token's
  log-prob by its hidden state, (W[target] - p W) / temperature, does not depend on the loss, so the
  forward pass computes it right away ([C, D]) and the backward pass is one multiplication: no
  logits are kept, and none are computed twice.
- `chunked`: any lm_head (with an adapter, trained in full, with bias). The backward pass recomputes
  a chunk's logits by activation checkpointing.

`plain` is the slow reference that the tests compare both with.

Compiled, which a GPU wants, what happens to the logits element by element is one kernel, and they
are read and written in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rl_lora.nn.context import CONTEXT

CHUNK_ELEMENTS = 2**23  # logits of `chunked` in memory at once, 32 MiB in float32
CHUNK_TOKENS = 4096  # of `FrozenHead` at once; only [tokens, D] is kept
CPU_BLOCK = 1024  # of the vocabulary: logits stay in the cache, and MKL is fastest (LOG.md)
BLOCK_ELEMENTS = 2**25  # logits at once on a GPU, where large products are faster
# Chunks and blocks of a compiled head on a GPU are larger by this factor: it needs a sixth of the
# memory for each logit, and a small model waits for the host to start each block (LOG.md).
COMPILED_FACTOR = 4


def score_hidden(
    hidden_CD: Tensor,
    lm_head: nn.Module,
    target_ids_C: Tensor,
    temperature: float,
    *,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """(logprobs_C with gradient, entropy_C without) of softmax(logits / temperature).

    Both float32, in nats.

    Args:
        hidden_CD: the final hidden states that predict the targets.
        lm_head: the output layer; a frozen linear layer takes the fast path.
        target_ids_C: int64.
        temperature: above 0.
        is_compiled: compile the element-wise part.
    """
    is_plain = type(lm_head) is nn.Linear and lm_head.bias is None
    if is_plain and not lm_head.weight.requires_grad:
        logprobs_C, entropy_C = FrozenHead.apply(
            hidden_CD, lm_head.weight, target_ids_C, temperature, is_compiled
        )
        return logprobs_C, entropy_C
    return chunked(hidden_CD, lm_head, target_ids_C, temperature, is_compiled=is_compiled)


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
        ctx: Any,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        target_ids_C: Tensor,
        temperature: float,
        is_compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        """One pass over the chunks: log-probs, entropies and, where asked, the unit gradients."""
        has_grad = ctx.needs_input_grad[0]
        logprobs_C = hidden_CD.new_empty(hidden_CD.shape[0], dtype=torch.float32)
        entropy_C = torch.empty_like(logprobs_C)
        unit_grad_CD = torch.empty_like(hidden_CD) if has_grad else None
        factor = COMPILED_FACTOR if is_compiled and hidden_CD.device.type != "cpu" else 1
        chunk = factor * CHUNK_TOKENS
        for start in range(0, hidden_CD.shape[0], chunk):
            part = slice(start, start + chunk)
            sums = _RunningSums(
                hidden_CD[part], target_ids_C[part], temperature, has_grad, factor * BLOCK_ELEMENTS
            )
            add = sums.add_compiled if is_compiled else sums.add
            for first in range(0, weight_VD.shape[0], sums.block):
                add(first, weight_VD[first : first + sums.block])
            logprobs_C[part], entropy_C[part] = sums.logprobs(), sums.entropy()
            if unit_grad_CD is not None:
                unit_grad_CD[part] = sums.unit_grad(weight_VD)
        if unit_grad_CD is not None:
            ctx.save_for_backward(unit_grad_CD)
        ctx.mark_non_differentiable(entropy_C)
        return logprobs_C, entropy_C

    @staticmethod
    def backward(
        ctx: Any, grad_logprobs_C: Tensor, grad_entropy_C: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The unit gradients, each times its token's gradient."""
        (unit_grad_CD,) = ctx.saved_tensors
        grad_CD = unit_grad_CD * grad_logprobs_C.unsqueeze(-1).to(unit_grad_CD.dtype)
        return grad_CD, None, None, None, None


def chunked(
    hidden_CD: Tensor,
    lm_head: nn.Module,
    target_ids_C: Tensor,
    temperature: float,
    *,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `score_hidden`, through any lm_head; logits are recomputed in the backward pass."""
    num_vocab = int(lm_head.weight.shape[0])  # type: ignore[index]
    is_on_cpu = hidden_CD.device.type == "cpu"
    chunk = max(1, (CHUNK_ELEMENTS if is_on_cpu else BLOCK_ELEMENTS) // num_vocab)
    score = _compiled(score_logits) if is_compiled else score_logits

    def score_chunk(hidden_cD: Tensor, target_ids_c: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_c, entropy_c = score(lm_head(hidden_cD), target_ids_c, temperature)
        return logprobs_c, entropy_c

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
    return score_logits(lm_head(hidden_CD), target_ids_C, temperature)


def score_logits(
    logits_CV: Tensor, target_ids_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(logprobs_C, entropy_C) of logits in any dtype."""
    logprobs_CV = (logits_CV.float() / temperature).log_softmax(-1)
    fixed_CV = logprobs_CV.detach()
    entropy_C = -(fixed_CV.exp() * fixed_CV).sum(-1)
    return logprobs_CV.gather(-1, target_ids_C.unsqueeze(-1)).squeeze(-1), entropy_C


class Sums(NamedTuple):
    """Of a chunk's logits so far, float32 [c, 1] each."""

    target_c1: Tensor  # the target's logit; 0: not met yet
    shift_c1: Tensor  # the largest logit
    total_c1: Tensor  # sum of exp(logit - shift)
    mean_c1: Tensor  # sum of exp(logit - shift) * (logit - shift)


def add_block(
    sums: Sums, wide_cv: Tensor, exp_cv: Tensor, place_c1: Tensor, temperature: float
) -> tuple[Sums, Tensor | None]:
    """Adds a block of the vocabulary.

    Args:
        sums: of the blocks before.
        wide_cv: the block's logits, float32; overwritten.
        exp_cv: float32; overwritten by exp(logit - shift).
        place_c1: the target's place in the block, int64; beyond its ends if it is in another one.
        temperature: divides the logits.

    Returns:
        The new sums, and the factor by which their new shift shrinks other sums of exp_cv; None: 1.
    """
    here = _reduced(sums, wide_cv, exp_cv, place_c1, temperature)
    if wide_cv.device.type == "cpu" and torch.equal(here.shift_c1, sums.shift_c1):
        total_c1, mean_c1 = sums.total_c1 + here.total_c1, sums.mean_c1 + here.mean_c1
        return Sums(here.target_c1, here.shift_c1, total_c1, mean_c1), None
    return joined(sums, here)


def _reduced(
    sums: Sums, wide_cv: Tensor, exp_cv: Tensor, place_c1: Tensor, temperature: float
) -> Sums:
    """Target and shift of the blocks so far, total and mean of this block."""
    if temperature != 1:
        wide_cv.div_(temperature)
    num_here = wide_cv.shape[1]
    is_here_c1 = (place_c1 >= 0) & (place_c1 < num_here)
    found_c1 = wide_cv.gather(-1, place_c1.clamp(0, num_here - 1))
    target_c1 = torch.where(is_here_c1, found_c1, sums.target_c1)
    shift_c1 = torch.maximum(sums.shift_c1, wide_cv.amax(-1, keepdim=True))
    wide_cv.sub_(shift_c1)
    torch.exp(wide_cv, out=exp_cv)
    mean_c1 = torch.linalg.vecdot(exp_cv, wide_cv).unsqueeze(-1)
    return Sums(target_c1, shift_c1, exp_cv.sum(-1, keepdim=True), mean_c1)


def joined(before: Sums, here: Sums) -> tuple[Sums, Tensor]:
    """The sums of the blocks before with those of `_reduced`, and the factor of `add_block`."""
    lowered_c1 = before.shift_c1 - here.shift_c1  # at the first block -inf, and the sums are 0
    factor_c1 = lowered_c1.exp()
    lowered_c1 = torch.where(before.total_c1 > 0, lowered_c1, 0.0)
    mean_c1 = factor_c1 * (before.mean_c1 + lowered_c1 * before.total_c1) + here.mean_c1
    total_c1 = factor_c1 * before.total_c1 + here.total_c1
    return Sums(here.target_c1, here.shift_c1, total_c1, mean_c1), factor_c1


def reduced_logits(
    sums: Sums, logits_cv: Tensor, place_c1: Tensor, temperature: float, has_grad: bool
) -> tuple[Sums, Tensor | None]:
    """`_reduced` for logits in any dtype; with has_grad, also the exponentials in that dtype.

    To be compiled: then the exponentials are all that is written per logit. `joined` is a graph of
    its own: Triton 3.6 fails on the kernel that would do both (TritonGPURemoveLayoutConversions).
    """
    wide_cv = logits_cv.to(torch.float32, copy=True)
    exp_cv = torch.empty_like(wide_cv)
    here = _reduced(sums, wide_cv, exp_cv, place_c1, temperature)
    return here, exp_cv.to(logits_cv.dtype) if has_grad else None


def rescaled_sum(weighted_cD: Tensor, factor_c1: Tensor, product_cD: Tensor) -> Tensor:
    """factor * weighted + product, in weighted's memory."""
    return weighted_cD.mul_(factor_c1).add_(product_cD)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One graph for all lengths."""
    return torch.compile(function, fullgraph=True, dynamic=True)


def aligned(block: int) -> int:
    """At least 1, and a multiple of 256 if it is that large: of logits whose rows begin at odd
    places, products on an H200 take up to 30 times as long (LOG.md)."""
    return max(1, block - block % 256 if block > 256 else block)


class _RunningSums:
    """Sums over a chunk's logits, shifted by the largest logit so far."""

    def __init__(
        self,
        hidden_cD: Tensor,
        target_ids_c: Tensor,
        temperature: float,
        has_grad: bool,
        block_elements: int = BLOCK_ELEMENTS,
    ) -> None:
        self.hidden_cD, self.target_ids_c1 = hidden_cD, target_ids_c.unsqueeze(-1)
        self.temperature = temperature
        zeros = [hidden_cD.new_zeros(hidden_cD.shape[0], 1, dtype=torch.float32) for _ in range(3)]
        self.sums = Sums(zeros[0], torch.full_like(zeros[0], -torch.inf), *zeros[1:])
        # The sum of p W, times the total.
        self.weighted_cD = torch.zeros_like(hidden_cD, dtype=torch.float32) if has_grad else None
        is_on_cpu = hidden_cD.device.type == "cpu"
        self.block = CPU_BLOCK if is_on_cpu else aligned(block_elements // hidden_cD.shape[0])

    def add(self, first: int, weight_vD: Tensor) -> None:
        """The block of the vocabulary that starts with token `first`."""
        shape = (self.hidden_cD.shape[0], weight_vD.shape[0])
        logits_cv = _buffer("logits", shape, weight_vD.dtype, weight_vD.device)
        torch.mm(self.hidden_cD, weight_vD.T, out=logits_cv)
        if logits_cv.dtype != torch.float32:
            wide_cv = _buffer("wide", shape, torch.float32, weight_vD.device)
            logits_cv = wide_cv.copy_(logits_cv)
        exp_cv = _buffer("exp", shape, torch.float32, weight_vD.device)
        place_c1 = self.target_ids_c1 - first
        self.sums, factor_c1 = add_block(self.sums, logits_cv, exp_cv, place_c1, self.temperature)
        if self.weighted_cD is None:
            return
        if factor_c1 is not None:
            self.weighted_cD.mul_(factor_c1)
        if weight_vD.dtype == torch.float32:
            torch.addmm(self.weighted_cD, exp_cv, weight_vD, out=self.weighted_cD)
        else:
            self.weighted_cD += exp_cv.to(weight_vD.dtype) @ weight_vD

    def add_compiled(self, first: int, weight_vD: Tensor) -> None:
        """As `add`."""
        logits_cv = self.hidden_cD @ weight_vD.T
        place_c1 = self.target_ids_c1 - first
        has_grad = self.weighted_cD is not None
        here, exp_cv = _compiled(reduced_logits)(
            self.sums, logits_cv, place_c1, self.temperature, has_grad
        )
        self.sums, factor_c1 = _compiled(joined)(self.sums, here)
        if has_grad:
            _compiled(rescaled_sum)(self.weighted_cD, factor_c1, exp_cv @ weight_vD)

    def logprobs(self) -> Tensor:
        """[c]."""
        target_c1, shift_c1, total_c1, _ = self.sums
        return (target_c1 - shift_c1 - total_c1.log()).squeeze(-1)

    def entropy(self) -> Tensor:
        """[c]."""
        return (self.sums.total_c1.log() - self.sums.mean_c1 / self.sums.total_c1).squeeze(-1)

    def unit_grad(self, weight_VD: Tensor) -> Tensor:
        """[c, D]: (W[target] - p W) / temperature."""
        assert self.weighted_cD is not None
        expected_cD = self.weighted_cD.div_(self.sums.total_c1)
        target_cD = weight_VD.index_select(0, self.target_ids_c1.squeeze(-1))
        return (target_cD - expected_cD).div_(self.temperature).to(weight_VD.dtype)


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
