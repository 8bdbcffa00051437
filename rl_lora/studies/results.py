"""A study's results: one small JSONL table with a row per cell, made from the cells' run folders.

    STUDY/results.jsonl     the table
    STUDY/cells/KEY/        a cell's run folder (its checkpoints are deleted when it is done)
    STUDY/cells/KEY.log     what it printed

A row's `status`: done; diverged (it ended worse than it began); nan (the gradient was not finite);
crashed (the row has the error). `result` is the mean reward of the last steps or the last test
loss; null if there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rl_lora.config import VARIANT_NAMES
from rl_lora.errors import UserError
from rl_lora.runs.log import METRICS_FILE
from rl_lora.storage import jsonl
from rl_lora.studies.config import Cell, Condition
from rl_lora.studies.rate_sweep import Goal

TABLE_FILE = "results.jsonl"
CURVE_POINTS = 40  # per curve of a row, to keep the table small
GOALS: dict[str, Goal] = {"rl": "max", "sft": "min"}
Row = Mapping[str, Any]
# Key of metrics.jsonl -> name of the curve in a row.
_CURVES = {
    "rl": {"reward/mean": "reward", "cot/tokens_mean": "tokens", "eval/accuracy": "accuracy"},
    "sft": {"sft/loss": "loss", "test/nll": "test_nll"},
}


def make_row(
    cell: Cell, run_folder: Path, final_steps: int, seconds: float, error: str, failure: str
) -> dict[str, Any]:
    """The row of a cell that has ended, its run folder in whatever state.

    The seconds are those of its process since the last start; `error` is what stopped it ("": it
    ran to its end), and `failure` the status for that, nan or crashed.
    """
    metrics_path = run_folder / METRICS_FILE
    steps = jsonl.read_lines(metrics_path) if metrics_path.is_file() else []
    curves = {name: curve(steps, key) for key, name in _CURVES[cell.arm].items()}
    start, result = _ends(cell.arm, steps, final_steps)
    status = failure if error else _status(cell.arm, start, result)
    peaks = [row["memory/peak_resident_mb"] for row in steps if "memory/peak_resident_mb" in row]
    return {
        "cell": cell.key,
        "arm": cell.arm,
        "status": status,
        **cell.condition._asdict(),
        "lr": cell.config.optim.lr,
        "seed": cell.config.run.seed,
        "num_steps": cell.config.run.num_steps,
        "start": start,
        "result": result if status in ("done", "diverged") else None,
        "seconds": round(seconds, 2),
        "peak_mb": round(max(peaks), 1) if peaks else None,
        "cost_class": cell.cost_class,
        "error": error,
        "curves": {name: points for name, points in curves.items() if points["step"]},
    }


def curve(steps: Sequence[Row], key: str) -> dict[str, list[float]]:
    """A metric by step, thinned to at most CURVE_POINTS points.

    A longer curve is split into spans of equal ratio, which keeps the detail of early steps; each
    span becomes the mean of its steps and values.
    """
    points = [(r["step"], r[key]) for r in steps if isinstance(r.get(key), int | float)]
    if len(points) > CURVE_POINTS:
        spans: dict[int, list[tuple[float, float]]] = {}
        scale = CURVE_POINTS / math.log(len(points) + 1)
        for number, point in enumerate(points, start=1):
            spans.setdefault(int(scale * math.log(number)), []).append(point)
        points = [
            (fmean(step for step, _ in span), fmean(value for _, value in span))
            for span in spans.values()
        ]
    return {"step": [round(s, 2) for s, _ in points], "value": [round(v, 6) for _, v in points]}


def _ends(arm: str, steps: Sequence[Row], final_steps: int) -> tuple[float | None, float | None]:
    """(at the start, at the end): mean reward of a few steps, or the first and last test loss."""
    key = "reward/mean" if arm == "rl" else "test/nll"
    values = [row[key] for row in steps if key in row]
    num = min(final_steps, len(values)) if arm == "rl" else 1
    first, last = values[:num], values[-num:]
    if not values or None in (*first, *last):
        return None, None
    return round(sum(first) / num, 6), round(sum(last) / num, 6)


def _status(arm: str, start: float | None, result: float | None) -> str:
    if start is None or result is None:
        return "nan"
    worse = result > start if arm == "sft" else result < 0.5 * start
    return "diverged" if worse else "done"


# --- the table ------------------------------------------------------------------------------------


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a study's folder or of a table's file, one per cell (the last one written).

    Raises:
        UserError: there is no table, or a line is damaged.
    """
    file = path / TABLE_FILE if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist: run the study first (rl-lora study CONFIG)")
    return list({row["cell"]: row for row in jsonl.read_lines(file)}.values())


def append_row(folder: Path, row: Mapping[str, Any]) -> None:
    """Adds a row or replaces its cell's; drops a line that a kill cut short."""
    file = folder / TABLE_FILE
    rows = jsonl.read_lines(file) if file.is_file() else []
    write_table(folder, [*(old for old in rows if old["cell"] != row["cell"]), row])


def write_table(folder: Path, rows: Sequence[Row]) -> None:
    """Replaces the table."""
    lines = "".join(jsonl.to_line(dict(row)) for row in rows)
    jsonl.write_text_atomically(folder / TABLE_FILE, lines)


def condition_of(row: Row) -> Condition:
    """A row's `Cell.condition`; older tables lack the variant."""
    return Condition(**{key: row[key] for key in Condition._fields if key in row})


def condition_text(condition: Condition, with_batch: bool = False) -> str:
    """`rank 8`, `rank 8 attention`, `rank 1 DoRA`, `rank 1 LoRA+ 16`, `full`."""
    text = "full" if condition.mode == "full" else f"rank {condition.rank}"
    if condition.layers != "all":
        text += f" {condition.layers}"
    if condition.lm_head:
        text += " +lm_head"
    if condition.variant != "lora":
        text += f" {VARIANT_NAMES[condition.variant]}"
    if condition.lora_plus_ratio != 1:
        text += f" LoRA+ {condition.lora_plus_ratio:g}"
    return f"{text} batch {condition.batch_size}" if with_batch else text


def results_by_rate(rows: Sequence[Row]) -> dict[Any, dict[float, dict[int, float]]]:
    """condition -> rate -> seed -> result; NaN if the run failed."""
    table: dict[Any, dict[float, dict[int, float]]] = {}
    for row in rows:
        value = math.nan if row["result"] is None else float(row["result"])
        by_rate = table.setdefault(condition_of(row), {})
        by_rate.setdefault(float(row["lr"]), {})[int(row["seed"])] = value
    return table
