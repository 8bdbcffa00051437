"""`rl-lora status`: how runs stand, told by their files and the process named in run.json.

Nothing in a run folder is changed, and no torch is loaded. A process can be asked for on its own
host alone; elsewhere the age of the files has to do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rl_lora.errors import UserError
from rl_lora.evaluation.best import BestCheckpoint, best_evaluation
from rl_lora.evaluation.files import SUFFIX, read_evaluation
from rl_lora.evaluation.scores import EvalResult, load_result
from rl_lora.report.tables import accuracy_name, accuracy_text, printable, seconds_text, share_text
from rl_lora.runs.lock import is_alive
from rl_lora.runs.log import METRICS_FILE
from rl_lora.storage import jsonl

WIDTH = 80  # columns that every line fits into
_SPARK_WIDTH = 40
_SPARKS, _ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_RECENT_STEPS = 10  # that the ETA is made of
_STALLED_S = 600.0  # without a word in the files; more where steps take long
_RECORD_FILE = "run.json"

# Rows of (key of a step's metrics, form).
_ROWS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("sft/loss", "loss {:.4f}"),
        ("test/nll", "test loss {:.4f}"),
        ("reward/mean", "reward {:.3f}"),
        ("reward/correct_mean", "correct {:.1%}"),
        ("cot/tokens_mean", "length {:.0f} tokens"),
        ("cot/truncated_rate", "truncated {:.0%}"),
    ),
    (
        ("mismatch/kl", "kl {:.1e}"),
        ("speed/sample_tokens_per_s", "{:,.0f} tokens/s"),
        ("time/step_s", "{:.1f} s a step"),
    ),
)
# Key, label, form of the bounds.
_CURVES: tuple[tuple[str, str, str], ...] = (
    ("sft/loss", "loss", "{:.3f}"),
    ("reward/mean", "reward", "{:.3f}"),
    ("cot/tokens_mean", "length", "{:.0f}"),
)


@dataclass(frozen=True)
class Status:
    """How one run stands.

    Example: Status(folder=Path("runs/q"), state="running", reason="process 4711", step=12,
    num_steps=20, eta_s=210.0, silent_s=8.0, steps=[{"step": 1, "reward/mean": 0.2}, ...],
    warm_start=[], evaluations=[EvalResult(...)], pending="", best=BestCheckpoint(...))
    """

    folder: Path
    state: str  # running, stalled, killed, finished; unknown: on another host, and silent
    reason: str
    step: int  # steps done
    num_steps: int | None  # None: run.json is not there yet
    eta_s: float | None
    silent_s: float  # since a file was written
    steps: list[dict[str, Any]]
    warm_start: list[dict[str, Any]]
    evaluations: list[EvalResult]  # of training steps, in their order
    pending: str  # the evaluation under way, in words
    best: BestCheckpoint | None


EXAMPLES = (
    "rl-lora status runs/quickstart",
    "rl-lora status runs/*",
    "watch -n 5 rl-lora status runs/quickstart",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")


def run(arguments: argparse.Namespace) -> int:
    """Prints the status of each run; returns the exit code.

    Raises:
        UserError: one of the folders is no run folder, or a record is damaged.
    """
    statuses = [read_status(folder) for folder in arguments.runs]
    blocks = ["\n".join(status_lines(status, _sparks())) for status in statuses]
    encoding = sys.stdout.encoding or "utf-8"
    print("\n\n".join(blocks).encode(encoding, "backslashreplace").decode(encoding))
    return 0


def read_status(folder: Path, now: float | None = None) -> Status:
    """Reads a run folder, of RL or of supervised training.

    Args:
        folder: the run's.
        now: seconds since 1970; None: the clock's.

    Raises:
        UserError: no run folder, or a damaged record, naming it. A half-written last line is not
            damage: it is left out.
    """
    now = time.time() if now is None else now
    record_path, metrics_path = folder / _RECORD_FILE, folder / METRICS_FILE
    if not record_path.is_file() and not metrics_path.is_file():
        raise UserError(
            f"{folder} is no run folder: it has neither {_RECORD_FILE} nor {METRICS_FILE}"
        )
    record = _read_record(record_path)
    steps = jsonl.read_lines(metrics_path) if metrics_path.is_file() else []
    warm_path = folder / "warm_start.jsonl"
    warm_start = jsonl.read_lines(warm_path) if warm_path.is_file() else []
    evaluations = [load_result(path) for path in sorted((folder / "eval").glob("step_[0-9]*.json"))]
    step = int(steps[-1]["step"]) if steps else 0
    config = record.get("config", {})
    num_steps = config.get("run", {}).get("num_steps")
    silent_s = max(0.0, now - _last_write(folder))
    is_complete = num_steps is not None and step >= num_steps and (folder / "adapter").is_dir()
    if "sampling" in config and not any(
        (evaluation.step or 0) == num_steps for evaluation in evaluations
    ):
        is_complete = False  # the last evaluation is still to come
    state, reason = _state(record.get("process"), is_complete, silent_s, _patience(steps))
    recent = [s for r in steps[-_RECENT_STEPS:] if (s := _number(r, "time/step_s")) is not None]
    eta_s = None
    if state == "running" and recent and num_steps is not None and step < num_steps:
        eta_s = (num_steps - step) * sum(recent) / len(recent)
    return Status(
        folder=folder,
        state=state,
        reason=reason,
        step=step,
        num_steps=num_steps,
        eta_s=eta_s,
        silent_s=silent_s,
        steps=steps,
        warm_start=warm_start,
        evaluations=[evaluation for evaluation in evaluations if evaluation.step is not None],
        pending="" if is_complete else _pending_evaluation(folder),
        best=best_evaluation(folder, sys.maxsize),
    )


def status_lines(status: Status, sparks: str = _SPARKS) -> list[str]:
    """The lines of one run, none longer than 80 characters."""
    of = "" if status.num_steps is None else f" of {status.num_steps}"
    head = f"  {status.state}  step {status.step}{of}"
    if status.eta_s is not None:
        head += f"  {seconds_text(status.eta_s)} left"
    body = [f"{status.reason}; last written {_ago(status.silent_s)} ago"]
    if status.warm_start and not status.steps:
        body.append(f"warm start: step {status.warm_start[-1]['step']}")
    for row in _ROWS:
        # A number that only some steps have, such as a test loss, is the last one there is.
        parts = [
            form.format(value)
            for key, form in row
            if (value := _last(status.steps or status.warm_start, key)) is not None
        ]
        if parts:
            body.append("  ".join(parts))
    body += _evaluation_lines(status)
    body += _curve_lines(status, sparks)
    name = printable(str(status.folder))
    room = WIDTH - len(head)
    name = name if len(name) <= room else "…" + name[len(name) - room + 1 :]
    return [name + head, *(_cut(f"  {line}") for line in body)]


def sparkline(values: Sequence[float | None], width: int, sparks: str = _SPARKS) -> str:
    """The curve in one line of up to `width` characters, from its lowest to its highest value.

    More values than characters are averaged in equal parts; a part without a number is a blank.
    """
    parts = _parts(values, width)
    numbers = [part for part in parts if part is not None]
    if not numbers:
        return ""
    low, span = min(numbers), max(numbers) - min(numbers)
    top = len(sparks) - 1
    return "".join(
        " " if part is None else sparks[round(top * (part - low) / span) if span else top // 2]
        for part in parts
    )


# --- the state ------------------------------------------------------------------------------------


def _state(
    process: Mapping[str, Any] | None, is_complete: bool, silent_s: float, patience_s: float
) -> tuple[str, str]:
    """(state, how it is known)."""
    if is_complete:
        return "finished", "all steps are done"
    if process is None:
        if silent_s <= patience_s:
            return "running", "by its files; no process is on record"
        return "killed", "no process is on record; --resume goes on"
    pid, host = int(process["pid"]), str(process["host"])
    if host != platform.node():
        name = printable(host, 24)
        if silent_s <= patience_s:
            return "running", f"by its files; its process {pid} is on {name}"
        return "unknown", f"silent, and its process {pid} is on {name}"
    if not is_alive(pid, float(process["started"])):
        return "killed", f"process {pid} is gone; --resume goes on"
    if silent_s > patience_s:
        return "stalled", f"process {pid} lives, but is silent"
    return "running", f"process {pid}"


def _patience(steps: Sequence[Mapping[str, Any]]) -> float:
    """Seconds of silence that are no reason to worry: an evaluation or the start may take long."""
    longest = max((_number(record, "time/step_s") or 0.0 for record in steps), default=0.0)
    return max(_STALLED_S, 3 * longest)


def _last_write(folder: Path) -> float:
    """When the newest record was written, in seconds since 1970."""
    files = [folder / name for name in (_RECORD_FILE, METRICS_FILE, "warm_start.jsonl")]
    files += [*(folder / "eval").glob("*"), *(folder / "checkpoints").glob("*")]
    times = []
    for path in files:
        try:
            times.append(path.stat().st_mtime)
        except FileNotFoundError:  # not there, or replaced in this moment
            continue
    return max(times, default=0.0)


def _read_record(path: Path) -> dict[str, Any]:
    """run.json; nothing where the run has not come so far."""
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: it is no JSON object")
    return record


# --- lines ----------------------------------------------------------------------------------------


def _evaluation_lines(status: Status) -> list[str]:
    lines = []
    if status.evaluations:
        last = status.evaluations[-1]
        total = last.total
        lines.append(
            f"evaluation, step {last.step}: {accuracy_name(total.num_samples)} "
            f"{accuracy_text(total)}, {total.num_problems} problems"
        )
    if status.best is not None:
        best = status.best
        lines.append(f"best, step {best.step}: {share_text(best.accuracy, best.low, best.high)}")
    return [*lines, status.pending] if status.pending else lines


def _pending_evaluation(folder: Path) -> str:
    """The newest evaluation without a result; empty where there is none."""
    files = [
        path
        for path in (folder / "eval").glob(f"*{SUFFIX}")
        if not path.with_name(path.name.removesuffix(SUFFIX) + ".json").is_file()
    ]
    if not files:
        return ""
    path = max(files, key=os.path.getmtime)
    settings, problems = read_evaluation(path)
    of = f" of {settings['num_problems']}" if "num_problems" in settings else ""
    name = printable(path.name.removesuffix(SUFFIX), 30)
    return f"evaluation {name}: {len(problems)}{of} problems so far"


def _curve_lines(status: Status, sparks: str) -> list[str]:
    """Sparklines with the values at both ends."""
    records = status.steps or status.warm_start
    curves = [(label, [_number(r, key) for r in records], form) for key, label, form in _CURVES]
    curves.append(
        ("evaluation", [evaluation.accuracy for evaluation in status.evaluations], "{:.1%}")
    )
    lines = []
    for label, values, form in curves:
        numbers = [value for value in values if value is not None]
        if len(numbers) > 1:
            low, high = form.format(min(numbers)), form.format(max(numbers))
            curve = sparkline(values, _SPARK_WIDTH, sparks)
            lines.append(f"{label:10s} {curve}  {low} to {high}")
    return lines


def _parts(values: Sequence[float | None], width: int) -> list[float | None]:
    if len(values) <= width:
        return list(values)
    edges = [len(values) * index // width for index in range(width + 1)]
    parts: list[float | None] = []
    for first, end in pairwise(edges):
        numbers = [value for value in values[first:end] if value is not None]
        parts.append(sum(numbers) / len(numbers) if numbers else None)
    return parts


def _number(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)  # NaN and infinities are null
    return float(value) if isinstance(value, int | float) else None


def _last(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The newest number; a null in the newest step is not covered up by an older one."""
    return next((_number(record, key) for record in reversed(records) if key in record), None)


def _ago(seconds: float) -> str:
    days = int(seconds // 86400)
    return seconds_text(seconds) if days == 0 else f"{days} day{'' if days == 1 else 's'}"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def _sparks() -> str:
    """What the terminal's encoding can show."""
    try:
        _SPARKS.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return _ASCII_SPARKS
    return _SPARKS
