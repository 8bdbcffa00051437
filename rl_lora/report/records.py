"""A run's folder, read for the report: settings, steps, evaluations. Nothing else is read.

Runs that stand at step 0, were killed in mid-line, or go on while they are read are all welcome;
what could not be used is said in `notes`, and never passed over in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_lora.errors import UserError
from rl_lora.evaluation.evaluate import EvalResult, load_result
from rl_lora.runs.log import METRICS_FILE
from rl_lora.storage import jsonl

MAX_POINTS = 1000  # of a curve: more steps than that are averaged in groups of neighbours

_EXAM_NAME = re.compile(r"(?:(?P<before>.+?)[._-])?step_(?P<step>\d+)(?:[._-](?P<after>.+))?")

Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of a run.

    Example: Evaluation(name="step_000010", series="", step=10, result=EvalResult(...))
    """

    name: str  # of its files
    series: str  # what its name has besides the step: "" for the held-out evaluation, e.g. "aime24"
    step: int | None  # training steps done; None: outside the training (base, `rl-lora eval`)
    result: EvalResult


@dataclass(slots=True)
class RunRecord:
    """What a report knows of a run.

    Example: RunRecord(label="quickstart", folder=Path("runs/quickstart"), config={"run": {...}},
    facts={"dtype": "torch.float32", ...}, steps=[{"step": 1, "reward/mean": 0.2}],
    evaluations=[...])
    """

    label: str  # unique among the runs of one report
    folder: Path
    config: dict[str, Any]  # sections of settings, empty where run.json is not there
    facts: dict[str, Any]  # the rest of run.json: versions, fingerprint, parameters
    steps: list[Record]  # lines of metrics.jsonl, by step
    warm_start: list[Record]
    evaluations: list[Evaluation]  # by series and step
    notes: list[str] = field(default_factory=list)

    def setting(self, section: str, key: str) -> Any:
        """A value of the config, None where it has none."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    @property
    def last_step(self) -> int:
        """Steps done."""
        return self.steps[-1]["step"] if self.steps else 0

    def evaluations_of(self, series: str) -> list[Evaluation]:
        """The evaluations of a series that were held during the training, by step."""
        return [
            evaluation
            for evaluation in self.evaluations
            if evaluation.series == series and evaluation.step is not None
        ]

    def evaluation_named(self, name: str) -> Evaluation | None:
        """The evaluation whose files have the name."""
        return next(
            (evaluation for evaluation in self.evaluations if evaluation.name == name), None
        )


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """The runs, labelled by their folders' names, or by the paths where two names are the same.

    Raises:
        UserError: a folder is no run, is given twice, or has a damaged metrics.jsonl.
    """
    resolved = [folder.resolve() for folder in folders]
    for index, folder in enumerate(resolved):
        if folder in resolved[:index]:
            raise UserError(f"{folders[index]} is given twice; name each run once")
    names = [folder.name for folder in resolved]
    return [
        read_run(folder, path.name if names.count(path.name) == 1 else str(folder))
        for folder, path in zip(folders, resolved, strict=True)
    ]


def read_run(folder: Path, label: str | None = None) -> RunRecord:
    """One run.

    Raises:
        UserError: the folder is no run, or its metrics.jsonl is damaged.
    """
    record_path, metrics_path = folder / "run.json", folder / METRICS_FILE
    if not folder.is_dir():
        raise UserError(f"{folder} is no run folder: it does not exist or is a file")
    if not record_path.is_file() and not metrics_path.is_file():
        raise UserError(f"{folder} is no run folder: it has neither run.json nor {METRICS_FILE}")
    notes: list[str] = []
    facts = _read_facts(record_path, notes)
    config = facts.pop("config", {})
    return RunRecord(
        label=label or folder.resolve().name,
        folder=folder,
        config=config if isinstance(config, dict) else {},
        facts=facts,
        steps=_read_steps(metrics_path),
        warm_start=_read_steps(folder / "warm_start.jsonl"),
        evaluations=_read_evaluations(folder / "eval", notes),
        notes=notes,
    )


def number(value: Any) -> float | None:
    """The value where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that have a finite number under the key."""
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
    means = {}
    for key in keys:
        values = [value for r in records if (value := number(r.get(key))) is not None]
        if values:
            means[key] = sum(values) / len(values)
    return means


def _read_facts(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append("run.json is not there: the settings are not known")
        return {}
    try:
        facts = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        notes.append("run.json is not readable: the settings are not known")
        return {}
    return facts


def _read_steps(path: Path) -> list[Record]:
    if not path.is_file():
        return []
    # A later line of the same step is the one that counts, as on resuming.
    steps = {r["step"]: r for r in jsonl.read_lines(path) if isinstance(r.get("step"), int)}
    return [steps[step] for step in sorted(steps)]


def _read_evaluations(folder: Path, notes: list[str]) -> list[Evaluation]:
    evaluations = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = load_result(path)
        except UserError as error:
            notes.append(f"evaluation left out: {error}")
            continue
        match = _EXAM_NAME.fullmatch(path.stem)
        parts = [part for part in (match["before"], match["after"]) if part] if match else []
        # The base is held against the held-out evaluation; other evaluations by hand stand in the
        # table alone.
        step = int(match["step"]) if match else result.step
        evaluations.append(
            Evaluation(path.stem, " ".join(parts) if match else path.stem, step, result)
        )
    notes += dict.fromkeys(text for e in evaluations for text in getattr(e.result, "notes", ()))
    # The base, the evaluations of the training by series, and those held by hand.
    return sorted(
        evaluations,
        key=lambda evaluation: (
            not evaluation.name.startswith("base"), evaluation.step is None, evaluation.series,
            evaluation.step or 0
        ),
    )  # fmt: skip
