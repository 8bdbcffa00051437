"""The hidden state of a forward pass: what the modules inside a model cannot be given as arguments.

It belongs to a thread, since the learner's threads work on different microbatches at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor


class ForwardContext(threading.local):
    """One thread's state; every thread begins with these values."""

    def __init__(self) -> None:
        self.has_adapter = True  # False: LoRA layers compute the base model only
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
