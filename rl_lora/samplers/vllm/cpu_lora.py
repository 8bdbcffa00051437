"""LoRA on vLLM's CPU back end by plain matrix products, for batches that share one adapter.

Used where adapters are not merged into the weights: in bfloat16, and with
sampling.merge_adapter=false. vLLM's own CPU path (vllm/lora/ops/torch_ops) gathers a copy of A and
B for every token before an einsum (tokens x width x rank numbers per layer), which slows decoding
to a third of the base's speed. Here all sequences of a step use one adapter version, so that two
matmuls per layer are enough. A batch with several adapters takes vLLM's path.

Two defects of that path are avoided: `add_lora_logits` gives sequences without an adapter the last
adapter's lm_head (index -1), and fails on prompt log-probs, which need more rows of logits than
there are sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform

NO_ADAPTER = -1

# What is overridden below, as vLLM 0.32 declares it; a vLLM with other signatures is left as it is.
_SIGNATURES = {
    "update_metadata": ["self", "mapping", "lora_index_to_id", "max_loras", "vocab_size", "kwargs"],
    "add_lora_embedding": ["self", "y", "x", "lora_b_stacked", "add_inputs", "kwargs"],
    "add_lora_linear": [
        *("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"),
        *("buffer", "kwargs"),
    ],
    "add_lora_logits": [
        *("self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer", "kwargs"),
    ],
}


class MatmulPunicaWrapper(PunicaWrapperCPU):
    """vLLM's CPU wrapper with a path of plain matmuls for batches that share one adapter.

    Letters: T tokens, I inputs, O outputs, R rank (the slot's), L adapter slots.
    """

    _slot: int | None = None  # the batch's one adapter slot, NO_ADAPTER, or None: several

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Notes which adapter slot the next batch uses, if it is only one."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        lora_ids = set(mapping.index_mapping) | set(mapping.prompt_mapping)
        self._slot = None
        if len(lora_ids) == 1:
            (lora_id,) = lora_ids
            self._slot = lora_index_to_id.index(lora_id) if lora_id > 0 else NO_ADAPTER

    # limits: vLLM's signature
    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """y[T, slices of O] += scale * (x[T, I] A^T) B^T, slice by slice (q, k and v, say)."""
        if self._slot is None:
            super().add_lora_linear(
                y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, buffer=buffer, **kwargs
            )
            return
        if self._slot == NO_ADAPTER:
            return
        offset = 0
        for a_L1RI, b_L1OR, width in zip(
            lora_a_stacked, lora_b_stacked, output_slices, strict=True
        ):
            y_TO = y.view(-1, y.shape[-1])[:, offset : offset + width]
            _add_product(y_TO, x.view(-1, x.shape[-1]), a_L1RI, b_L1OR, self._slot, scale)
            offset += width

    def add_lora_embedding(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: Tensor,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """y[T, O] += x[T, R] B^T; x holds the tokens' rows of A."""
        if self._slot is None or not add_inputs:
            super().add_lora_embedding(y, x, lora_b_stacked, add_inputs, **kwargs)
        elif self._slot != NO_ADAPTER:
            y.addmm_(x.to(y.dtype), _of_slot(lora_b_stacked, self._slot).T.to(y.dtype))

    # limits: vLLM's signature
    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """y[T, vocabulary] += scale * (x[T, I] A^T) B^T; T counts rows of logits here."""
        if self._slot is None:
            super().add_lora_logits(
                y, x, lora_a_stacked, lora_b_stacked, scale, buffer=buffer, **kwargs
            )
        # Most adapters do not touch lm_head, whose rows are the widest of all.
        elif self._slot != NO_ADAPTER and bool(_of_slot(lora_b_stacked, self._slot).any()):
            y_TO = y.view(-1, y.shape[-1])
            x_TI = x.view(-1, x.shape[-1])
            _add_product(y_TO, x_TI, lora_a_stacked, lora_b_stacked, self._slot, scale)


def _of_slot(stacked: Tensor, slot: int) -> Tensor:
    """[rows, columns] of one adapter, out of [L, 1, rows, columns] or [L, rows, columns]."""
    return stacked[slot].view(stacked.shape[-2:])


def _add_product(
    y_TO: Tensor, x_TI: Tensor, a_L1RI: Tensor, b_L1OR: Tensor, slot: int, scale: float
) -> None:
    """Adds the product to y, which may be a view; in float32 up to the sum, as vLLM's kernels."""
    hidden_TR = x_TI.float() @ _of_slot(a_L1RI, slot).float().T
    b_OR = _of_slot(b_L1OR, slot)
    width = min(y_TO.shape[1], b_OR.shape[0])  # either may be padded
    b_RO = b_OR[:width].T
    if y_TO.dtype == torch.float32:
        y_TO[:, :width].addmm_(hidden_TR, b_RO.float(), alpha=scale)
    else:
        y_TO[:, :width] += ((hidden_TR @ b_RO.float()) * scale).to(y_TO.dtype)


def is_supported() -> bool:
    """Whether this vLLM declares the overridden methods as listed above."""
    return all(
        list(inspect.signature(getattr(PunicaWrapperCPU, name)).parameters) == names
        for name, names in _SIGNATURES.items()
    ) and hasattr(PunicaWrapperBase, "token_lora_indices")


@contextmanager
def installed() -> Iterator[bool]:
    """Engines made inside use `MatmulPunicaWrapper`; yields whether they do.

    vLLM asks the platform for the wrapper's class once, when an engine is made.
    """
    platform = type(current_platform)
    if not current_platform.is_cpu() or not is_supported():
        yield False
        return
    original = platform.__dict__.get("get_punica_wrapper")
    qualified_name = f"{MatmulPunicaWrapper.__module__}.{MatmulPunicaWrapper.__qualname__}"
    platform.get_punica_wrapper = classmethod(lambda cls: qualified_name)  # type: ignore[assignment]
    try:
        yield True
    finally:
        if original is None:
            del platform.get_punica_wrapper
        else:
            platform.get_punica_wrapper = original  # type: ignore[method-assign]
