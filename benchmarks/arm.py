"""One arm of the benchmark in a process of its own: reads commands, writes JSON lines.

`python -m benchmarks.arm NAME` prints {"ready": ...} once it is built, then answers each line on
standard input (`step`, or a command of that arm) with one line; `end` ends it. An arm that waits
uses no CPU, so that arms can take turns.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from benchmarks.workload import Size

Commands = dict[str, Callable[[], dict[str, Any]]]


def peak_reset() -> None:
    """Starts a new count of the peak resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mb() -> float:
    """Peak resident memory since the last reset, MiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def matmul_peak(size: int = 1024, repeats: int = 9) -> float:
    """GFLOP/s of a square float32 matmul with all threads: the median of the repeats."""
    import torch

    a, b, out = (torch.randn(size, size) for _ in range(3))
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    return 2e-9 * size**3 / sorted(seconds[2:])[repeats // 2]


def serve(commands: Commands, out: TextIO, ready: dict[str, Any]) -> None:
    """Answers commands until `end` or the end of input."""
    print(json.dumps({"ready": True, **ready}), file=out, flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name == "end":
            return
        print(json.dumps(commands[name]()), file=out, flush=True)


def main() -> None:
    """Builds the arm that is named, at the size given as key=value arguments."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to standard error
    name, *options = sys.argv[1:]
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Size)}
    pairs = (option.split("=", 1) for option in options)
    size = Size(**{key: kinds[key](value) for key, value in pairs})
    if name == "trl":
        from benchmarks.trl_arm import run

        run(size, out)
    else:
        from benchmarks.our_arms import ARMS

        with ARMS[name](size) as (commands, ready):
            serve(commands, out, ready)


if __name__ == "__main__":
    main()
