"""SIGKILL before the n-th file operation of a whole run, for many n: the resumed run is the same.

Each run is a child of one process that has its libraries loaded; it dies inside its own file
operation, so that nothing of ours is cleaned up. One thread: a fork has none of its parent's.
RL_LORA_NUM_KILLS=24 kills more often than the suite has time for.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs.test_resume import result, run

pytestmark = pytest.mark.faults

# Start-up, first test or evaluation, checkpoints, publishes, lines, the best and the last adapter.
NUM_KILLS = int(os.environ.get("RL_LORA_NUM_KILLS", "3"))


def in_a_child(work: Callable[[], Any], die_at: int | None = None) -> tuple[int | None, int]:
    """(the signal that ended it or None, file operations done) of work() in a forked child."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 (until its end)
            torch.set_num_threads(1)
            count = itertools.count(1)
            counts = [0]

            def on_event(event: str, _: tuple[Any, ...]) -> None:
                changes = event.startswith("os.") or event in ("open", "shutil.rmtree")
                if changes and event not in ("os.listdir", "os.scandir", "os.putenv"):
                    counts[0] = next(count)
                    if counts[0] == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(on_event)
            work()
            os.write(writer, str(counts[0]).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    text = os.read(reader, 99)
    os.close(reader)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status), 0
    assert os.WEXITSTATUS(status) == 0
    return None, int(text)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["sft", "rl"])
@pytest.mark.parametrize("every", [1, 50])
def test_a_kill_at_any_moment_leaves_a_run_that_resumes_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str, every: int
) -> None:
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)
    # A kill loses nothing that was written: waiting for the disk would only make the test slow.
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    settings = [f"run.checkpoint_every={every}", "run.eval_every=2", "run.loggers=[]"]
    settings += ["reward.num_workers=1"] if arm == "rl" else []

    def job(name: str) -> Callable[[], Any]:
        return lambda: run(arm, tmp_path, f"run.name={name}", *settings, resume=True)

    killed, num_operations = in_a_child(job("whole"))
    assert killed is None
    assert num_operations > 50  # more where no test before has loaded the libraries
    expected = result(tmp_path / "whole")
    step = num_operations / NUM_KILLS
    for number in range(NUM_KILLS):
        name = f"killed{number}"
        killed, _ = in_a_child(job(name), die_at=int((number + 0.5) * step) + 1)
        assert killed == signal.SIGKILL
        assert in_a_child(job(name))[0] is None
        assert result(tmp_path / name) == expected
