"""Texts and tables for the terminal: evaluations, comparisons, times.

Text from data or models goes through `printable` and is never interpreted as markup.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from rl_lora.evaluation.paired import PairedResult, PairedScores
from rl_lora.evaluation.scores import EvalResult, EvaluationScores

# Controls, formats such as direction overrides, surrogates, private use, unassigned, separators.
HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}

_Cell = Callable[[EvaluationScores], str]


def printable(text: str, max_chars: int | None = None) -> str:
    """The text with every control, format and unassigned character as an escape.

    Line feeds and tabs included: the text cannot move the cursor, set colours or reorder a line.
    """
    if max_chars is not None and len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in HIDDEN_CATEGORIES
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


def _table(title: str, first: str, columns: Iterable[str]) -> Table:
    """A table with names in its first column and numbers in the others."""
    table = Table(first, title=Text(title), box=box.ROUNDED, min_width=len(title))
    for name in columns:
        table.add_column(Text(name), justify="right")
    return table


# --- evaluations ----------------------------------------------------------------------------------


def evaluation_table(results: Mapping[str, EvalResult]) -> Table:
    """One column per evaluation and one block of rows per source."""
    confidence = next(iter(results.values())).confidence
    table = _table(f"Held-out problems ({confidence:.0%} intervals)", "", results)
    sources = sorted({source for result in results.values() for source in result.by_source})
    _add_block(table, "", [result.total for result in results.values()])
    for source in sources if len(sources) > 1 else ():
        title = f"{printable(source, 30)}: "
        _add_block(table, title, [result.by_source.get(source) for result in results.values()])
    return table


def _add_block(table: Table, title: str, columns: Sequence[EvaluationScores | None]) -> None:
    num_samples = max(scores.num_samples for scores in columns if scores is not None)
    for label, form in _rows(num_samples).items():
        cells = ["-" if scores is None else form(scores) for scores in columns]
        if label not in _ONLY_IF_ANY or not {*cells} <= {"-", "0.0%"}:
            table.add_row(Text(title + label), *cells)
    table.add_section()


_ONLY_IF_ANY = ("no answer", "verifier timeouts")  # in most evaluations there are none


def _rows(num_samples: int) -> dict[str, _Cell]:
    """Label -> cell, of an evaluation with k samples per problem."""
    rows: dict[str, _Cell] = {accuracy_name(num_samples): accuracy_text}
    if num_samples > 1:
        rows[f"any of {num_samples} correct (pass@{num_samples})"] = _pass_at_k
        rows[f"majority of {num_samples} (maj@{num_samples})"] = lambda scores: share_text(
            scores.majority_accuracy, scores.majority_low, scores.majority_high
        )
    return rows | {
        "in the requested format": _number("format_rate", ".1%"),
        "accuracy within the format": _number("accuracy_formatted", ".1%"),
        "length, tokens": _length,
        "  correct / wrong": _halves("tokens_mean", ".0f"),
        "truncated": _number("truncated_rate", ".1%"),
        "  of the correct / wrong": _halves("truncated_rate", ".1%"),
        "no answer": _number("no_answer_rate", ".1%"),
        "verifier timeouts": _number("timeout_rate", ".1%"),
        "problems": _number("num_problems", "d"),
    }


def _pass_at_k(scores: EvaluationScores) -> str:
    estimate = (scores.pass_at or {}).get(str(scores.num_samples))
    low, high = (estimate.low, estimate.high) if estimate else (None, None)
    return share_text(scores.pass_at_k, low, high)


def _length(scores: EvaluationScores) -> str:
    if scores.tokens_low is None or scores.tokens_high is None:
        return f"{scores.tokens_mean:.0f}"
    return f"{scores.tokens_mean:.0f} ({scores.tokens_low:.0f} to {scores.tokens_high:.0f})"


def _number(key: str, form: str) -> Callable[[object], str]:
    """What shows a field of scores; "-" if it, or the scores, are None."""
    return lambda scores: (
        "-" if (value := getattr(scores, key, None)) is None else f"{value:{form}}"
    )


def _halves(key: str, form: str) -> _Cell:
    cell = _number(key, form)
    return lambda scores: f"{cell(scores.correct)} / {cell(scores.wrong)}"


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


def paired_table(result: PairedResult) -> Table:
    """The difference with its interval, problems won and lost, tests; one column per source."""
    columns: dict[str, PairedScores] = {"all": result.total}
    if len(result.by_source) > 1:
        columns |= {printable(source, 30): scores for source, scores in result.by_source.items()}
    first, second = printable(result.first, 30), printable(result.second, 30)
    title = f"{second} compared with {first} ({result.confidence:.0%} intervals, paired)"
    table = _table(title, "", columns)
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


def phase_table(seconds_by_phase: Mapping[str, float]) -> Table:
    """Seconds by phase and their share, the longest first."""
    total = sum(seconds_by_phase.values())
    table = _table("Seconds by phase", "phase", ("seconds", "share"))
    for name, seconds in sorted(seconds_by_phase.items(), key=lambda item: -item[1]):
        share = f"{seconds / total:.0%}" if total > 0 else "-"
        table.add_row(Text(printable(name)), f"{seconds:.1f}", share)
    table.add_section()
    table.add_row("sum", f"{total:.1f}", "")
    return table
