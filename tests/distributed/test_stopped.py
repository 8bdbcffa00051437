"""SIGTERM to one or all processes of a job: they agree, write a checkpoint together and end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_lora.runs.checkpoint import latest_checkpoint, read_checkpoint
from tests.distributed.test_failures import RESUME, SETTINGS
from tests.helpers.processes import LIMIT_S, Job, faulty, launch, result

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.faults,
    pytest.mark.timeout(2 * LIMIT_S),
]

COMMANDS = {
    "train": ["train", "smoke", *SETTINGS, "run.checkpoint_every=50", "run.eval_every=2"],
    "sft": ["sft", "sft_tiny", "run.num_steps=4", "run.checkpoint_every=50", "data.held_out=4"],
}


def run(command: str, folder: Path, *more: str, faults: str = "") -> Job:
    words = [*COMMANDS[command], f"run.output_dir={folder}", "run.name=x", *more]
    logs = folder / "logs" / str(len(list(folder.glob("logs/*"))))
    return launch(faulty(words, faults), logs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of an unbroken job of two processes."""
    found: dict[str, dict[str, Any]] = {}

    def of(command: str) -> dict[str, Any]:
        if command not in found:
            folder = tmp_path_factory.mktemp("whole")
            assert run(command, folder).code == 0
            found[command] = result(folder / "x")
        return found[command]

    return of


# fault -> (command, step of the checkpoint): the launcher is asked to end, or only one rank is.
FAULTS = {
    "1 rl_lora.overlap:sample_and_score 2 signal": ("train", 1),
    "1 rl_lora.overlap:sample_and_score 2 cancel": ("train", 1),
    "0 rl_lora.learner:Learner._step 2 cancel": ("train", 2),  # which then has an evaluation
    "1 rl_lora.evaluation.evaluate:sample_and_score 2 cancel": ("train", 2),
    "0 rl_lora.sft.train:_step 2 cancel": ("sft", 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_all_processes_write_one_checkpoint_and_the_job_resumes(
    tmp_path: Path, whole: Callable[[str], dict[str, Any]], fault: str
) -> None:
    command, step = FAULTS[fault]
    ended = run(command, tmp_path, faults=fault)
    assert ended.code != 0
    assert ended.lines() == [(0, f"stopped by SIGTERM after step {step}{RESUME}")]
    assert ended.left == []
    if fault.endswith("signal"):  # cancelled, the launcher does not say how the ranks ended
        assert ended.codes == {0: 143, 1: 143}
    newest = latest_checkpoint(tmp_path / "x")
    assert newest is not None
    assert read_checkpoint(newest)[1]["step"] == step
    resumed = run(command, tmp_path, "--resume")
    assert (resumed.code, resumed.lines(), resumed.left) == (0, [], [])
    assert result(tmp_path / "x") == whole(command)
