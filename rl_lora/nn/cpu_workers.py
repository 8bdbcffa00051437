"""Runs a step's microbatches in parallel on a CPU's cores.

One thread for each of two microbatches beats two threads for one: a pass has many small operations
that keep only one core busy, and memory-bound ones overlap well with another pass's matmuls.
Results come in the microbatches' order, so that sums do not depend on which thread finishes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_cores(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """function(item) for each item, in order; the workers divide PyTorch's threads among them.

    An exception of the function is raised here; the number of threads is restored at the end.
    """
    num_threads = torch.get_num_threads()
    num_workers = min(num_threads, len(items))
    if num_workers <= 1:
        yield from map(function, items)
        return
    share = num_threads // num_workers
    try:
        torch.set_num_threads(share)
        with ThreadPoolExecutor(
            num_workers, "learner", initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            try:
                yield from pool.map(function, items)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        torch.set_num_threads(num_threads)
