"""Runs a step's microbatches side by side on a CPU's cores.

One thread for each of two microbatches beats two threads for one: a pass has many small operations
that one core does alone while the other waits, and memory-bound ones go better beside a matmul.
Results come in the microbatches' order, so that sums do not depend on which thread was first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_cores(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """function(item) for each item, in order; PyTorch's threads are shared out among the workers.

    An exception of the function is raised here, and the threads are given back.
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
