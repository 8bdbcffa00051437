"""SIGKILL before a file operation of a whole run: started again, it ends with the same files.

A small choice of what scripts/crash_test.py does.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rl_lora.runs.checkpoint import checkpoint_steps, prune
from tests.helpers.crashes import Bench, load_libraries, rl, sft
from tests.helpers.kills import Kill
from tests.helpers.run_files import difference, run_files

pytestmark = pytest.mark.faults

NUM_KILLS = 3  # start-up, steps with their checkpoints, and the end
JOBS = {
    "rl": rl("", "run.eval_every=2"),
    "rl, before the first checkpoint": rl("", "run.eval_every=2", "run.checkpoint_every=50"),
    "sft": sft("", "run.checkpoint_every=1"),
    "sft, before the first checkpoint": sft(""),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    load_libraries(tmp_path_factory.mktemp("libraries"))
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_kill_at_any_moment_leaves_a_run_that_resumes_to_the_same_end(
    bench: Bench, name: str
) -> None:
    job = JOBS[name]
    num_operations = bench.whole(job).num_operations
    assert num_operations > 25
    for number in range(NUM_KILLS):
        at = int((number + 0.5) * num_operations / NUM_KILLS) + 1
        crash = bench.crash(job, [Kill(at_operation=at)])
        assert len(crash.kills) == 1
        assert not crash.error
        assert bench.difference(job, crash) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rl", "sft"])
def test_a_kill_before_the_last_deletion_leaves_no_checkpoint_too_many(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A run that resumes at its last step saves no checkpoint, after which it would delete."""
    job, is_killed = JOBS[name], tmp_path / "killed"
    bench.whole(job)

    def killed_once(run_folder: Path, keep_last: int) -> list[Path]:
        if 4 in checkpoint_steps(run_folder) and not is_killed.exists():
            is_killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return prune(run_folder, keep_last)

    monkeypatch.setattr("rl_lora.runs.checkpoint.prune", killed_once)
    crash = bench.crash(job, [Kill()])
    assert is_killed.exists()
    assert not crash.error
    assert bench.difference(job, crash) == ""


@pytest.mark.slow
def test_a_resumption_that_loses_something_is_found(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = JOBS["sft"]
    at = int(0.5 * bench.whole(job).num_operations)
    monkeypatch.setattr("rl_lora.runs.checkpoint.restore_optimizer", lambda *_: None)
    crash = bench.crash(job, [Kill(at_operation=at)])
    assert not crash.error
    assert bench.difference(job, crash).startswith("x/adapter/adapter_model.safetensors: ")


def test_files_are_compared_without_what_a_machine_measures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step_s": 2.0, "reward/mean": 0.5}\n')
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_bytes(b"\x00\xff")
    before = run_files(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step_s": 9.0, "reward/mean": 0.5}\n')
    assert difference(before, run_files(tmp_path)) == ""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step_s": 2.0, "reward/mean": 0.6}\n')
    found = difference(before, run_files(tmp_path))
    assert found.startswith("metrics.jsonl: line 1: ")
    assert "0.5}', not" in found
    (tmp_path / "adapter" / ".weights.partial").write_bytes(b"")
    found = difference(before, run_files(tmp_path))
    assert found == "adapter/.weights.partial is only in the resumed run"
    (tmp_path / "adapter" / ".weights.partial").unlink()
    (tmp_path / "adapter" / "weights").unlink()
    assert difference(before, run_files(tmp_path)) == "adapter/weights is only in the unbroken run"
