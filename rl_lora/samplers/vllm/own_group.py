"""A `torch.distributed` for vLLM's engine, with this process only.

vLLM uses the default process group if there is one. In a job of several processes it would make its
own groups together with all of them, so that engines start together or not at all, and destroy all
groups at its end, the job's too; its executor for such jobs, "external_launcher", also has the
engines agree on the size of their caches. Here each engine starts, samples, fails and ends on its
own. Its groups need neither a port nor a file, on which two engines of a node might collide.

What PyTorch (2.11, 2.13) knows of groups is in one object, which may be exchanged. That is done for
as long as an engine is made or shut down; no other thread may use `torch.distributed` meanwhile.
While it samples, an engine of one process uses its groups for nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d


class _World(distributed_c10d._World):
    """The engine's groups, by PyTorch's names for what is known of them."""

    # In the base class these are the process's only ones.
    pg_map: Any = None
    pg_names: Any = None
    pg_group_ranks: Any = None
    pg_backend_config: Any = None
    tags_to_pg: Any = None
    pg_to_tag: Any = None
    # Groups are named by counting them, and PyTorch's C++ part keeps the names of all.
    group_count: Any = 1_000_000

    def __init__(self) -> None:
        super().__init__()
        self.pg_map, self.pg_names, self.pg_group_ranks = {}, {}, {}
        self.pg_backend_config, self.tags_to_pg, self.pg_to_tag = {}, {}, {}


_world = _World()  # one, as vLLM's own state is


@contextlib.contextmanager
def own_group(backend: str) -> Iterator[None]:
    """Inside, where an engine is made, the default group is one of this process only.

    Args:
        backend: gloo, or nccl for an engine on a GPU.
    """
    with _exchanged():
        if not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        yield


def keep_job_groups() -> None:
    """Has vLLM destroy an engine's groups and no others, from now on.

    Whoever shuts the engine down: for one that was not closed it is the garbage collector (0.32).
    """
    core: Any = importlib.import_module("vllm.v1.engine.core")
    original = core.cleanup_dist_env_and_memory
    if not hasattr(original, "__wrapped__"):
        cleanup = functools.partial(_destroy_own_groups, original)
        core.cleanup_dist_env_and_memory = functools.update_wrapper(cleanup, original)


def _destroy_own_groups(cleanup: Callable[[], None]) -> None:
    """vLLM's cleanup of the groups that it has made, then that of the engine's default group.

    vLLM does not see the default one: it would destroy all groups of the process with it.
    """
    with _exchanged():
        _world.default_pg = None
        cleanup()
        for group in list(_world.pg_map):
            dist.destroy_process_group(group)


@contextlib.contextmanager
def _exchanged() -> Iterator[None]:
    """The engine's groups in place of the job's."""
    job, hook = distributed_c10d._world, sys.excepthook
    distributed_c10d._world = _world
    try:
        yield
    finally:
        distributed_c10d._world = job
        sys.excepthook = hook  # with a default group, PyTorch adds its rank to each traceback
