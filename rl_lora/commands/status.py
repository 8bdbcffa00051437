"""`rl-lora status`: the state of runs, from their files and the process named in run.json.

Nothing in a run folder is changed, and torch is not loaded. Whether a process is alive can be
checked only on its own host; elsewhere the age of the files has to do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from rl_lora.evaluation.best import BestCheckpoint, best_evaluation
from rl_lora.evaluation.files import SUFFIX, read_evaluation
from rl_lora.report.records import (
    WARM_START_FILE,
    Record,
    RunRecord,
    number,
    read_run,
    series,
)
from rl_lora.report.tables import accuracy_name, accuracy_text, printable, seconds_text, share_text
from rl_lora.runs.lock import is_alive
from rl_lora.runs.log import METRICS_FILE, RECORD_FILE

WIDTH = 80  # columns that every line fits into
_SPARK_WIDTH = 40
_SPARKS, _ASCII_SPARKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_RECENT_STEPS = 10  # the ETA is their mean
_STALLED_S = 600.0  # without a write to the files; more if steps take long

# Rows of (key of a step's metrics, format).
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
        ("time/step_s", "{:.1f} s per step"),
    ),
)
# Key, label, format of the bounds.
_CURVES: tuple[tuple[str, str, str], ...] = (
    ("sft/loss", "loss", "{:.3f}"),
    ("reward/mean", "reward", "{:.3f}"),
    ("cot/tokens_mean", "length", "{:.0f}"),
)


@dataclass(frozen=True)
class Status:
    """The state of one run."""

    run: RunRecord
    state: str  # running, stalled, killed, finished; unknown: on another host, and silent
    reason: str  # how the state is known, e.g. "process 4711"
    num_steps: int | None  # None: there is no run.json yet
    eta_s: float | None
    silent_s: float  # since the last write to a file
    pending: str  # the unfinished evaluation, in words
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
        UserError: a folder is not a run's, or a record is damaged.
    """
    text = "\n\n".join("\n".join(status_lines(read_status(one))) for one in arguments.runs)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        _SPARKS.encode(encoding)
    except UnicodeEncodeError:  # an ASCII terminal
        text = text.translate(str.maketrans(_SPARKS, _ASCII_SPARKS))
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def read_status(folder: Path, now: float | None = None) -> Status:
    """Reads a run folder, of RL or of supervised training, at `now` (seconds since 1970).

    Raises:
        UserError: as `read_run`.
    """
    now = time.time() if now is None else now
    run = read_run(folder)
    num_steps, step = run.setting("run", "num_steps"), run.last_step
    silent_s = max(0.0, now - _last_write(folder))
    is_complete = num_steps is not None and step >= num_steps and (folder / "adapter").is_dir()
    if "sampling" in run.config and num_steps not in [one.step for one in run.held_out]:
        is_complete = False  # the last evaluation is still to come
    step_s = series(run.steps, "time/step_s")[1]
    patience_s = max(_STALLED_S, 3 * max(step_s, default=0.0))
    state, reason = _state(run.facts.get("process"), is_complete, silent_s, patience_s)
    recent = series(run.steps[-_RECENT_STEPS:], "time/step_s")[1]
    eta_s = None
    if state == "running" and recent and num_steps is not None and step < num_steps:
        eta_s = (num_steps - step) * fmean(recent)
    return Status(
        run=run,
        state=state,
        reason=reason,
        num_steps=num_steps,
        eta_s=eta_s,
        silent_s=silent_s,
        pending="" if is_complete else _pending_evaluation(folder),
        best=best_evaluation(folder, sys.maxsize),
    )


def status_lines(status: Status) -> list[str]:
    """The lines of one run, none longer than 80 characters."""
    run = status.run
    of = "" if status.num_steps is None else f" of {status.num_steps}"
    head = f"  {status.state}  step {run.last_step}{of}"
    if status.eta_s is not None:
        head += f"  {seconds_text(status.eta_s)} left"
    body = [f"{status.reason}; last write {_ago(status.silent_s)} ago"]
    if run.warm_start and not run.steps:
        body.append(f"warm start: step {run.warm_start[-1]['step']}")
    for row in _ROWS:
        # Some numbers, such as a test loss, are not recorded at every step: the newest counts.
        parts = [
            form.format(value)
            for key, form in row
            if (value := _last(run.steps or run.warm_start, key)) is not None
        ]
        if parts:
            body.append("  ".join(parts))
    body += _evaluation_lines(status)
    body += _curve_lines(run)
    body += [printable(note) for note in run.notes]
    name = printable(str(run.folder))
    room = WIDTH - len(head)
    name = name if len(name) <= room else "…" + name[len(name) - room + 1 :]
    return [name + head, *(part for line in body for part in _wrapped(line))]


