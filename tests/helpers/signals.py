"""Sends a signal to a command at a known point: where it enters a function, at a call of a kind.

The command runs in a forked child of a process that has its libraries loaded, on one thread, since
a fork has none of its parent's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
import uuid
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from rl_lora import cli
from tests.helpers.processes import _MARK, command_line, kill, processes_of

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Signal:
    """What is sent at the first call of a function for which `when` holds.

    Example: Signal("rl_lora.train:publish", when=lambda: num_lines(metrics) == 2)
    """

    where: str  # "module:function" or "module:Class.method", as its caller looks it up
    when: Callable[[], bool] = lambda: True
    numbers: Sequence[int] = (signal.SIGTERM,)  # one after the other
    hangs: bool = False  # afterwards the function never returns


@dataclass(frozen=True)
class Ending:
    """What a command left."""

    code: int  # its exit code; -15: the signal itself has ended it
    lines: list[str] = field(default_factory=list)  # on stderr
    left: list[str] = field(default_factory=list)  # processes that it has started, still there
    memory: set[str] = field(default_factory=set)  # new files in shared memory that name it


def score(completion: str, reference: str) -> float:
    """A reward that needs no worker, and ties no group of different answers."""
    return zlib.crc32(completion.encode()) % 97 / 97


def num_lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.is_file() else 0


def send_at(one: Signal) -> None:
    """Makes this process send itself the signals at that point."""
    module, _, path = one.where.partition(":")
    owner: Any = import_module(module)
    *classes, name = path.split(".")
    for class_name in classes:
        owner = getattr(owner, class_name)
    original, to_come = getattr(owner, name), list(one.numbers)

    def watched(*arguments: Any, **options: Any) -> Any:
        if to_come and one.when():
            numbers, to_come[:] = list(to_come), []
            for number in numbers:
                os.kill(os.getpid(), number)
            if one.hangs:
                threading.Event().wait()
        return original(*arguments, **options)

    setattr(owner, name, watched)


def run(
    command: Sequence[str], *signals: Signal, prepare: Callable[[], None] = lambda: None
) -> Ending:
    """Runs `rl-lora COMMAND` in a child to its end; `prepare` is called there before."""
    import_module("reasoning_gym")  # the smoke job's data: once for all children
    mark, before = uuid.uuid4().hex, set(SHARED_MEMORY.iterdir())
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        code = 99
        try:
            os.close(reader)
            os.dup2(writer, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
            os.environ[_MARK] = mark  # for the processes that it starts
            torch.set_num_threads(1)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
            for one in signals:
                send_at(one)
            prepare()
            code = cli.main(command)
        except BaseException:  # noqa: BLE001 (whatever it is, it ends this process)
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):  # the parent has been killed
                sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, errors="replace") as errors:
        lines = errors.read().splitlines()
    _, status = os.waitpid(child, 0)
    _, alive = psutil.wait_procs(processes_of(mark), timeout=10)
    left = [command_line(one) for one in alive]
    kill(alive)
    new = {path.name for path in set(SHARED_MEMORY.iterdir()) - before}
    memory = {name for name in new if str(child) in name}
    return Ending(os.waitstatus_to_exitcode(status), lines, left, memory)
