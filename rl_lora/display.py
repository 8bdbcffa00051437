"""What the terminal shows: a bar with ETA and one line a step, or plain lines where there is none.

Only numbers and texts of ours are printed as they are; text from data or model goes through
`printable` and is never taken for markup.
"""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Mapping
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from rl_lora.evaluate import EvalResult, ExamScores, compare

_SMOOTHING = 0.2  # weight of the newest step in the seconds a step that the ETA is made of
_EXAM_LINE_S = 30  # between lines of an evaluation's progress, where there is no bar
_FILE_WIDTH = 120  # characters, where the output is no terminal
_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

# Key of a step's metrics, label, format.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("sft/loss", "loss", "{:.3f}"),
    ("reward/mean", "reward", "{:.3f}"),
    ("reward/correct_mean", "correct", "{:.1%}"),
    ("cot/tokens_mean", "length", "{:.0f}"),
    ("cot/truncated_rate", "truncated", "{:.0%}"),
    ("mismatch/kl", "kl", "{:.1e}"),
    ("speed/sample_tokens_per_s", "tok/s", "{:.0f}"),
    ("eval/accuracy", "held-out", "{:.1%}"),
    ("time/step_s", "s", "{:.1f}"),
)


def printable(text: str, max_chars: int | None = None) -> str:
    """The text with every control, format and unassigned character shown as an escape.

    Line feed and tab as well: the text cannot move the cursor, set colours or reorder a line.
    """
    if max_chars is not None and len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _HIDDEN_CATEGORIES
        else character
        for character in text
    )


def seconds_text(seconds: float) -> str:
    """42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def step_line(metrics: Mapping[str, float]) -> str:
    """`reward 0.431  correct 31.2%  length 54  ...`, of the numbers that are there."""
    parts = [
        f"{label} {form.format(metrics[key])}" for key, label, form in _COLUMNS if key in metrics
    ]
    return "  ".join(parts)


class Display:
    """Progress of a job; a context manager.

    Example:
        with Display(quiet=False) as display:
            display.stage("training", num_steps=100)
            display.step(1, metrics)

    On a terminal a bar stays below the lines; elsewhere (a file, a pipe, CI) there are plain lines
    alone, without control characters. Quiet: nothing but warnings and the summary.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        # In a file lines are as long as they are; the tables get room for three columns.
        width = None if sys.stdout.isatty() else _FILE_WIDTH
        self._console = console or Console(file=sys.stdout, highlight=False, width=width)
        self._quiet = quiet
        self._is_live = self._console.is_interactive and not quiet
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}", markup=False),
            console=self._console,
            disable=not self._is_live,
        )
        self._task: TaskID | None = None
        self._exam: TaskID | None = None
        self._exam_told = 0.0
        self._stage = "step"
        self._num_steps = 0
        self._step_s: float | None = None
        self._last_time = time.perf_counter()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """One line, e.g. what was loaded."""
        if not self._quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """One line that quiet does not hide."""
        self._print(f"warning: {text}")

    def stage(self, name: str, num_steps: int, done: int = 0) -> None:
        """A new bar: steps done + 1 .. num_steps follow."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=num_steps, completed=done, eta="")
        self._stage, self._num_steps = name, num_steps
        self._step_s = None
        self._last_time = time.perf_counter()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Step `step` of the stage is done."""
        now = time.perf_counter()
        seconds, self._last_time = now - self._last_time, now
        previous = seconds if self._step_s is None else self._step_s
        self._step_s = (1 - _SMOOTHING) * previous + _SMOOTHING * seconds
        left = self._num_steps - step
        eta = f"{seconds_text(left * self._step_s)} left" if left > 0 else ""
        if self._task is not None:
            self._progress.update(self._task, completed=step, eta=eta)
        if not self._quiet:
            line = f"{self._stage} {step}/{self._num_steps}  {step_line(metrics)}"
            self._print(line if self._is_live or not eta else f"{line}  {eta}")

    def exam(self, done: int, total: int) -> None:
        """Progress of an evaluation; fits `evaluate(on_progress=...)`."""
        now = time.perf_counter()
        if self._exam is None:
            self._exam = self._progress.add_task("evaluation", total=total, eta="")
            self._exam_told = now
        self._progress.update(self._exam, completed=done)
        if done < total and now - self._exam_told >= _EXAM_LINE_S and not self._is_live:
            self.note(f"evaluation {done}/{total}")
            self._exam_told = now
        if done >= total:
            self._progress.remove_task(self._exam)
            self._exam = None

    def exam_result(self, name: str, result: EvalResult) -> None:
        """One line: `name: accuracy 25.0% (19.5-31.4), format 90.0%, ...`."""
        self.note(
            f"{name}: accuracy {_interval(result.total)}, format {result.total.format_rate:.1%}, "
            f"{result.total.num_problems} problems, {seconds_text(result.seconds)}"
        )

    def exams(self, results: Mapping[str, EvalResult]) -> None:
        """A table with a column for each named exam, quiet or not; nothing for none."""
        if results:
            self._console.print(exam_table(results, self._box))

    def summary(
        self,
        before: EvalResult | None,
        after: EvalResult | None,
        seconds_by_phase: Mapping[str, float],
        base: EvalResult | None = None,
    ) -> None:
        """The closing tables, quiet or not.

        Args:
            before: the policy that RL started from.
            after: the policy at the end.
            seconds_by_phase: phase -> seconds of the whole run.
            base: the base model without adapter, where a warm start came before RL.
        """
        named = {"base model": base, "before": before, "after": after}
        self.exams({name: result for name, result in named.items() if result is not None})
        if base is not None and after is not None:
            self._print(f"base model to after: {comparison_line(base, after)}")
        if before is not None and after is not None:
            self._print(f"before to after: {comparison_line(before, after)}")
        if seconds_by_phase:
            self._console.print(phase_table(seconds_by_phase, self._box))

    @property
    def _box(self) -> box.Box:
        return box.ROUNDED if self._console.is_terminal else box.ASCII2

    def _print(self, text: str) -> None:
        encoding = self._console.encoding
        text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        # soft_wrap: a pipe gets whole lines, whatever width rich takes it for.
        self._console.print(Text(text), soft_wrap=True)


