"""Worker process: grades what the parent could not decide cheaply.

Run as `-m rewards.workers.worker`. Protocol in both directions: one line of JSON per message. The
first line sent is {"ready": true}, then one response per request.
It exits when stdin closes, when its parent dies, or when a request exceeds its CPU limit.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from typing import Any

from rewards.rules import GradingRules
from rewards.types import Verdict


def encode(message: dict[str, Any]) -> bytes:
    """One line, as ASCII JSON so that lone surrogates survive."""
    return json.dumps(message).encode("ascii") + b"\n"


def handle(request: dict[str, Any]) -> dict[str, Any]:
    """Grade one request. An answer too large for the worker gets a status, not an exception."""
    try:
        if request["op"] == "verify":
            from rewards.equality.symbolic import decide_symbolically

            rules = GradingRules(**request["rules"])
            verdict = decide_symbolically(request["gold"], request["answer"], rules)
        elif request["op"] == "math_verify":
            verdict = _math_verify(request["gold"], request["answer"])
        else:
            return {"error": f"unknown op {request['op']!r}"}
    except (MemoryError, RecursionError):
        return {"correct": False, "status": "limit", "tier": "none"}
    return {"correct": verdict.correct, "status": verdict.status, "tier": verdict.tier}


def _math_verify(gold: str, answer: str) -> Verdict:
    """Compare with Math-Verify (an optional extra), both sides boxed, which it parses best.

    Its own alarm-based timeouts are off; the pool's deadline replaces them.
    """
    from math_verify import parse, verify

    gold_values, answer_values = (
        parse(
            text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}", parsing_timeout=None
        )
        for text in (gold, answer)
    )
    if not answer_values:
        return Verdict(False, "unparsable")
    correct = bool(verify(gold_values, answer_values, timeout_seconds=None))
    return Verdict(correct, "ok", "symbolic")


def limit_memory(memory_mb: int) -> None:
    """Cap this process's address space, so that more raises MemoryError. Disable core dumps."""
    limit = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_cpu(seconds: float) -> None:
    """Allow `seconds` more CPU time; beyond that the kernel kills the process, even an orphan."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 2
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def exit_without_parent(parent_pid: int) -> None:
    """Exit with the parent: a process forked from it may keep our stdin open after its death."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(0)


def main() -> None:
    """Command line: the parent's process id, the memory limit in MiB, a warm-up request as JSON."""
    parent_pid, memory_mb = int(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C and the like, sent to all processes of a job, are the parent's to handle.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    requests, responses = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a stray print must not break the framing
    limit_memory(memory_mb)
    threading.Thread(target=exit_without_parent, args=(parent_pid,), daemon=True).start()
    # Warm up: imports, and what sympy loads at its first use, must not count against a deadline.
    handle(json.loads(sys.argv[3]))
    responses.write(encode({"ready": True}))
    responses.flush()
    for line in requests:
        request = json.loads(line)
        limit_cpu(float(request["timeout_s"]))
        responses.write(encode(handle(request)))
        responses.flush()


if __name__ == "__main__":
    main()
