"""`rl-lora grade`: grades completions and compares the verdicts with labels or Math-Verify.

Each line of the JSONL file is one completion with its reference::

    {"completion": "so \\\\boxed{42}", "reference": "42", "label": true}

`label` is optional. Other common names of the three fields are accepted, see the tuples below.
An evaluation's file (RUN/eval/NAME.jsonl.gz) is graded again by `regrade`, unless it is compared
with another judge.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewards import RULES, Score, load_reward
from rl_lora.data.row_formats import gold_text
from rl_lora.errors import UserError
from rl_lora.evaluation.files import find_evaluation, is_evaluation, read_evaluation
from rl_lora.evaluation.regrade import Regrade, regrade, reward_and_rules
from rl_lora.report.tables import print_regrade, printable
from rl_lora.scoring import score_best
from rl_lora.storage.jsonl import read_values, write_json

COMPLETION_KEYS = ("completion", "response", "output", "prediction", "answer")
REFERENCE_KEYS = ("reference", "gold", "ground_truth", "target", "solution")
LABEL_KEYS = ("label", "expected", "is_correct", "correct")
MAX_SHOWN_CHARS = 70


@dataclass(frozen=True, slots=True)
class GradeRow:
    """One completion. `line` counts from 1; `label` is None if the file has none."""

    line: int
    completion: str
    reference: str
    label: bool | None


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A completion whose verdict differs from its label, or from the other judge's."""

    line: int
    reference: str
    answer: str | None
    verdict: bool
    expected: bool
    status: str


@dataclass(frozen=True, slots=True)
class GradeReport:
    """Outcome of grading a file.

    Accuracy, precision and recall are in 0..1, and None if there is nothing to compare with or
    nothing to divide by.
    """

    num: int
    num_correct: int
    statuses: dict[str, int]
    seconds: float
    judge: str | None
    num_compared: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    disagreements: tuple[Disagreement, ...]