def exam_table(results: Mapping[str, EvalResult], style: box.Box = box.ROUNDED) -> Table:
    """A column an exam: accuracy with its interval, format, length; a block for each source."""
    confidence = next(iter(results.values())).confidence
    table = Table(title=f"Held-out problems ({confidence:.0%} intervals)", box=style)
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    sources = sorted({source for result in results.values() for source in result.by_source})
    blocks: list[str | None] = [None, *(sources if len(sources) > 1 else [])]
    for source in blocks:
        columns = [
            result.total if source is None else result.by_source.get(source)
            for result in results.values()
        ]
        _add_block(table, source, columns)
    return table


def _add_block(table: Table, source: str | None, columns: list[ExamScores | None]) -> None:
    title = "" if source is None else f"{printable(source, 30)}: "
    num_samples = max(scores.num_samples for scores in columns if scores is not None)
    rows = {
        "accuracy": _interval,
        "in the asked format": lambda scores: f"{scores.format_rate:.1%}",
        "accuracy within the format": lambda scores: (
            "-" if scores.accuracy_formatted is None else f"{scores.accuracy_formatted:.1%}"
        ),
        "length, tokens": lambda scores: f"{scores.tokens_mean:.0f}",
        "truncated": lambda scores: f"{scores.truncated_rate:.1%}",
        "problems": lambda scores: str(scores.num_problems),
    }
    if num_samples > 1:
        rows[f"any of {num_samples} correct"] = lambda scores: f"{scores.pass_at_k:.1%}"
        rows[f"majority of {num_samples}"] = lambda scores: f"{scores.majority_accuracy:.1%}"
    for label, form in rows.items():
        cells = ["-" if scores is None else form(scores) for scores in columns]
        table.add_row(Text(title + label), *cells)
    table.add_section()


def comparison_line(before: EvalResult, after: EvalResult) -> str:
    """`accuracy +25.0 points (+16.2 to +33.1), 2.0 times; the intervals do not overlap`."""
    result = compare(before, after)
    times = "" if result.ratio is None else f", {result.ratio:.1f} times"
    overlap = "do not overlap" if result.are_disjoint else "overlap"
    return (
        f"accuracy {100 * result.difference:+.1f} points "
        f"({100 * result.difference_low:+.1f} to {100 * result.difference_high:+.1f}){times}; "
        f"the intervals {overlap}"
    )


def phase_table(seconds_by_phase: Mapping[str, float], style: box.Box = box.ROUNDED) -> Table:
    """Seconds by phase with their share, the longest first."""
    total = sum(seconds_by_phase.values())
    table = Table(title="Seconds by phase", box=style)
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in sorted(seconds_by_phase.items(), key=lambda item: -item[1]):
        share = f"{seconds / total:.0%}" if total > 0 else "-"
        table.add_row(Text(printable(name)), f"{seconds:.1f}", share)
    table.add_section()
    table.add_row("sum", f"{total:.1f}", "")
    return table


def _interval(scores: ExamScores) -> str:
    return (
        f"{scores.accuracy:.1%} ({100 * scores.accuracy_low:.1f} to "
        f"{100 * scores.accuracy_high:.1f})"
    )
