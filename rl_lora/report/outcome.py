"""The outcome of an RL run: its evaluations, and the closing tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rl_lora.adapters.files import version_in
from rl_lora.config import RunConfig
from rl_lora.evaluation.best import read_best
from rl_lora.evaluation.paired import PairedScores, compare_evaluations
from rl_lora.evaluation.scores import EvalResult, load_result
from rl_lora.report.terminal import Display
from rl_lora.runs.start import Start


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    folder: Path
    before: EvalResult | None  # the policy that RL started from
    after: EvalResult | None


def finished(config: RunConfig, start: Start) -> Outcome | None:
    """The outcome of a run that has nothing left to do, else None."""
    folder, num_steps = config.run.folder, config.run.num_steps
    evaluation = folder / "eval" / f"{evaluation_name(num_steps)}.json"
    is_done = start.checkpoint is not None and start.log_step == num_steps
    if not is_done or not evaluation.is_file() or version_in(folder / "adapter") != num_steps:
        return None  # another version: the run was complete with fewer steps
    return Outcome(folder, result_of(folder, evaluation_name(0)), load_result(evaluation))


def result_of(folder: Path, name: str) -> EvalResult | None:
    """An evaluation's result in a run folder; None: it has not been evaluated."""
    path = folder / "eval" / f"{name}.json"
    return load_result(path) if path.is_file() else None


def evaluation_name(step: int) -> str:
    """Name of the evaluation after this many steps."""
    return f"step_{step:06d}"


def summary(display: Display, outcome: Outcome, seconds_by_phase: dict[str, float]) -> None:
    """The closing tables: evaluations, paired differences, contamination, seconds."""
    folder, last = outcome.folder, outcome.after
    files = {"base model": "base", "before": evaluation_name(0)}
    if last is not None and last.step:
        files["after"] = evaluation_name(last.step)
    evaluations = {
        name: found for name, file in files.items() if (found := result_of(folder, file))
    }
    comparisons: dict[str, PairedScores] = {}
    for first, second in (("base model", "after"), ("before", "after")):
        if first in evaluations and second in evaluations:
            before, after = (folder / "eval" / f"{files[name]}.json" for name in (first, second))
            comparisons[f"{first} to {second}"] = compare_evaluations(before, after).total
    display.summary(evaluations, comparisons, seconds_by_phase)
    for note in last.notes if last is not None else ():
        display.note(note)
    if (best := read_best(folder)) is not None:
        display.note(f"best by the evaluation: step {best.step}, in {folder / 'best'}")
