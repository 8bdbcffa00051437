"""Worker processes: deadlines, memory, kills, threads, asyncio, closed pipes, no orphans."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewards import Score, load_reward, score_batch
from rewards.grading import Grader
from rewards.workers.pool import WorkerPool
from tests.helpers.hostile import hostile_inputs

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
OPEN_GOLD, OPEN_ANSWER = r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"
MAX_CPU_S = 0.5  # of the grader's own thread, for one answer


def request(gold: str = OPEN_GOLD, answer: str = OPEN_ANSWER) -> dict[str, object]:
    return {"op": "verify", "gold": gold, "answer": answer, "rules": {}}


def wait_until(condition, timeout_s: float = 20.0) -> bool:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def pids(pool: WorkerPool) -> list[int]:
    return [worker.process.pid for worker in list(pool._workers)]


@pytest.fixture(scope="module")
def pool():  # type: ignore[no-untyped-def]
    shared = WorkerPool(num_workers=2, timeout_s=20.0)
    yield shared
    shared.close()


def test_sympy_decides_in_a_worker(pool: WorkerPool) -> None:
    assert pool.request(request())["correct"] is True
    assert pool.request(request(answer=r"\frac{n(n-1)}{2}"))["correct"] is False


def test_order_is_kept(pool: WorkerPool) -> None:
    requests = [request(answer=OPEN_ANSWER if k % 3 else f"n + {k}") for k in range(12)]
    assert [r["correct"] for r in pool.map(requests)] == [bool(k % 3) for k in range(12)]


def test_the_deadline_kills_and_the_next_answer_is_graded() -> None:
    with Grader(timeout_s=0.4) as grader:
        grader.pool.num_spare = 0
        grader.pool.request(request(), timeout_s=60)  # the imports are done
        (pid,) = pids(grader.pool)
        os.kill(pid, signal.SIGSTOP)  # a worker that hangs forever
        response = grader.pool.request(request())
        assert response["status"] == "timeout"
        assert not is_running(pid)
        assert grader.pool.request(request(), timeout_s=60)["correct"] is True


def test_a_real_hang_ends_at_the_deadline() -> None:
    with Grader(timeout_s=1.0) as grader:
        grader.pool.request(request(), timeout_s=60)
        (pid,) = [worker.process.pid for worker in grader.pool._idle if worker.is_ready]
        # Over 40 s where the plain integral of x^{-x}, which others take seconds for, takes 0.6 s.
        verdict = grader.verify(r"\int_{0}^{1} \sin(x^{-x}) e^{x^{x}} dx", "1.29")
        assert (verdict.correct, verdict.status) == (False, "timeout")
        assert not is_running(pid)
        assert grader.pool.request(request(), timeout_s=60)["correct"] is True


def test_sigkill_of_every_worker_during_a_batch_loses_no_answer() -> None:
    with WorkerPool(num_workers=2, timeout_s=30) as pool:
        pool.map([request()] * 2)
        for pid in (stopped := pids(pool)):
            os.kill(pid, signal.SIGSTOP)  # so that both are at work until they are killed
        responses: list[dict[str, object]] = []
        thread = threading.Thread(target=lambda: responses.extend(pool.map([request()] * 30)))
        thread.start()
        assert wait_until(lambda: pool._num_busy == 2)
        for pid in stopped:
            os.kill(pid, signal.SIGKILL)
        thread.join()
        assert [r["correct"] for r in responses] == [True] * 30


@pytest.mark.slow
def test_idle_workers_that_were_killed_are_replaced() -> None:
    with WorkerPool(num_workers=2, timeout_s=30) as pool:
        pool.map([request()] * 4)
        for pid in pids(pool):
            os.kill(pid, signal.SIGKILL)
        assert pool.request(request())["correct"] is True


@pytest.mark.slow
def test_a_spare_worker_takes_over_at_once() -> None:
    with Grader() as grader:
        grader.pool.request(request(), timeout_s=60)
        assert wait_until(lambda: len(pids(grader.pool)) == 2)
        assert wait_until(lambda: all(w.has_started() for w in grader.pool._idle))
        used = next(w.process.pid for w in grader.pool._idle if w.is_ready)
        os.kill(used, signal.SIGSTOP)
        statuses = [grader.pool.request(request(), timeout_s=5.0)["status"] for _ in range(2)]
        assert statuses in (["timeout", "ok"], ["ok", "timeout"])


def test_a_worker_that_cannot_start_is_reported() -> None:
    with WorkerPool(memory_mb=16) as pool, pytest.raises(RuntimeError, match="memory limit of 16"):
        pool.request(request())


@pytest.mark.slow
def test_memory_stays_under_the_limit() -> None:
    with WorkerPool(timeout_s=3.0, memory_mb=400, num_spare=0) as pool:
        pool.request(request(), timeout_s=60)
        (pid,) = pids(pool)
        limits = Path(f"/proc/{pid}/limits").read_text()
        (line,) = [row for row in limits.splitlines() if row.startswith("Max address space")]
        assert line.split()[3] == str(400 << 20)
        # 2^(10^9) would need 125 MB as a number and far more to square.
        wide = "+".join(f"x_{{{n}}}" for n in range(300))
        pool.request(request(answer=f"\\left({wide}\\right)^{{60}} + \\sum_{{k=1}}^{{n}} k"))
        status = Path(f"/proc/{pids(pool)[0]}/status").read_text()
        peak_kb = next(int(r.split()[1]) for r in status.splitlines() if r.startswith("VmPeak"))
        assert peak_kb <= 400 << 10


def test_close_leaves_no_process() -> None:
    pool = WorkerPool(num_workers=2)
    pool.map([request()] * 4)
    running = pids(pool)
    pool.close()
    pool.close()
    assert wait_until(lambda: not any(map(is_running, running)))
    with pytest.raises(RuntimeError, match="closed"):
        pool.request(request())


ORPHAN_SCRIPT = """
import os, signal, sys
from rewards.workers.pool import WorkerPool
pool = WorkerPool(timeout_s=60)
pool.request({"op": "verify", "gold": "\\\\sum_{k=1}^{n} k", "answer": "n", "rules": {}})
print(*(worker.process.pid for worker in pool._workers), flush=True)
if sys.argv[1] == "fork" and os.fork() == 0:
    import time
    time.sleep(30)  # keeps the worker's pipes open after the parent's death
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_a_killed_parent_leaves_no_orphan(how: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", ORPHAN_SCRIPT, how], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert child.stdout is not None
    pids = [int(pid) for pid in child.stdout.readline().split()]
    child.wait()
    assert pids
    assert wait_until(lambda: not any(map(is_running, pids)), timeout_s=10)
    child.stdout.close()


CLOSED_SCRIPT = """
import os, sys
for fd in (0, 1, 2):
    os.close(fd)
from rewards import verify
right = verify("\\\\sum_{k=1}^{n} k", "\\\\frac{n(n+1)}{2}").correct
os._exit(0 if right else 3)
"""


def test_works_with_closed_standard_streams_and_no_main() -> None:
    """A caller's `__main__` is never imported again, which here would close its streams twice."""
    done = subprocess.run([sys.executable, "-c", CLOSED_SCRIPT], cwd=ROOT, check=False, timeout=120)
    assert done.returncode == 0


def test_threads_share_a_grader() -> None:
    with Grader(num_workers=2, timeout_s=30) as grader:
        results: list[bool] = []

        def work() -> None:
            results.extend(grader.verify(OPEN_GOLD, OPEN_ANSWER).correct for _ in range(5))

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 30


def test_asyncio_callers_may_block_or_use_a_thread() -> None:
    async def main() -> tuple[bool, list[bool]]:
        direct = score_batch([f"\\boxed{{{OPEN_ANSWER}}}"], [OPEN_GOLD])[0].correct
        handed = await asyncio.gather(
            *[
                asyncio.to_thread(score_batch, [f"\\boxed{{{OPEN_ANSWER}}}"], [OPEN_GOLD])
                for _ in range(4)
            ]
        )
        return direct, [scores[0].correct for scores in handed]

    assert asyncio.run(main()) == (True, [True] * 4)


def timed(grader: Grader, text: str) -> tuple[Score, float]:
    """The score, and the CPU seconds in this thread; the pool limits the worker's time.

    Without garbage collection, which takes a second in a process that has run other tests.
    """
    gc.disable()
    try:
        start = time.thread_time()
        result = grader.score_batch([text], ["42"])[0]
        return result, time.thread_time() - start
    finally:
        gc.enable()


def check_hostile(grader: Grader) -> list[str]:
    """Descriptions of hostile inputs that were accepted, slow, or broke the grader."""
    failures = []
    for name, text in hostile_inputs().items():
        result, cpu_s = timed(grader, text)
        if result.correct or cpu_s > MAX_CPU_S:
            failures.append(f"{name}: {result}, {cpu_s:.2f} s")
        if not grader.score_batch(["\\boxed{42}"], ["42"])[0].correct:
            failures.append(f"{name}: the next answer was graded wrong")
    return failures


def test_hostile_inputs_in_the_main_thread() -> None:
    assert len(hostile_inputs()) >= 60
    with Grader(timeout_s=2.0) as grader:
        assert check_hostile(grader) == []
    assert not Path("/tmp/verifier-was-here").exists()


@pytest.mark.slow
def test_hostile_inputs_in_threads_and_asyncio() -> None:
    with Grader(timeout_s=2.0) as grader:
        failures: list[str] = []
        thread = threading.Thread(target=lambda: failures.extend(check_hostile(grader)))
        thread.start()
        thread.join()
        assert failures == []

        async def main() -> list[str]:
            return check_hostile(grader)

        assert asyncio.run(main()) == []


def test_hostile_inputs_as_one_batch() -> None:
    texts = list(hostile_inputs().values())
    completions = [item for text in texts for item in (text, "\\boxed{42}")]
    with load_reward("math", num_workers=2, timeout_s=2.0) as reward:
        scores = reward.score_batch(completions, ["42"] * len(completions))
    assert [s.correct for s in scores] == [False, True] * len(texts)


def test_a_hostile_gold_is_only_equal_to_itself() -> None:
    with Grader(timeout_s=1.0) as grader:
        for text in ("9^{9^{9}}", "1000000!", "\\binom{10^9}{5\\cdot 10^8}", "9" * 5000):
            assert grader.verify(text, text).correct
            assert not grader.verify(text, "42").correct
