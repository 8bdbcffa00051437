"""Texts and tables for the terminal: evaluations, comparisons, times.

Text from data or models goes through `printable` and is never interpreted as markup.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rl_lora.evaluation.paired import PairedResult, PairedScores
from rl_lora.evaluation.scores import EvalResult, EvaluationScores, OutcomeStats

if TYPE_CHECKING:
    from rl_lora.evaluation.regrade import Regrade

_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_CELL_CHARS = 40

_Cell = Callable[[EvaluationScores], str]


def printable(text: str, max_chars: int | None = None) -> str:
    """The text with every control, format and unassigned character as an escape.

    Line feeds and tabs included: the text cannot move the cursor, set colours or reorder a line.
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


def share_text(value: float, low: float | None, high: float | None) -> str:
    """25.0% (19.2 to 31.6)."""
    if low is None or high is None:
        return f"{value:.1%}"
    return f"{value:.1%} ({100 * low:.1f} to {100 * high:.1f})"


def accuracy_text(scores: EvaluationScores) -> str:
    """The accuracy with its interval."""
    return share_text(scores.accuracy, scores.accuracy_low, scores.accuracy_high)


def accuracy_name(num_samples: int) -> str:
    """The name of the accuracy with k samples per problem."""
    return "accuracy" if num_samples == 1 else f"accuracy (avg@{num_samples})"


# --- evaluations ----------------------------------------------------------------------------------


def evaluation_table(results: Mapping[str, EvalResult], style: box.Box = box.ROUNDED) -> Table:
    """One column per evaluation and one block of rows per source."""
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


def _add_block(
    table: Table, source: str | None, columns: Sequence[EvaluationScores | None]
) -> None:
    title = "" if source is None else f"{printable(source, 30)}: "
    there = [scores for scores in columns if scores is not None]
    for label, form in _rows(max(scores.num_samples for scores in there)).items():
        cells = ["-" if scores is None else form(scores) for scores in columns]
        if label in _ONLY_IF_ANY and all(cell in _ONLY_IF_ANY[label] for cell in cells):
            continue
        table.add_row(Text(title + label), *cells)
    table.add_section()


# Rows that are left out if every cell is one of these, as in most evaluations.
_ONLY_IF_ANY = {"no answer": ("-", "0.0%"), "verifier timeouts": ("-", "0.0%")}


def _rows(num_samples: int) -> dict[str, _Cell]:
    """Label -> cell, of an evaluation with k samples per problem."""
    rows: dict[str, _Cell] = {accuracy_name(num_samples): accuracy_text}
    if num_samples > 1:
        rows[f"any of {num_samples} correct (pass@{num_samples})"] = _pass_at_k
        rows[f"majority of {num_samples} (maj@{num_samples})"] = lambda scores: share_text(
            scores.majority_accuracy, scores.majority_low, scores.majority_high
        )
    return rows | {
        "in the requested format": lambda scores: f"{scores.format_rate:.1%}",
        "accuracy within the format": lambda scores: _percent(scores.accuracy_formatted),
        "length, tokens": _length,
        "  correct / wrong": lambda scores: _halves(
            scores, lambda split: f"{split.tokens_mean:.0f}"
        ),
        "truncated": lambda scores: f"{scores.truncated_rate:.1%}",
        "  of the correct / wrong": lambda scores: _halves(
            scores, lambda split: f"{split.truncated_rate:.1%}"
        ),
        "no answer": lambda scores: _percent(scores.no_answer_rate),
        "verifier timeouts": lambda scores: _percent(scores.timeout_rate),
        "problems": lambda scores: str(scores.num_problems),
    }


def _pass_at_k(scores: EvaluationScores) -> str:
    estimate = (scores.pass_at or {}).get(str(scores.num_samples))
    if estimate is None:
        return f"{scores.pass_at_k:.1%}"
    return share_text(estimate.value, estimate.low, estimate.high)


def _length(scores: EvaluationScores) -> str:
    if scores.tokens_low is None or scores.tokens_high is None:
        return f"{scores.tokens_mean:.0f}"
    return f"{scores.tokens_mean:.0f} ({scores.tokens_low:.0f} to {scores.tokens_high:.0f})"


def _halves(scores: EvaluationScores, form: Callable[[OutcomeStats], str]) -> str:
    halves = [scores.correct, scores.wrong]
    return " / ".join("-" if split is None else form(split) for split in halves)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# --- comparisons ----------------------------------------------------------------------------------


