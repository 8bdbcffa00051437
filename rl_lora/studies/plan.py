"""A study's time and memory, estimated from its finished cells, else from short calibration runs,
one for each class of cells that differ only in rate and seed.

A cell's time = setup (model, data, evaluations before and after) + steps + tests along the way,
each as timed by the calibration run. Calibrations run like the cells, as many at once as there are
slots.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rl_lora.config import RunConfig
from rl_lora.runs.log import METRICS_FILE
from rl_lora.sft.train import curve_steps
from rl_lora.storage import jsonl
from rl_lora.studies.config import Cell, StudyConfig, make_cell
from rl_lora.studies.results import Row
from rl_lora.studies.run import num_slots, run_queue

CALIBRATION_FILE = "calibration.json"
_STEPS = {"rl": 4, "sft": 8}  # per calibration run


@dataclass(frozen=True, slots=True)
class Timing:
    """Measurements of a calibration run."""

    setup_s: float  # outside the steps
    step_s: float  # without tests
    test_s: float  # one test along the way
    peak_mb: float

    def cell_seconds(self, cell: Cell) -> float:
        """Estimated seconds of a whole cell."""
        return (
            self.setup_s + cell.config.run.num_steps * self.step_s + num_tests(cell) * self.test_s
        )


@dataclass(frozen=True, slots=True)
class Estimate:
    """What remains of a study."""

    seconds: float  # wall clock, with all slots busy
    peak_mb: float  # of one process
    slots: int  # cells at once
    has_gpus: bool


def num_tests(cell: Cell) -> int:
    """Number of tests during the steps of a run."""
    config = cell.config
    if isinstance(config, RunConfig):
        return config.run.num_steps // config.run.eval_every if config.run.eval_every else 0
    return len(curve_steps(config.run.num_steps, config.sft.num_tests, config.run.eval_every))


def read_timing(steps: Sequence[Row], seconds: float) -> Timing:
    """Timing from the lines of a run's metrics.jsonl, with a step or more, and the seconds of its
    process."""
    timed = [row for row in steps if isinstance(row.get("time/step_s"), int | float)]
    tests = [row["time/eval_s"] for row in timed if "time/eval_s" in row]
    bare = [row["time/step_s"] - row.get("time/eval_s", 0.0) for row in timed]
    peaks = [row["memory/peak_resident_mb"] for row in timed if "memory/peak_resident_mb" in row]
    return Timing(
        setup_s=max(0.0, seconds - sum(row["time/step_s"] for row in timed)),
        # The first step is slower, as it touches fresh memory.
        step_s=statistics.median(bare[1:] or bare),
        test_s=statistics.median(tests) if tests else 0.0,
        peak_mb=max(peaks, default=0.0),
    )


def calibrate(study: StudyConfig, cells: Sequence[Cell], rows: Sequence[Row]) -> dict[str, Timing]:
    """cost class -> timing, for the cells of whose class none is finished.

    A class is measured once, then kept in the study's folder.
    """
    file = study.folder / CALIBRATION_FILE
    known: dict[str, Timing] = {}
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        known = {name: Timing(**timing) for name, timing in stored.items()}
    missing = {cell.cost_class: cell for cell in cells if not _finished_seconds(cell, rows)}
    short = {name: _shortened(cell) for name, cell in missing.items() if name not in known}
    if not short:
        return known
    names = {cell.key: name for name, cell in short.items()}
    folder = study.folder / "calibration"

    def on_end(cell: Cell, seconds: float, _: dict[str, str]) -> None:
        metrics = folder / cell.key / METRICS_FILE
        steps = jsonl.read_lines(metrics) if metrics.is_file() else []
        if any(isinstance(row.get("time/step_s"), int | float) for row in steps):
            known[names[cell.key]] = read_timing(steps, seconds)

    for cell in short.values():  # a calibration that was killed, or had other processes
        shutil.rmtree(folder / cell.key, ignore_errors=True)
    run_queue(study, [*short.values()], folder, on_end)
    jsonl.write_json(file, {name: asdict(timing) for name, timing in known.items()})
    return known


def _shortened(cell: Cell) -> Cell:
    """The cell's job with few steps, with a test among them."""
    config = cell.config
    steps = min(_STEPS[cell.arm], config.run.num_steps)
    has_tests = num_tests(cell) > 0
    every = max(1, steps - 1) if isinstance(config, RunConfig) and has_tests else 0
    run = config.run.model_copy(update={"num_steps": steps, "eval_every": every})
    return make_cell(config.model_copy(update={"run": run}), cell.num_processes)


def estimate(
    study: StudyConfig,
    left: Sequence[Cell],
    rows: Sequence[Row],
    timings: Mapping[str, Timing],
) -> Estimate:
    """Time and memory of the cells left, from finished cells of their class, else calibration."""
    peaks = [row["peak_mb"] for row in rows if row.get("peak_mb")]
    peak_mb = max([*peaks, *(timing.peak_mb for timing in timings.values())], default=0.0)
    slots, has_gpus = num_slots(study, peak_mb)
    seconds = [cell_seconds(cell, rows, timings) for cell in left]
    return Estimate(max(sum(seconds) / slots, *seconds, 0.0), peak_mb, slots, has_gpus)


def cell_seconds(cell: Cell, rows: Sequence[Row], timings: Mapping[str, Timing]) -> float:
    """One cell's time; 0 if nothing of its class was measured (its calibration failed)."""
    if done := _finished_seconds(cell, rows):
        return statistics.median(done)
    timing = timings.get(cell.cost_class)
    return timing.cell_seconds(cell) if timing is not None else 0.0


def _finished_seconds(cell: Cell, rows: Sequence[Row]) -> list[float]:
    """Of the cells of its class that ran to their ends."""
    done = (row for row in rows if row["status"] in ("done", "diverged"))
    return [row["seconds"] for row in done if row["cost_class"] == cell.cost_class]
