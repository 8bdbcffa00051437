"""Use of the machine: this process's own work shows, GPUs by a fake library."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from rl_lora.runs import machine as system
from rl_lora.runs.machine import MachineMeter


def burn(seconds: float) -> float:
    """CPU seconds spent."""
    start = time.process_time()
    while time.process_time() - start < seconds:
        sum(range(1000))
    return time.process_time() - start


def test_the_process_s_own_seconds_are_counted() -> None:
    with MachineMeter() as meter:
        start = time.perf_counter()
        spent = burn(0.2)
        elapsed = time.perf_counter() - start
        metrics = meter.take()
    # 100: one core. Other threads of the process may add to it.
    assert metrics["system/process_cpu_percent"] > 60 * spent / elapsed
    assert 0 <= metrics["system/cpu_percent"] <= 100
    total_mb = psutil.virtual_memory().total / 1e6
    assert 0 < metrics["system/resident_mb"] < metrics["system/memory_used_mb"] * 2
    assert metrics["system/memory_used_mb"] / total_mb == pytest.approx(
        metrics["system/memory_percent"] / 100, abs=0.01
    )


def test_children_are_counted() -> None:
    code = "import time\nx = bytearray(80_000_000)\nprint('', flush=True)\ntime.sleep(60)"
    with MachineMeter() as meter:
        before = meter.take()["system/resident_mb"]
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            assert meter.take()["system/resident_mb"] > before + 70
        finally:
            child.kill()
            child.communicate()


def test_a_gpu_s_use_is_the_mean_of_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([10, 20, 60])
    monkeypatch.setattr(system, "_gpus", lambda: [0])
    monkeypatch.setattr(system, "_GPU_POLL_S", 0.01)
    monkeypatch.setattr(system.torch.cuda, "utilization", lambda index: next(seen, 30))
    monkeypatch.setattr(system.torch.cuda, "device_memory_used", lambda index: 5_000_000)
    with MachineMeter() as meter:
        time.sleep(0.3)
        metrics = meter.take()
        assert metrics["system/gpu0_memory_mb"] == 5.0
        assert 10 < metrics["system/gpu0_percent"] <= 30  # 10, 20, 60, then 30s: about 30
        thread = meter._thread
        assert thread.is_alive()
    assert not thread.is_alive()


def test_without_a_gpu_there_are_no_gpu_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system.torch.cuda, "is_available", lambda: False)
    with MachineMeter() as meter:
        assert not [key for key in meter.take() if "gpu" in key]
