"""Every way in which a job of several processes can end, without a model; run by
tests/test_distributed.py.

One process loads the libraries and forks the ranks of one job after another. Each ends as a program
does, with its own exit code. Like torchrun and `srun --kill-on-bad-exit`, it sends SIGTERM to the
others once a rank has failed.

    python -m tests.helpers.endings FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState  # noqa: F401 (loaded before the ranks are forked)

from rl_lora import cli, distributed
from rl_lora.errors import UserError

EXAMPLES: tuple[str, ...] = ()
AFTER_INTERRUPT = "; RESUME"
IS_DIVIDED = True
TIMEOUT_S = 20.0
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")


def wait_for_ever() -> None:
    """Busy, as far as the other ranks know; signals are handled."""
    threading.Event().wait()


def fail(error: Exception) -> None:
    raise error


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exchanges(rank: int) -> None:
    """Everything that ranks can do together, and a difference at the end."""
    num = distributed.world_size()
    assert (distributed.rank(), num) == (rank, 3)
    assert (distributed.local_rank(), distributed.local_size()) == (rank, 3)
    assert distributed.is_main() == (rank == 0)
    assert distributed.gather(rank * 10, "a") == [0, 10, 20]
    called = []
    assert distributed.from_main(lambda: called.append(rank) or "main's", "b") == "main's"  # type: ignore[func-returns-value]
    assert called == ([0] if rank == 0 else [])
    tensor = torch.tensor([[1.0, 0.5]]) * (rank + 1)
    metrics = distributed.add_up(tensor, "c")
    assert tensor.tolist() == [[6.0, 3.0]]
    assert metrics["system/all_reduce_bytes"] == 8
    assert metrics["system/all_reduce_s"] > 0
    made = FOLDER / "made"
    with distributed.local_main_first():
        assert made.exists() == (rank > 0)
        made.touch()
    assert distributed.share([5, 1, 1, 1]) == [[0], [1, 3], [2]]
    distributed.check_same("same", "first setting", "no fix")
    distributed.check_same(rank // 2, "second setting", "give all the same file")


def on(number: int, act: Callable[[], None], else_: Callable[[], None] = lambda: None) -> Any:
    """A mode in which one rank does something before the exchange 'the sum'."""

    def mode(rank: int) -> None:
        act() if rank == number else else_()
        distributed.gather(None, "the sum")

    return mode


def other_phase(rank: int) -> None:
    distributed.gather(None, f"step {rank}")


def interrupt(number: int) -> Callable[[], None]:
    return lambda: signal.raise_signal(number)


# name -> (processes, whether SIGTERM follows, what a rank does)
MODES: dict[str, tuple[int, bool, Callable[[int], None]]] = {
    "exchanges": (3, True, exchanges),
    "both mistaken": (2, True, lambda rank: fail(UserError(f"no such file {rank}"))),
    "one mistaken": (2, True, on(1, lambda: fail(UserError("no such file")))),
    "one mistaken before joining": (2, True, on(1, lambda: None)),
    "one mistaken, the main one busy": (
        2,
        True,
        on(1, lambda: fail(UserError("no such file")), wait_for_ever),
    ),
    "one has a bug": (2, True, on(1, lambda: fail(KeyError("bug")))),
    "main has a bug": (2, True, on(0, lambda: fail(KeyError("bug")))),
    "one hangs": (3, True, on(1, wait_for_ever)),
    "main hangs": (2, True, on(0, wait_for_ever)),
    "one killed": (3, False, on(1, die)),
    "one killed, the other busy": (2, True, on(1, die, wait_for_ever)),
    "main killed": (2, False, on(0, die)),
    "another phase": (2, True, other_phase),
    "interrupted": (2, False, lambda rank: signal.raise_signal(signal.SIGINT)),
    "one interrupted": (2, True, on(1, interrupt(signal.SIGINT))),
    "cancelled": (2, False, on(0, interrupt(signal.SIGTERM), interrupt(signal.SIGTERM))),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mode")


def run(arguments: argparse.Namespace) -> int:
    """The command of a rank."""
    rank = int(os.environ["RANK"])
    if arguments.mode.endswith("before joining") and rank == 1:
        raise UserError("no such file")
    timeout_s = 1.0 if arguments.mode.endswith("hangs") else TIMEOUT_S
    with distributed.joined("cpu", timeout_s):
        MODES[arguments.mode][2](rank)
    return 0


def become_rank(rank: int, num: int, port: int, mode: str) -> int:
    """A rank, from its environment to its exit code."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "LOCAL_WORLD_SIZE": num}
    os.environ |= {key: str(value) for key, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(FOLDER / f"{mode}.{rank}.{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    distributed._HEAR_S = 1.0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    sys.modules["rl_lora.commands.end"] = sys.modules[__name__]
    cli.COMMANDS["end"] = ("end", "end in this way")
    return cli.main(["end", mode])


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def codes_of(mode: str) -> list[int]:
    """Runs a job; the exit codes by rank, -9: SIGKILL."""
    num, is_terminating, _ = MODES[mode]
    port, running, codes = free_port(), {}, [0] * num
    for rank in range(num):
        if (child := os.fork()) == 0:
            sys.exit(become_rank(rank, num, port, mode))
        running[child] = rank
    while running:
        child, status = os.wait()
        codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
        if is_terminating and any(codes):
            for other in running:
                os.kill(other, signal.SIGTERM)
            is_terminating = False
    return codes


if __name__ == "__main__":
    codes: dict[str, Any] = {mode: codes_of(mode) for mode in MODES}
    (FOLDER / "codes.json").write_text(json.dumps({**codes, "host": platform.node()}))
