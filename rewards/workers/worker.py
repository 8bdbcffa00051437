"""Worker process: grades what the parent could not decide cheaply.

Run as `-m rewards.workers.worker`. Protocol, both ways: 4-byte big-endian length, then that many
bytes of JSON. The first frame the worker sends is {"ready": true}; then one response per request.
It ends when stdin closes, when its parent is gone, or when a request burns more CPU than its limit.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import threading
import time
from typing import Any, BinaryIO

MAX_FRAME_BYTES = 1 << 20


def read_exactly(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes, or fewer at end of file."""
    chunks: list[bytes] = []
    while size > 0:
        chunk = stream.read(size)
        if not chunk:
            break
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def encode(message: dict[str, Any]) -> bytes:
    """One frame. ASCII JSON, so that lone surrogates travel."""
    body = json.dumps(message).encode("ascii")
    return struct.pack(">I", len(body)) + body


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """Grade one request; the answer's faults become a status, never an exception."""
    try:
        if request["op"] == "verify":
            from rewards.equality.symbolic import decide_symbolically
            from rewards.rules import from_wire

            rules = from_wire(request["rules"])
            verdict = decide_symbolically(request["gold"], request["answer"], rules)
        elif request["op"] == "math_verify":
            from rewards.workers.math_verify import verify_with_math_verify

            verdict = verify_with_math_verify(request["gold"], request["answer"])
        else:
            return {"error": f"unknown op {request['op']!r}"}
    except MemoryError:
        return {"correct": False, "status": "limit", "tier": "none"}
    except RecursionError:
        return {"correct": False, "status": "limit", "tier": "none"}
    return {"correct": verdict.correct, "status": verdict.status, "tier": verdict.tier}


def limit_memory(memory_mb: int) -> None:
    """Cap this process's address space; an allocation past it is a MemoryError. No core dumps."""
    limit = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: float) -> None:
    """Let this process burn `seconds` more CPU; past that the kernel ends it (an orphan too)."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def exit_without_parent(parent_pid: int) -> None:
    """Leave no orphan: a process forked by the parent may hold our stdin open after its death."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(0)


def main() -> None:
    """Arguments: the parent's process id, the memory limit in MiB, a first request as JSON."""
    parent_pid, memory_mb = int(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a stray print must not break the framing
    limit_memory(memory_mb)
    threading.Thread(target=exit_without_parent, args=(parent_pid,), daemon=True).start()
    # A deadline must not pay for the imports, nor for what sympy loads at its first use.
    handle(json.loads(sys.argv[3]))
    responses.write(encode({"ready": True}))
    responses.flush()
    while True:
        header = read_exactly(requests, 4)
        if len(header) < 4:
            return
        (size,) = struct.unpack(">I", header)
        if size > MAX_FRAME_BYTES:
            return
        request = json.loads(read_exactly(requests, size))
        limit_cpu(float(request["timeout_s"]))
        responses.write(encode(handle(request)))
        responses.flush()


if __name__ == "__main__":
    main()
