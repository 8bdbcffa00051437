"""Hands versions to the sampler in memory, so that a slow or shared file system delays no step."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from rl_lora import distributed
from rl_lora.storage.directories import atomic_directory
from rl_lora.types import Adapter


@contextlib.contextmanager
def memory_folder(
    run_folder: Path, num_bytes: int, shared_memory: Path = Path("/dev/shm")
) -> Iterator[Path | None]:
    """A folder in memory for a run's versions of num_bytes in all, deleted at the end.

    None if there is no room for them. The name follows from the run's folder, which one job
    at a time may use, so that a resumed run replaces what a killed one left. Of a job's processes
    the first of each node makes it; None for all if one node lacks room.
    """
    name = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:16]
    folder = shared_memory / f"rl-lora-{name}"
    is_maker = distributed.local_rank() == 0
    has_room = _make(folder, num_bytes) if is_maker else True
    try:
        yield folder if all(distributed.gather(has_room, "the start")) else None
    finally:
        if is_maker and has_room:
            shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path, num_bytes: int) -> bool:
    """Whether there is room for so much in the folder, which is then made again."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        has_room = shutil.disk_usage(folder.parent).free >= num_bytes
        if has_room:
            folder.mkdir(mode=0o700)
    except OSError:  # no such file system, or another user's folder of this name
        return False
    return has_room


def keep_version(adapter: Adapter, folder: Path) -> None:
    """Copies a version to `folder`, whole or not at all, unless it is there already."""
    if adapter.path.parent != folder:
        with atomic_directory(folder / adapter.path.name) as scratch:
            shutil.copytree(adapter.path, scratch, dirs_exist_ok=True)