def p_text(p_value: float) -> str:
    """0.034, or 3.1e-07 if it is below 0.001."""
    return f"{p_value:.3f}" if p_value >= 0.001 else f"{p_value:.1e}"


def paired_line(scores: PairedScores) -> str:
    """`accuracy +20.5 points (+14.5 to +26.5), 43 problems won, 2 lost, p 5.9e-11`."""
    return (
        f"accuracy {100 * scores.difference:+.1f} points "
        f"({100 * scores.low:+.1f} to {100 * scores.high:+.1f}), "
        f"{scores.num_won} problems won, {scores.num_lost} lost, p {p_text(scores.p_value)}"
    )


def paired_table(result: PairedResult, style: box.Box = box.ROUNDED) -> Table:
    """The difference with its interval, problems won and lost, tests; one column per source."""
    columns: dict[str, PairedScores] = {"all": result.total}
    if len(result.by_source) > 1:
        columns |= {printable(source, 30): scores for source, scores in result.by_source.items()}
    first, second = printable(result.first, 30), printable(result.second, 30)
    title = f"{second} compared with {first} ({result.confidence:.0%} intervals, paired)"
    table = Table(title=Text(title), box=style, min_width=len(title))
    table.add_column("")
    for name in columns:
        table.add_column(Text(name), justify="right")
    k = result.total.num_samples
    of_majority = f" on the {result.total.mcnemar.verdict}" if k > 1 else ""
    rows: dict[str, Callable[[PairedScores], str]] = {
        f"{accuracy_name(k)}, {first}": lambda scores: f"{scores.first:.1%}",
        f"{accuracy_name(k)}, {second}": lambda scores: f"{scores.second:.1%}",
        "difference, points": lambda scores: (
            f"{100 * scores.difference:+.1f} ({100 * scores.low:+.1f} to {100 * scores.high:+.1f})"
        ),
        "problems won / lost / tied": lambda scores: (
            f"{scores.num_won} / {scores.num_lost} / {scores.num_tied}"
        ),
        "p, sign-flip over problems": lambda scores: p_text(scores.p_value),
        f"p, McNemar{of_majority}": lambda scores: (
            f"{p_text(scores.mcnemar.p_value)} "
            f"({scores.mcnemar.only_second} vs. {scores.mcnemar.only_first})"
        ),
        "problems": lambda scores: str(scores.num_problems),
    }
    for label, form in rows.items():
        table.add_row(Text(label), *(form(scores) for scores in columns.values()))
    return table


# --- times ----------------------------------------------------------------------------------------


def phase_table(seconds_by_phase: Mapping[str, float], style: box.Box = box.ROUNDED) -> Table:
    """Seconds by phase and their share, the longest first."""
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


def print_regrade(report: Regrade, num_shown: int, console: Console | None = None) -> None:
    """The old and new accuracy with intervals, then the first changed verdicts."""
    console = console or Console(highlight=False)
    old, new = report.old, report.new
    statuses = ", ".join(f"{status} {count}" for status, count in new.statuses.items())
    lines = [
        f"{new.num_problems} problems x {new.num_samples} samples, graded by {report.reward} "
        f"(policy {report.policy}): {statuses}",
        f"{accuracy_name(new.num_samples)} {accuracy_text(old)} -> {accuracy_text(new)} "
        f"({report.confidence:.0%} intervals)",
    ]
    num = len(report.changes)
    lines.append(f"{num} of {new.num_problems * new.num_samples} verdicts changed")
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
    if not num:
        return
    table = Table()
    for heading in ("problem", "sample", "reference", "answer", "was", "now", "status"):
        table.add_column(heading)
    for change in report.changes[:num_shown]:
        table.add_row(
            Text(printable(change.prompt_id, _CELL_CHARS)),
            str(change.sample),
            Text(printable(change.reference, _CELL_CHARS)),
            Text(printable(change.answer or "-", _CELL_CHARS)),
            _verdict(change.was),
            _verdict(change.now),
            change.status,
        )
    console.print(table)
    if num > num_shown:
        console.print(
            f"and {num - num_shown} more; print all with --show {num}, or write them with --json"
        )


def _verdict(is_right: bool) -> str:
    return "right" if is_right else "wrong"
