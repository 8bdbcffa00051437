"""The adapters' on-off switch: off means the base alone, for what this thread computes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_state = threading.local()  # learner threads work at once


@contextlib.contextmanager
def adapters_off() -> Iterator[None]:
    """The base alone, for what this thread computes."""
    before = adapters_are_off()
    _state.is_off = True
    try:
        yield
    finally:
        _state.is_off = before


def adapters_are_off() -> bool:
    """Whether this thread is inside `adapters_off`."""
    return bool(getattr(_state, "is_off", False))
