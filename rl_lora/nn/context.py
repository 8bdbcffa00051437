"""The hidden state of a forward pass: what the modules inside a model cannot be given as arguments.

It belongs to a thread, since the learner's threads work on different microbatches at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rl_lora.nn.block_attention import Blocks
    from rl_lora.nn.segments import AttentionLayout, Segment


class ForwardContext(threading.local):
    """One thread's state; every thread begins with these values."""

    def __init__(self) -> None:
        self.has_adapter = True  # False: LoRA layers compute the base model only
        self.layout: AttentionLayout | None = None  # of the row; None: plain causal attention
        # The last row's layout and its blocks, kept for the next pass over the same row.
        self.kept_layout: tuple[tuple[Segment, ...], torch.device, AttentionLayout] | None = None
        self.kept_blocks: tuple[AttentionLayout, tuple[int, int], Blocks | None] | None = None
        self.buffers: dict[Any, Tensor] = {}  # of `token_logprobs`, by name, dtype and device


CONTEXT = ForwardContext()


@contextlib.contextmanager
def adapters_off() -> Iterator[None]:
    """This thread's forward passes compute the base model only."""
    before = CONTEXT.has_adapter
    CONTEXT.has_adapter = False
    try:
        yield
    finally:
        CONTEXT.has_adapter = before


@contextlib.contextmanager
def attending_by(layout: AttentionLayout | None) -> Iterator[None]:
    """This thread's forward passes attend by the layout."""
    before = CONTEXT.layout
    CONTEXT.layout = layout
    try:
        yield
    finally:
        CONTEXT.layout = before
