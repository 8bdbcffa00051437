"""Reads a run's folder: settings, steps, evaluations; the one reader of reports, figures, status.

A run at step 0, one killed in the middle of a line, and one still being written all read well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rl_lora.errors import UserError
from rl_lora.evaluation.scores import EvalResult, load_result
from rl_lora.runs.log import METRICS_FILE, RECORD_FILE
from rl_lora.storage import jsonl

WARM_START_FILE = "warm_start.jsonl"
MAX_POINTS = 1000  # of a curve: more steps than that are averaged in groups of neighbours

_RENAMED_METRIC = "rollouts/age_max"  # of runs before "age" became "staleness"
_RENAMED_FIGURE = "figures/exams.png"

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of a run."""

    name: str  # of its files, e.g. step_000010
    result: EvalResult

    @property
    def step(self) -> int | None:
        """Training steps done; None: not a step of the run (base, `rl-lora eval`)."""
        return self.result.step


@dataclass(slots=True)
class RunRecord:
    """A run as its folder records it."""

    label: str  # unique among the runs of a report
    folder: Path
    config: dict[str, Any]  # sections of settings; empty without run.json
    facts: dict[str, Any]  # the rest of run.json: versions, fingerprints, parameters, process
    steps: list[Record]  # lines of metrics.jsonl, by step: {"step": 1, "reward/mean": 0.2, ...}
    warm_start: list[Record]
    evaluations: list[Evaluation]  # the base's, those of training by step, others
    notes: list[str] = field(default_factory=list)  # what could not be read, what was renamed

    def setting(self, section: str, key: str) -> Any:
        """A value of the config, None if it has none."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def last_step(self) -> int:
        """Steps done."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def held_out(self) -> list[Evaluation]:
        """The evaluations made during training, by step."""
        return [one for one in self.evaluations if one.step is not None]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs, labelled by their folders' names, or by their paths where names are ambiguous.

    Raises:
        UserError: a folder is not a run's, is given twice, or has a damaged metrics.jsonl.
    """
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(f"{folders[index]} is given twice; name each run once")
    names = [folder.name for folder in resolved]
    return [
        read_run(folder, path.name if names.count(path.name) == 1 else str(folder), is_strict=False)
        for folder, path in zip(folders, resolved, strict=True)
    ]


def read_run(folder: Path, label: str | None = None, *, is_strict: bool = True) -> RunRecord:
    """One run; label None: the folder's name.

    If not is_strict, a damaged run.json or evaluation is left out with a note.

    Raises:
        UserError: the folder is not a run's, or has a damaged record. A half-written last line is
            not damage: it is left out.
    """
    record_path, metrics_path = folder / RECORD_FILE, folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run folder: it does not exist or is a file")
    if not record_path.is_file() and not metrics_path.is_file():
        raise UserError(
            f"{folder} is not a run folder: it has neither {RECORD_FILE} nor {METRICS_FILE}"
        )
    problems: list[UserError] = []
    facts: dict[str, Any] = {}
    try:
        facts = jsonl.read_json(record_path) if record_path.is_file() else {}
    except UserError as error:
        problems.append(error)
    evaluations = _read_evaluations(folder / "eval", problems)
    if is_strict and problems:
        raise problems[0]
    notes = [f"left out: {problem}" for problem in problems]
    if not record_path.is_file():
        notes.append(f"there is no {RECORD_FILE}: the settings are unknown")
    steps = _read_steps(metrics_path)
    config = facts.pop("config", {})
    return RunRecord(
        label=label or folder.resolve().name,
        folder=folder,
        config=config if isinstance(config, dict) else {},
        facts=facts,
        steps=steps,
        warm_start=_read_steps(folder / WARM_START_FILE),
        evaluations=evaluations,
        notes=[*notes, *_renamed(folder, steps)],
    )


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records with a finite number under the key."""
    points = [(r["step"], value) for r in records if (value := number(r.get(key))) is not None]
    return [step for step, _ in points], [value for _, value in points]


def thinned(records: Sequence[Record], max_points: int = MAX_POINTS) -> tuple[list[Record], int]:
    """(records, size): at most max_points, each the mean of `size` neighbours, step included."""
    size = max(1, math.ceil(len(records) / max_points))
    if size == 1:
        return list(records), 1
    groups = [records[first : first + size] for first in range(0, len(records), size)]
    return [_mean(group) for group in groups], size


def _mean(records: Sequence[Record]) -> Record:
    keys = dict.fromkeys(key for record in records for key in record)
    return {key: fmean(values) for key in keys if (values := series(records, key)[1])}


def _read_steps(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    # If a step occurs twice, as it may after a resume, the later line counts.
    steps = {r["step"]: r for r in jsonl.read_lines(path) if isinstance(r.get("step"), int)}
    return [steps[step] for step in sorted(steps)]


def _read_evaluations(folder: Path, problems: list[UserError]) -> list[Evaluation]:
    evaluations = []
    for path in sorted(folder.glob("*.json")):
        try:
            evaluations.append(Evaluation(path.stem, load_result(path)))
        except UserError as error:
            problems.append(error)
    return sorted(
        evaluations,
        key=lambda one: (not one.name.startswith("base"), one.step is None, one.step or 0),
    )


def _renamed(folder: Path, steps: Sequence[Record]) -> list[str]:
    """One line on the names of an earlier version that the folder has; nothing for a current one.

    The evaluations' own files say it when they are read (`evaluation.files.read_evaluation`).
    """
    renamed = []
    if any(_RENAMED_METRIC in record for record in steps):
        renamed.append("rollouts/age_* of metrics.jsonl is rollouts/staleness_* now")
    if (folder / _RENAMED_FIGURE).is_file():
        renamed.append(f"{_RENAMED_FIGURE} is figures/evaluations.png now")
    return [f"written by an earlier version: {'; '.join(renamed)}"] if renamed else []
