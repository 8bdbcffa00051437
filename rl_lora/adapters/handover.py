"""Hands versions to the sampler in memory, so that a slow or shared file system delays no step."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from rl_lora.storage.directories import atomic_directory
from rl_lora.types import Adapter


@contextlib.contextmanager
def memory_folder(
    run_folder: Path, num_bytes: int, shared_memory: Path = Path("/dev/shm")
) -> Iterator[Path | None]:
    """A folder in memory for a run's versions of num_bytes each, deleted at the end.

    None if there is no room for four of them. The name follows from the run's folder, which one
    process at a time may use, so that a resumed run replaces what a killed one left.
    """
    name = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:16]
    folder = shared_memory / f"rl-lora-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        has_room = shutil.disk_usage(shared_memory).free >= 4 * num_bytes
        if has_room:
            folder.mkdir(mode=0o700)
    except OSError:  # no such file system, or another user's folder of this name
        has_room = False
    try:
        yield folder if has_room else None
    finally:
        if has_room:
            shutil.rmtree(folder, ignore_errors=True)


def keep_version(adapter: Adapter, folder: Path) -> None:
    """Copies a version to `folder`, whole or not at all, unless it is there already."""
    if adapter.path.parent != folder:
        with atomic_directory(folder / adapter.path.name) as scratch:
            shutil.copytree(adapter.path, scratch, dirs_exist_ok=True)
