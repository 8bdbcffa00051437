"""Stages for tests/scripts/test_gpu_check.py: one that passes, and each way not to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

from gpu_stages.stages import CheckFailedError, Context


def passes(context: Context) -> dict[str, Any]:
    return {"device": str(context.device), "speed": {"tokens_per_s": 1234.5}}


def takes_a_turn(context: Context) -> dict[str, Any]:
    with context.turn():
        first = time.monotonic()
        sum(range(10**6))
        return {"turn": [first, time.monotonic()], "is_shared": context.is_shared}


takes_another_turn = takes_a_turn


def fails(context: Context) -> dict[str, Any]:
    context.keep({"kept": 1})
    raise ValueError("first line\nthe last line of it")


def fails_a_check(context: Context) -> dict[str, Any]:
    raise CheckFailedError("KL is over its limit", {"kl": 0.5})


def hangs(context: Context) -> dict[str, Any]:
    print("waiting", flush=True)
    threading.Event().wait()
    return {}


def is_killed(context: Context) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def exits(context: Context) -> dict[str, Any]:
    print("gone", flush=True)
    os._exit(0)


def exits_after_figures(context: Context) -> dict[str, Any]:
    context.keep({"kept": 1})
    print("gone", flush=True)
    os._exit(0)


def leaves_a_process(context: Context) -> dict[str, Any]:
    child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    return {"pid": child.pid}