def sparkline(values: Sequence[float | None], width: int) -> str:
    """The curve in one line of up to `width` characters, from its lowest to its highest value.

    If there are more values than characters, equal parts are averaged; a part without a number is
    blank.
    """
    num = min(width, len(values))
    edges = [len(values) * index // max(1, num) for index in range(num + 1)]
    parts = [[v for v in values[first:end] if v is not None] for first, end in pairwise(edges)]
    means = [fmean(part) if part else None for part in parts]
    numbers = [mean for mean in means if mean is not None]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    top = len(_SPARKS) - 1
    return "".join(
        " "
        if mean is None
        else _SPARKS[round(top * (mean - low) / (high - low)) if high > low else top // 2]
        for mean in means
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
            return "running", "its files are fresh; no process is on record"
        return "killed", "no process is on record; continue with --resume"
    pid, host = int(process["pid"]), str(process["host"])
    if host != platform.node():
        name = printable(host, 24)
        if silent_s <= patience_s:
            return "running", f"its files are fresh; process {pid} is on {name}"
        return "unknown", f"no recent write; process {pid} is on {name}"
    if not is_alive(pid, float(process["started"])):
        return "killed", f"process {pid} is gone; continue with --resume"
    if silent_s > patience_s:
        return "stalled", f"process {pid} is alive, but writes nothing"
    return "running", f"process {pid}"


def _last_write(folder: Path) -> float:
    """When the newest record was written, in seconds since 1970."""
    files = [folder / name for name in (RECORD_FILE, METRICS_FILE, WARM_START_FILE)]
    files += [*(folder / "eval").glob("*"), *(folder / "checkpoints").glob("*")]
    times = [0.0]
    for path in files:
        with contextlib.suppress(FileNotFoundError):  # absent, or being replaced
            times.append(path.stat().st_mtime)
    return max(times)


# --- lines ----------------------------------------------------------------------------------------


def _evaluation_lines(status: Status) -> list[str]:
    lines = []
    if evaluations := status.run.held_out:
        last, total = evaluations[-1], evaluations[-1].result.total
        lines.append(
            f"evaluation, step {last.step}: {accuracy_name(total.num_samples)} "
            f"{accuracy_text(total)}, {total.num_problems} problems"
        )
    if status.best is not None:
        best = status.best
        lines.append(f"best, step {best.step}: {share_text(best.accuracy, best.low, best.high)}")
    return [*lines, status.pending] if status.pending else lines


def _pending_evaluation(folder: Path) -> str:
    """The newest evaluation without a result; empty if there is none."""
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


def _curve_lines(run: RunRecord) -> list[str]:
    """Sparklines, each with its lowest and highest value."""
    records = run.steps or run.warm_start
    curves = [(label, [number(r.get(key)) for r in records], form) for key, label, form in _CURVES]
    accuracies: list[float | None] = [one.result.accuracy for one in run.held_out]
    curves.append(("accuracy", accuracies, "{:.1%}"))
    lines = []
    for label, values, form in curves:
        numbers = [value for value in values if value is not None]
        if len(numbers) > 1:
            low, high = form.format(min(numbers)), form.format(max(numbers))
            lines.append(f"{label:8s} {sparkline(values, _SPARK_WIDTH)}  {low} to {high}")
    return lines


def _last(records: Sequence[Record], key: str) -> float | None:
    """The newest value, None if that is not finite."""
    return next((number(record[key]) for record in reversed(records) if key in record), None)


def _ago(seconds: float) -> str:
    days = int(seconds // 86400)
    return seconds_text(seconds) if days == 0 else f"{days} day{'' if days == 1 else 's'}"


def _wrapped(line: str) -> list[str]:
    lines = textwrap.wrap(line, WIDTH - 4, drop_whitespace=False, replace_whitespace=False)
    return [f"  {lines[0]}", *(f"    {more.strip()}" for more in lines[1:])]
