"""Persistent, killable worker processes with a deadline and a memory limit.

No signals and no pickle: a worker is an ordinary subprocess that communicates over pipes, so the
pool works in any thread, inside asyncio and under a multi-threaded parent, and never imports the
caller's `__main__`. A worker that misses its deadline is killed and replaced; if one dies on its
own, its request is retried once on a new worker.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards.workers.worker import encode

STARTUP_TIMEOUT_S = 120.0
DEFAULT_MEMORY_MB = 1024


class WorkerCannotStart(Exception):
    """The worker died or hung before it was ready."""


class Worker:
    """One subprocess. Starts immediately; `wait_ready` blocks until its imports are done."""

    def __init__(self, memory_mb: int, warm_up: dict[str, Any]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        # One thread per worker: a BLAS thread pool would use up address space under RLIMIT_AS.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "rewards.workers.worker"]
        self.process = subprocess.Popen(
            [*command, str(os.getpid()), str(memory_mb), json.dumps(warm_up)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            bufsize=0,
        )
        self.is_ready = False

    def wait_ready(self) -> None:
        """Raises WorkerCannotStart."""
        if not self.is_ready:
            try:
                self._receive(time.monotonic() + STARTUP_TIMEOUT_S)
            except OSError as error:
                raise WorkerCannotStart from error
            self.is_ready = True

    def has_started(self) -> bool:
        """Is it ready, or has it sent its ready message since?"""
        if not self.is_ready:
            assert self.process.stdout is not None
            poller = select.poll()
            poller.register(self.process.stdout.fileno(), select.POLLIN)
            return bool(poller.poll(0))
        return True

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """One request, one response. Raises WorkerCannotStart, TimeoutError, BrokenPipeError."""
        self.wait_ready()
        assert self.process.stdin is not None
        self.process.stdin.write(encode({**request, "timeout_s": timeout_s}))
        return self._receive(time.monotonic() + timeout_s)

    def _receive(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        poller = select.poll()
        poller.register(fd, select.POLLIN | select.POLLHUP)
        line = b""
        while not line.endswith(b"\n"):
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0 or not poller.poll(remaining_s * 1000):
                raise TimeoutError
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                raise BrokenPipeError  # it has exited or is about to
            line += chunk
        message: dict[str, Any] = json.loads(line)
        return message

    def exit_code(self) -> int | None:
        """Its exit code; None if it is still running."""
        try:
            return self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """Kill the process and reap it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class WorkerPool(contextlib.AbstractContextManager["WorkerPool"]):
    """Up to `num_workers` busy workers, started when first needed. Thread-safe.

    `num_spare` more are kept ready to replace a worker that is killed.
    """

    def __init__(
        self,
        num_workers: int = 1,
        timeout_s: float = 5.0,
        memory_mb: int = DEFAULT_MEMORY_MB,
        num_spare: int = 1,
        engine: str = "verify",
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be positive, got {timeout_s}")
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self.memory_mb = memory_mb
        self.num_spare = num_spare
        self.warm_up = {"op": engine, "gold": "\\sum_{k=1}^{n} k", "answer": "n", "rules": {}}
        self._available = threading.Condition()
        self._idle: list[Worker] = []
        self._workers: set[Worker] = set()
        self._num_busy = self._most_busy = 0
        self._is_closed = False
        self._pid = os.getpid()
        _POOLS.add(self)

    def request(self, request: dict[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        """The response, or {"status": "timeout" | "crashed"}. Blocks until a worker is free."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        num_deaths = num_kills = num_failed_starts = 0
        # SIGKILL comes from outside (or the kernel) and may hit every worker at once; the answer
        # must not be lost to that.
        while num_deaths < 2 and num_kills <= self.num_workers + self.num_spare + 1:
            worker = self._acquire()
            is_healthy = False
            try:
                response = worker.ask(request, timeout_s)
                is_healthy = True
                return response
            except TimeoutError:
                return {"correct": False, "status": "timeout", "tier": "none"}
            except OSError:  # its pipe is closed
                was_killed = worker.exit_code() == -signal.SIGKILL
                num_kills += was_killed
                num_deaths += not was_killed
            except WorkerCannotStart as error:
                num_failed_starts += 1
                if num_failed_starts == 3:
                    raise RuntimeError(
                        f"a reward worker ({sys.executable} -m rewards.workers.worker) died three "
                        f"times while starting under its memory limit of {self.memory_mb} MiB: "
                        "give it more memory, and check that sympy can be imported"
                    ) from error
            finally:
                self._release(worker, is_healthy)
        return {"correct": False, "status": "crashed", "tier": "none"}

    def map(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Responses in the order of the requests, computed by the workers in parallel."""
        if self.num_workers == 1 or len(requests) < 2:
            return [self.request(request) for request in requests]
        with ThreadPoolExecutor(min(self.num_workers, len(requests))) as threads:
            return list(threads.map(self.request, requests))

    def start(self) -> None:
        """Start one worker in the background, before the first hard answer needs it."""
        with self._available:
            if not self._workers and not self._is_closed:
                self._idle.append(self._spawn())

    def _spawn(self) -> Worker:
        worker = Worker(self.memory_mb, self.warm_up)
        self._workers.add(worker)
        return worker

    def _acquire(self) -> Worker:
        with self._available:
            self._forget_parents_workers()
            while True:
                if self._is_closed:
                    raise RuntimeError("the worker pool is closed")
                if self._num_busy < self.num_workers:
                    worker = self._take_idle() or self._spawn()
                    self._num_busy += 1
                    self._most_busy = max(self._most_busy, self._num_busy)
                    return worker
                self._available.wait()

    def _take_idle(self) -> Worker | None:
        """An idle worker, preferably one that has finished its imports."""
        for worker in list(self._idle):
            if worker.process.poll() is not None:
                worker.kill()  # killed from outside while idle
                self._idle.remove(worker)
                self._workers.discard(worker)
        if not self._idle:
            return None
        worker = next((item for item in self._idle if item.has_started()), self._idle[0])
        self._idle.remove(worker)
        return worker

    def _release(self, worker: Worker, is_healthy: bool) -> None:
        if not is_healthy:
            worker.kill()
        with self._available:
            self._num_busy -= 1
            if self._is_closed or not is_healthy:
                worker.kill()
                self._workers.discard(worker)
            else:
                self._idle.append(worker)
            # A spare worker takes over while the replacement is still importing.
            while not self._is_closed and len(self._workers) < self._most_busy + self.num_spare:
                self._idle.append(self._spawn())
            self._available.notify()

    def _forget_parents_workers(self) -> None:
        """After a fork the pipes are shared with the parent, whose workers must not be used."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._idle, self._workers = [], set()
            self._num_busy = self._most_busy = 0

    def close(self) -> None:
        """Kill idle workers now, and busy ones when they are released. Idempotent."""
        with self._available:
            self._forget_parents_workers()
            self._is_closed = True
            idle, self._idle = self._idle, []
            self._workers.difference_update(idle)
            self._available.notify_all()
        for worker in idle:
            worker.kill()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(_POOLS):
        pool.close()
        if pool._pid == os.getpid():
            for worker in list(pool._workers):
                worker.kill()


def _reset_locks_after_fork() -> None:
    """A lock held by another thread during the fork would never be released in the child."""
    for pool in list(_POOLS):
        pool._available = threading.Condition()


os.register_at_fork(after_in_child=_reset_locks_after_fork)
