"""Sums in one order, whatever the threads do: what a CPU needs to compute the same bytes again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.utils.deterministic

_OPTIONS: Any = torch.utils.deterministic  # its module has properties


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """PyTorch's deterministic kernels inside, in all threads of the process.

    On a CPU the gradient of x[index] is otherwise added up by atomic additions where several
    threads compute it, in the order in which they come; a model may index anywhere. An operation
    that has no such kernel warns.
    """
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filled = _OPTIONS.fill_uninitialized_memory
    _OPTIONS.fill_uninitialized_memory = False  # it would write to every new tensor
    torch.use_deterministic_algorithms(True, warn_only=not was_on or warned_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        _OPTIONS.fill_uninitialized_memory = filled


def fix_num_threads(device: torch.device) -> None:
    """Lets MKL compute with PyTorch's number of threads and no longer choose a number itself.

    It may (MKL_DYNAMIC) until `torch.set_num_threads` is called for the first time, which would
    then happen somewhere in the middle of a run, and elsewhere in a resumed one.

    A GPU's host computes in one thread, unless OMP_NUM_THREADS is set: what it has to compute is
    little, and to wait for 15 other threads took 8 ms an operation on a busy machine (LOG.md).
    """
    has_choice = device.type == "cpu" or "OMP_NUM_THREADS" in os.environ
    torch.set_num_threads(torch.get_num_threads() if has_choice else 1)
