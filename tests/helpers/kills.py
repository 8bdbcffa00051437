"""Kills a job in the middle of its run, so that nothing of ours is cleaned up.

A job runs in a forked child of a process that has its libraries loaded, on one thread, since a fork
has none of its parent's. It dies before its n-th operation that changes files, those of forked
children (a study's cells) included, or after some seconds.
"""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

_READING = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv", "os.fork", "os.kill")
_WRITING_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_PATIENCE_S = 60.0  # for the children of a killed process to end


@dataclass(frozen=True)
class Kill:
    """When a process dies. Example: Kill(at_operation=120, is_group=True)"""

    at_operation: int | None = None  # before this operation that changes files, from 1
    after_s: float | None = None  # or so many seconds after the fork
    is_group: bool = True  # its children die with it; False: only the process that got so far
    is_forked: bool = True  # the job is a forked child; False: a separate process

    def __str__(self) -> str:
        text = f"operation {self.at_operation}" if self.at_operation else f"{self.after_s:.2f} s"
        text += "" if self.is_group else " by itself"
        return text if self.is_forked else f"{text} in a separate process"


@dataclass(frozen=True)
class Ending:
    """How a child ended."""

    code: int  # its exit code; -9: killed
    was_killed: bool  # itself, or one of its children
    num_operations: int  # that change files, its children's included
    seconds: float


def in_a_child(work: Callable[[], Any], log: Path, kill: Kill | None = None) -> Ending:
    """Runs work() in a forked child, which may be killed; returns after all its children are gone.

    Args:
        work: returns an exit code, or None for 0.
        log: gets what it prints.
        kill: when it dies; None: never.

    Raises:
        AssertionError: a child of the child outlives it.
    """
    kill = kill or Kill()
    count = mmap.mmap(-1, 8)  # shared with the child's children
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        with _ending_here(log):
            os.setpgid(0, 0)
            _count_operations(count, kill)
            os._exit(work() or 0)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # the child has done it
        os.setpgid(child, child)
    code, was_killed = _wait(child, kill)
    seconds = time.monotonic() - started
    (num_operations,) = struct.unpack("q", count)
    was_killed |= kill.at_operation is not None and num_operations >= kill.at_operation
    return Ending(code, was_killed, num_operations, seconds)


def in_a_process(command: Sequence[str], log: Path, kill: Kill) -> Ending:
    """As `in_a_child`, for a command line in a separate process, which dies after some seconds;
    its file operations are not counted."""
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    code, was_killed = _wait(process.pid, kill)
    process.returncode = code  # it has been waited for
    return Ending(code, was_killed, 0, time.monotonic() - started)


def _wait(pid: int, kill: Kill) -> tuple[int, bool]:
    """(exit code, whether a signal was sent) of a process, the leader of its group, once all of the
    group have ended."""
    is_late = kill.after_s is not None and not _has_ended(pid, kill.after_s)
    if is_late:
        (os.killpg if kill.is_group else os.kill)(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    deadline = time.monotonic() + _PATIENCE_S
    while left := [process for process in psutil.process_iter() if _is_of(process, pid)]:
        assert time.monotonic() < deadline, f"these outlive the process that was killed: {left}"
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(status), is_late


@contextlib.contextmanager
def _ending_here(log: Path) -> Iterator[None]:
    """The child's own world; it never returns to the parent's code."""
    import traceback

    try:
        file = log.open("w", encoding="utf-8")
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        sys.stdout = sys.stderr = file
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
        os.fsync = lambda fd: None  # a kill loses nothing that was written
        # The server that cells are forked from would import the libraries again.
        forked = multiprocessing.get_context("fork")
        multiprocessing.get_context = lambda method=None: forked  # type: ignore[assignment]
        yield
    except BaseException:  # noqa: BLE001 (whatever it is, it ends this process)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(1)


def _count_operations(count: mmap.mmap, kill: Kill) -> None:
    """Counts operations that change files, and dies before the one at which it should."""

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if (event.startswith("os.") and event not in _READING) or (
            event == "open" and arguments[2] & _WRITING_FLAGS
        ):
            (number,) = struct.unpack("q", count)
            count[:] = struct.pack("q", number + 1)
            if number + 1 == kill.at_operation:
                if kill.is_group:
                    os.killpg(0, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)


def _has_ended(pid: int, timeout_s: float) -> bool:
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)


def _is_of(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def kill_9_at_line(command: Sequence[str], file: Path, wanted: int, cwd: Path) -> None:
    """Starts the command and kills it once the file has `wanted` lines, if it lives so long."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    while process.poll() is None and (
        not file.exists() or len(file.read_text().splitlines()) < wanted
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
