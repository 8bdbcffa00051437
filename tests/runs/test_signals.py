"""Ctrl-C, SIGTERM and SIGUSR1 in real processes, at known points: what is left, what resumes.

A resumed run must equal an unbroken one: adapter, metrics, samples, evaluations.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rl_lora.runs.checkpoint import latest_checkpoint, read_checkpoint
from tests.helpers import signals
from tests.helpers.signals import Ending, Signal, num_lines
from tests.runs.test_resume import SIZES, result
from tests.sft.test_sft import TINY
from tests.test_train import SMOKE

pytestmark = pytest.mark.faults

HINT = "; run the same command with --resume to continue from the last checkpoint"
EVERY = ["run.checkpoint_every=50", "run.eval_every=2", "data.held_out=4", "run.num_steps=4"]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGHUP: 129}
COMMANDS = {
    "rl": ["train", str(SMOKE), *SIZES["rl"], *EVERY, "eval.chunk_samples=2"],
    "sft": ["sft", str(TINY), *SIZES["sft"], *EVERY, "sft.num_tests=1"],
}


def run(
    arm: str, folder: Path, *more: str, at: Signal | None = None, prepare: Any = None
) -> Ending:
    """Of one reward worker: two would only take longer to start."""

    def quickly() -> None:
        import rl_lora.train

        rl_lora.train.draw_figures = lambda folder: []  # they take longer than these runs
        if prepare is not None:
            prepare()

    command = [*COMMANDS[arm], f"run.output_dir={folder}", "run.name=x", *more]
    command += ["reward.num_workers=1"] if arm == "rl" else []
    return signals.run(command, *([at] if at else []), prepare=quickly)


def samples(run_folder: Path) -> str:
    file = run_folder / "transcripts.jsonl"
    return file.read_text() if file.is_file() else ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The result of an unbroken run of an arm."""
    folder, found = tmp_path_factory.mktemp("whole"), {}

    def of(arm: str, *more: str) -> Any:
        key = f"{arm}{len(more)}"
        if key not in found:
            assert run(arm, folder / key, *more) == Ending(0)
            found[key] = (result(folder / key / "x"), samples(folder / key / "x"))
        return found[key]

    return of


def after(folder: Path, lines: int) -> Callable[[], bool]:
    """Whether so many steps are on record."""
    return lambda: num_lines(folder / "x/metrics.jsonl") == lines


def has_file(path: Path) -> Callable[[], bool]:
    return lambda: path.is_file() and path.stat().st_size > 0


# point -> (function, lines of metrics.jsonl before, lines and step of the checkpoint afterwards)
POINTS: dict[str, tuple[str, str, int, int, int]] = {
    "sampling": ("rl", "rl_lora.samplers.torch_sampler:_record", 2, 2, 2),
    "scoring": ("rl", "rl_lora.rollouts:score_groups", 2, 2, 2),
    "a pass of the learner": ("rl", "rl_lora.learner:Learner._policy_objective", 2, 2, 2),
    "the optimizer's step": ("rl", "rl_lora.learner:Learner._step", 2, 3, 3),
    "a publication": ("rl", "rl_lora.train:publish", 1, 1, 2),  # step 2's evaluation comes next
    "a line": ("rl", "rl_lora.runs.log:RunLog.write", 2, 3, 3),
    "the last checkpoint": ("rl", "rl_lora.runs.checkpoint:_document_hash", 4, 4, 4),
    "a pass of fine-tuning": ("sft", "rl_lora.learner:Learner._log_loss_objective", 2, 2, 1),
    "a step of fine-tuning": ("sft", "rl_lora.learner:Learner._step", 2, 2, 2),  # its test is next
    "a test loss": ("sft", "rl_lora.sft.held_out_loss:to_device", 2, 2, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_anywhere_saves_the_last_whole_step_and_the_run_resumes_to_the_same_end(
    tmp_path: Path, whole: Callable[[str], Any], point: str, number: int
) -> None:
    arm, where, before, lines, step = POINTS[point]
    ending = run(arm, tmp_path, at=Signal(where, after(tmp_path, before), [number]))
    name = signal.Signals(number).name
    line = f"rl-lora: stopped by {name} after step {step}{HINT}"
    assert ending == Ending(CODES[number], [line])
    assert num_lines(tmp_path / "x/metrics.jsonl") == lines
    newest = latest_checkpoint(tmp_path / "x")
    assert newest is not None
    assert read_checkpoint(newest)[1]["step"] == step
    assert run(arm, tmp_path, "--resume") == Ending(0)
    assert (result(tmp_path / "x"), samples(tmp_path / "x")) == whole(arm)
