"""Stages side by side: they start at once, and what is timed or fills the card runs by itself.

Most of a stage is imports, compilation and the start of an engine, on one core of the host. So all
stages start together; each that takes a turn says when it is ready for it and waits. Once all are
ready or have ended (or the time for that is over), they run their part one after the other.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

FOLDER_VARIABLE = "GPU_CHECK_TURNS"  # of a stage's process: where stages meet; unset: no others run
_POLL_S = 0.1
_GO = "go"


@contextlib.contextmanager
def turn(own: Path) -> Iterator[None]:
    """Waits until all stages are ready, and then until no other one has its turn.

    own: the stage's file in the folder where stages meet, which says that it is ready.
    """
    own.touch()
    while not own.with_name(_GO).exists():
        time.sleep(_POLL_S)
    with FileLock(own.with_name("turn.lock")):
        yield


def wait_until_ready(folder: Path, stages: set[str], ended: set[str], limit_s: float) -> set[str]:
    """Lets the turns begin; returns the stages, by their file, that were then neither ready nor
    among `ended`, which others add to."""
    end = time.monotonic() + limit_s
    while True:
        missing = {stage for stage in stages if not (folder / stage).exists()} - ended
        if not missing or time.monotonic() > end:
            (folder / _GO).touch()
            return missing
        time.sleep(_POLL_S)
