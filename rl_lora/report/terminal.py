"""Progress on the terminal: a bar with an ETA and one line per step; plain lines elsewhere.

Text from data or models goes through `tables.printable` and is never interpreted as markup.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from rl_lora import distributed
from rl_lora.evaluation.paired import PairedResult, PairedScores
from rl_lora.evaluation.scores import EvalResult
from rl_lora.report.tables import (
    accuracy_name,
    accuracy_text,
    evaluation_table,
    paired_line,
    paired_table,
    phase_table,
    printable,
    seconds_text,
)

# Our own moving average for the ETA: rich's has no estimate after the first step, and forgets
# steps that are longer than its window.
_SMOOTHING = 0.2  # weight of the newest step
_QUIET_LINE_S = 30  # between lines on the progress of a long phase, if there is no bar
_FILE_WIDTH = 120  # characters, if the output is not a terminal

# Key of a step's metrics, format.
_COLUMNS: tuple[tuple[str, str], ...] = (
    ("sft/loss", "loss {:.3f}"),
    ("reward/mean", "reward {:.3f}"),
    ("reward/correct_mean", "correct {:.1%}"),
    ("cot/tokens_mean", "length {:.0f}"),
    ("cot/truncated_rate", "truncated {:.0%}"),
    ("mismatch/kl", "kl {:.1e}"),
    ("speed/sample_tokens_per_s", "{:.0f} tok/s"),
    ("eval/accuracy", "held-out {:.1%}"),
    ("time/step_s", "{:.1f} s"),
)


def step_line(metrics: Mapping[str, float]) -> str:
    """`reward 0.431  correct 31.2%  length 54  ...`, of the numbers present."""
    return "  ".join(form.format(metrics[key]) for key, form in _COLUMNS if key in metrics)


@dataclass
class _Phase:
    """Progress of a long phase: an evaluation, or the sampling of one step."""

    name: str
    task: TaskID
    total: int
    start: float  # seconds, of perf_counter
    last_line: float  # when a line was last printed
    done: float = 0  # completions of a step; problems of an evaluation, partly sampled ones in part
    first: int = 0  # of a resumed evaluation: problems done before
    whole: int = 0  # of an evaluation: problems done
    now: int = 0  # of an evaluation: problems being sampled
    num_tokens: int = 0  # of the sampler's finished calls
    call_tokens: int = 0  # of its current call

    def rate_and_eta(self, now: float) -> str:
        """`210 tok/s  1 min 02 s left`, if they can be estimated yet."""
        elapsed = now - self.start
        parts = []
        if elapsed > 0 and (tokens := self.num_tokens + self.call_tokens):
            parts.append(f"{tokens / elapsed:,.0f} tok/s")
        if self.first < self.done < self.total:
            left = elapsed * (self.total - self.done) / (self.done - self.first)
            parts.append(f"{seconds_text(left)} left")
        return "  ".join(parts)


class Display:
    """Progress of a job; a context manager.

    Example:
        with Display(quiet=False) as display:
            display.stage("training", num_steps=100)
            display.step(1, metrics)

    On a terminal a bar stays below the lines; elsewhere (a file, a pipe, CI) there are only plain
    lines without control characters. Quiet: only warnings and the summary. Of a job's processes
    only rank 0 prints.
    """

    def __init__(self, quiet: bool = False, console: Console | None = None) -> None:
        # Lines in a file are not wrapped; tables get room for three columns.
        width = None if sys.stdout.isatty() else _FILE_WIDTH
        is_silent = not distributed.is_main()
        self._console = console or Console(
            file=sys.stdout, highlight=False, width=width, quiet=is_silent
        )
        self._quiet = quiet or is_silent
        self._is_live = self._console.is_interactive and not self._quiet
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[eta]}", markup=False),
            console=self._console,
            disable=not self._is_live,
        )
        self._task: TaskID | None = None
        self._phases: dict[str, _Phase] = {}  # "evaluation", "sampling": those under way
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
        """Prints one line, e.g. what was loaded."""
        if not self._quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        """Prints one line, quiet or not."""
        self._print(f"warning: {text}")

    def stage(self, name: str, num_steps: int, done: int = 0) -> None:
        """Starts a bar for steps done + 1 .. num_steps."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=num_steps, completed=done, eta="")
        self._stage, self._num_steps = name, num_steps
        self._step_s = None
        self._last_time = time.perf_counter()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Reports that step `step` of the stage is done."""
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

    def evaluation(self, done: int, total: int, now: int) -> None:
        """Progress of an evaluation, for `evaluate(on_progress=...)`."""
        phase = self._phase("evaluation", total, done)
        phase.num_tokens += phase.call_tokens
        phase.done = phase.whole = done
        phase.now, phase.call_tokens = now, 0
        self._show(phase, is_over=done >= total)

    def sampling(self, done: int, total: int, num_tokens: int) -> None:
        """Progress of one call of the sampler, in completions, for its `on_progress`.

        Within an evaluation this moves the evaluation's bar. Call it with 0 done when a step starts
        sampling, so that the speed counts from there.
        """
        evaluation = self._phases.get("evaluation")
        phase = evaluation or self._phase("sampling", total)
        phase.call_tokens = num_tokens
        phase.done = phase.whole + phase.now * done / total if evaluation else done
        self._show(phase, is_over=evaluation is None and done >= total)

    def evaluation_result(self, name: str, result: EvalResult) -> None:
        """Prints `name: accuracy 25.0% (19.2 to 31.6), format 90.0%, ...`."""
        total = result.total
        speed = f", {result.num_tokens / result.seconds:,.0f} tok/s" if result.seconds > 0 else ""
        self.note(
            f"{name}: {accuracy_name(total.num_samples)} {accuracy_text(total)}, "
            f"format {total.format_rate:.1%}, {total.num_problems} problems, "
            f"{seconds_text(result.seconds)}{speed}"
        )

    def table(self, table: Table) -> None:
        """Prints a table, quiet or not."""
        table.box = box.ROUNDED if self._console.is_terminal else box.ASCII2
        self._console.print(table)

    def evaluations(self, results: Mapping[str, EvalResult]) -> None:
        """Prints a table of the evaluations, if there are any, quiet or not."""
        if results:
            self.table(evaluation_table(results))

    def comparison(self, result: PairedResult) -> None:
        """Prints the table of a paired comparison, quiet or not."""
        self.table(paired_table(result))
        for note in result.notes:
            self._print(note)

    def summary(
        self,
        evaluations: Mapping[str, EvalResult],
        comparisons: Mapping[str, PairedScores],
        seconds_by_phase: Mapping[str, float],
    ) -> None:
        """Prints the closing tables, quiet or not: evaluations by policy, paired differences by
        name (`before to after`), and the seconds of the whole run."""
        self.evaluations(evaluations)
        for name, scores in comparisons.items():
            self._print(f"{name}: {paired_line(scores)}")
        if seconds_by_phase:
            self.table(phase_table(seconds_by_phase))

    def _phase(self, name: str, total: int, first: int = 0) -> _Phase:
        """The phase under way, started if need be."""
        if name not in self._phases:
            now, task = time.perf_counter(), self._progress.add_task(name, total=total, eta="")
            self._phases[name] = _Phase(name, task, total, now, now, first=first)
        return self._phases[name]

    def _show(self, phase: _Phase, *, is_over: bool) -> None:
        """Moves the bar; without one, prints a line now and then."""
        now = time.perf_counter()
        eta = phase.rate_and_eta(now)
        self._progress.update(phase.task, completed=int(phase.done), eta=eta)
        is_due = now - phase.last_line >= _QUIET_LINE_S and phase.done < phase.total
        if is_due and not self._is_live:
            self.note(f"{phase.name} {int(phase.done)}/{phase.total}  {eta}".rstrip())
            phase.last_line = now
        if is_over:
            self._progress.remove_task(self._phases.pop(phase.name).task)

    def _print(self, text: str) -> None:
        encoding = self._console.encoding
        text = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        # soft_wrap: a pipe gets whole lines, whatever width rich assumes.
        self._console.print(Text(text), soft_wrap=True)
