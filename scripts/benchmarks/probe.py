"""An arm's own measurements, and how it answers commands."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Commands = dict[str, Callable[[], dict[str, Any]]]


def peak_reset(device: str) -> None:
    """Resets the peak of a GPU's allocated memory, or of resident memory (Linux)."""
    if device != "cpu":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def peak_mb(device: str) -> float:
    """Peak since the last reset, MiB: of PyTorch's memory on the GPU, or of resident memory."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)  # the step that is timed with it is finished, too
        return torch.cuda.max_memory_allocated(device) / 2**20
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
    """Answers commands until `end` or end of input."""
    print(json.dumps({"ready": True, **ready}), file=out, flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name == "end":
            return
        print(json.dumps(commands[name]()), file=out, flush=True)