def read_rows(path: Path) -> list[GradeRow]:
    """The completions of a file. Raises UserError naming the line and what it lacks."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a JSONL file of completions")
    if is_evaluation(path):  # one row per completion; `line` counts problems
        return [
            GradeRow(number, sample.completion, problem.reference, sample.correct)
            for number, problem in enumerate(read_evaluation(find_evaluation(path))[1], start=1)
            for sample in problem.samples_G
        ]
    rows = [_row(fields, f"{path}, line {number}", number) for number, fields in read_values(path)]
    if not rows:
        raise UserError(f"{path}: the file has no completions")
    return rows


def _row(fields: Any, where: str, number: int) -> GradeRow:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object")
    completion = _field(fields, COMPLETION_KEYS, "completion", where)
    reference = gold_text(_field(fields, REFERENCE_KEYS, "reference", where))
    label = next((fields[key] for key in LABEL_KEYS if key in fields), None)
    if label is not None and not isinstance(label, bool):
        raise UserError(f"{where}: the label is {label!r}; it must be true or false")
    if reference is None:
        raise UserError(f"{where}: the reference is empty")
    return GradeRow(number, str(completion), reference, label)


def _field(fields: dict[str, Any], keys: Sequence[str], name: str, where: str) -> Any:
    """The first of the keys with text or a number; a reference may also be a list of these."""
    for key in keys:
        value = fields.get(key)
        items = value if isinstance(value, list) and name == "reference" else [value]
        if all(isinstance(item, str | int | float) for item in items):
            return value
    found = next((key for key in keys if key in fields), None)
    if found is not None:
        kind = {type(None): "null", dict: "an object", list: "a list"}[type(fields[found])]
        raise UserError(f"{where}: {found!r}, the {name}, is {kind}; it must be text or a number")
    raise UserError(
        f"{where}: no {name}; expected a string under one of {', '.join(keys)}, "
        f"found the fields {', '.join(fields) or 'none'}"
    )


def grade_file(
    path: Path,
    *,
    reward: str = "math",
    policy: str = "default",
    against: str | None = None,
    num_workers: int = 1,
    timeout_s: float = 5.0,
) -> GradeReport:
    """Grades every completion of a file.

    Args:
        path: the JSONL file.
        reward: a name or "module:function".
        policy: grading rules.
        against: another reward to compare with, e.g. "math_verify"; None: the file's labels.
        num_workers: verifier processes.
        timeout_s: seconds for a hard answer.

    Raises:
        UserError: the file cannot be used. ValueError: unknown reward or policy.
    """
    rows = read_rows(path)

    def scores_by(name: str) -> list[Score]:
        with load_reward(
            name, rules=policy, num_workers=num_workers, timeout_s=timeout_s
        ) as scorer:
            return score_best(scorer, [r.completion for r in rows], [r.reference for r in rows])

    start = time.perf_counter()
    scores = scores_by(reward)
    seconds = time.perf_counter() - start
    expected: list[bool | None] = [row.label for row in rows]
    if against is not None:
        expected = [other.correct for other in scores_by(against)]
    compared = [one for one in zip(rows, scores, expected, strict=True) if one[2] is not None]
    counts = Counter((score.correct, truth) for _, score, truth in compared)
    hits = counts[True, True]

    def ratio(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return GradeReport(
        num=len(rows),
        num_correct=sum(score.correct for score in scores),
        statuses=dict(Counter(score.status for score in scores)),
        seconds=seconds,
        judge=(against or "labels") if compared else None,
        num_compared=len(compared),
        accuracy=ratio(hits + counts[False, False], len(compared)),
        precision=ratio(hits, hits + counts[True, False]),
        recall=ratio(hits, hits + counts[False, True]),
        disagreements=tuple(
            Disagreement(row.line, row.reference, score.answer, score.correct, truth, score.status)
            for row, score, truth in compared
            if truth is not None and score.correct != truth
        ),
    )


EXAMPLES = (
    "rl-lora grade completions.jsonl",
    "rl-lora grade completions.jsonl --against math_verify --show 50",
    "rl-lora grade completions.jsonl --reward my_reward:score --json verdicts.json",
    "rl-lora grade runs/smoke/eval/evaluation.jsonl.gz --policy gsm8k",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help="JSONL file of completions and references, or an evaluation's file",
    )
    parser.add_argument(
        "--reward",
        metavar="NAME",
        help="a reward's name, or 'module:function' (default: the evaluation's, or math)",
    )
    parser.add_argument(
        "--policy",
        metavar="NAME",
        help=f"grading rules: {', '.join(RULES)} (default: the evaluation's, or default)",
    )
    parser.add_argument(
        "--against",
        metavar="NAME",
        help="compare with this reward, e.g. math_verify, instead of with the file's labels",
    )
    parser.add_argument(
        "--num-workers", type=int, default=1, metavar="N", help="worker processes (default: 1)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=5.0,
        metavar="SECONDS",
        help="limit for one symbolic comparison (default: 5)",
    )
    parser.add_argument(
        "--show", type=int, default=20, metavar="N", help="disagreements to print (default: 20)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the whole report here"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report and returns the exit code. Raises UserError as `grade_file`."""
    report: Regrade | GradeReport
    bounds = {"num_workers": args.num_workers, "timeout_s": args.timeout}
    try:
        if args.against is None and is_evaluation(args.file):
            report = regrade(args.file, reward=args.reward, policy=args.policy, **bounds)
            print_regrade(report, args.show)
        else:
            file = args.file
            settings = read_evaluation(find_evaluation(file))[0] if is_evaluation(file) else {}
            reward, policy = reward_and_rules(file, settings, args.reward, args.policy)
            report = grade_file(file, reward=reward, policy=policy, against=args.against, **bounds)
            print_report(report, args.show)
    except ValueError as error:  # an unknown reward or policy: the message names the nearest
        raise UserError(str(error)) from None
    if args.json is not None:
        write_json(args.json, asdict(report))
    return 0


def print_report(report: GradeReport, num_shown: int) -> None:
    """The scores, then the first disagreements."""
    console = Console()
    statuses = ", ".join(f"{status} {count}" for status, count in sorted(report.statuses.items()))
    rate = report.num / max(report.seconds, 1e-9)
    console.print(
        f"{report.num_correct} of {report.num} correct ({report.num_correct / report.num:.1%}); "
        f"{statuses}; {rate:,.0f} per second"
    )
    if report.judge is None:
        console.print(
            "Nothing to compare with: the file has no labels, and --against is not given."
        )
        return
    figures = [(name, getattr(report, name)) for name in ("accuracy", "precision", "recall")]
    shown = ", ".join(f"{name} {'-' if v is None else f'{v:.4f}'}" for name, v in figures)
    console.print(f"Compared with {report.judge} ({report.num_compared} completions): {shown}")
    if not report.disagreements:
        return
    num = len(report.disagreements)
    table = Table(title=f"{num} disagreement{'' if num == 1 else 's'}")
    for heading in ("line", "reference", "answer", "ours", report.judge, "status"):
        table.add_column(heading)
    for item in report.disagreements[:num_shown]:
        # Text, since rich would interpret square brackets as markup.
        cells = [Text(printable(t, MAX_SHOWN_CHARS)) for t in (item.reference, item.answer or "-")]
        verdicts = ["right" if value else "wrong" for value in (item.verdict, item.expected)]
        table.add_row(str(item.line), *cells, *verdicts, item.status)
    console.print(table)
