"""`rl-lora grade`: grades completions and compares the verdicts with labels or Math-Verify.

Each line of the JSONL file is one completion with its reference::

    {"completion": "so \\\\boxed{42}", "reference": "42", "label": true}

`label` is optional. Other common names of the three fields are accepted, see the tuples below.
An evaluation's file (RUN/eval/NAME.jsonl.gz) is graded again; its labels are the verdicts in it.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewards import RULES, Score, load_reward
from rl_lora.data.row_formats import gold_text
from rl_lora.errors import UserError
from rl_lora.evaluation.files import find_evaluation, is_evaluation, read_evaluation
from rl_lora.evaluation.intervals import CONFIDENCE
from rl_lora.evaluation.scores import EvaluationScores, ProblemRecord, evaluation_scores
from rl_lora.report.tables import accuracy_name, accuracy_text, printable
from rl_lora.scoring import score_best
from rl_lora.storage.jsonl import read_values, write_json

COMPLETION_KEYS = ("completion", "response", "output", "prediction", "answer")
REFERENCE_KEYS = ("reference", "gold", "ground_truth", "target", "solution")
LABEL_KEYS = ("label", "expected", "is_correct", "correct")
MAX_SHOWN_CHARS = 70


@dataclass(frozen=True, slots=True)
class GradeRow:
    """One completion; `label` is None if the file has none."""

    where: str  # the line, or problem and sample of an evaluation
    completion: str
    reference: str
    label: bool | None


@dataclass(frozen=True, slots=True)
class Disagreement:
    """A completion whose verdict differs from its label, or from the other judge's."""

    where: str
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
    judge: str | None
    num_compared: int
    accuracy: float | None
    precision: float | None
    recall: float | None
    disagreements: tuple[Disagreement, ...]
    reward: str = "math"
    policy: str = "default"
    seconds: float = 0.0
    # Of an evaluation: its scores by the verdicts in the file, and by the new ones.
    old: EvaluationScores | None = None
    new: EvaluationScores | None = None


def read_rows(path: Path) -> list[GradeRow]:
    """The completions of a file. Raises UserError naming the line and what it lacks."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a JSONL file of completions")
    rows = [_row(fields, path, number) for number, fields in read_values(path)]
    if not rows:
        raise UserError(f"{path}: the file has no completions")
    return rows


def _row(fields: Any, path: Path, number: int) -> GradeRow:
    where = f"{path}, line {number}"
    if not isinstance(fields, dict):
        raise UserError(f"{where}: not a JSON object")
    completion = _field(fields, COMPLETION_KEYS, "completion", where)
    reference = gold_text(_field(fields, REFERENCE_KEYS, "reference", where))
    label = next((fields[key] for key in LABEL_KEYS if key in fields), None)
    if label is not None and not isinstance(label, bool):
        raise UserError(f"{where}: the label is {label!r}; it must be true or false")
    if reference is None:
        raise UserError(f"{where}: the reference is empty")
    return GradeRow(f"line {number}", str(completion), reference, label)


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
    reward: str | None = None,
    policy: str | None = None,
    against: str | None = None,
    num_workers: int = 1,
    timeout_s: float = 5.0,
) -> GradeReport:
    """Grades every completion of a file, and compares the verdicts with its labels.

    Args:
        path: a JSONL file, or an evaluation's file, whose labels are the verdicts in it.
        reward: a name or "module:function"; None: the evaluation's, or "math".
        policy: grading rules; None: the evaluation's, or "default".
        against: another reward to compare with, e.g. "math_verify"; None: the labels.
        num_workers: verifier processes.
        timeout_s: seconds for a hard answer.

    Raises:
        UserError: the file cannot be used, or names a module as its reward.
        ValueError: unknown reward or policy.
    """
    settings: dict[str, Any] = {}
    problems_N: list[ProblemRecord] = []
    if is_evaluation(path):
        settings, problems_N = read_evaluation(find_evaluation(path))
        if not problems_N:
            raise UserError(f"{path} has no problems yet; wait for rl-lora eval to finish")
    rows = _evaluation_rows(problems_N) or read_rows(path)
    name = reward or str(settings.get("reward", "math"))
    if reward is None and ":" in name:  # a file must not decide which code is imported
        raise UserError(
            f"{path} was graded by {name[:80]!r}; to import that code, pass it as --reward"
        )
    options: dict[str, Any] = {
        "rules": policy or str(settings.get("reward_policy", "default")),
        "format_weight": float(settings.get("format_weight", 0.0)),
        "num_workers": num_workers,
        "timeout_s": timeout_s,
        "thinking_tags": tuple((one, two) for one, two in settings.get("thinking_tags", ())),
    }
    start = time.perf_counter()
    scores = _score(rows, name, options)
    seconds = time.perf_counter() - start
    expected: list[bool | None] = [row.label for row in rows]
    if against is not None:
        expected = [other.correct for other in _score(rows, against, options)]
    report = _report(rows, scores, expected, against or "labels")
    report = replace(report, reward=name, policy=options["rules"], seconds=seconds)
    if not problems_N or against is not None:
        return report
    left = iter(scores)
    graded_N = [
        replace(one, samples_G=tuple(replace(s, **asdict(next(left))) for s in one.samples_G))
        for one in problems_N
    ]
    return replace(report, old=evaluation_scores(problems_N), new=evaluation_scores(graded_N))


def _evaluation_rows(problems_N: Sequence[ProblemRecord]) -> list[GradeRow]:
    return [
        GradeRow(f"{problem.prompt_id}, sample {n}", one.completion, problem.reference, one.correct)
        for problem in problems_N
        for n, one in enumerate(problem.samples_G, start=1)
    ]


def _score(rows: Sequence[GradeRow], reward: str, options: dict[str, Any]) -> list[Score]:
    with load_reward(reward, **options) as scorer:
        return score_best(scorer, [row.completion for row in rows], [row.reference for row in rows])


def _report(
    rows: Sequence[GradeRow], scores: Sequence[Score], expected: Sequence[bool | None], judge: str
) -> GradeReport:
    compared = [one for one in zip(rows, scores, expected, strict=True) if one[2] is not None]
    counts = Counter((score.correct, truth) for _, score, truth in compared)
    hits = counts[True, True]

    def ratio(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    return GradeReport(
        num=len(rows),
        num_correct=sum(score.correct for score in scores),
        statuses=dict(Counter(score.status for score in scores)),
        judge=judge if compared else None,
        num_compared=len(compared),
        accuracy=ratio(hits + counts[False, False], len(compared)),
        precision=ratio(hits, hits + counts[True, False]),
        recall=ratio(hits, hits + counts[False, True]),
        disagreements=tuple(
            Disagreement(row.where, row.reference, score.answer, score.correct, truth, score.status)
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
    try:
        report = grade_file(
            args.file,
            reward=args.reward,
            policy=args.policy,
            against=args.against,
            num_workers=args.num_workers,
            timeout_s=args.timeout,
        )
    except ValueError as error:  # an unknown reward or policy: the message names the nearest
        raise UserError(str(error)) from None
    print_report(report, args.show)
    if args.json is not None:
        write_json(args.json, asdict(report))
    return 0


def print_report(report: GradeReport, num_shown: int) -> None:
    """The scores, then the first disagreements."""
    console = Console(highlight=False)
    num, old, new = len(report.disagreements), report.old, report.new
    statuses = ", ".join(f"{status} {count}" for status, count in sorted(report.statuses.items()))
    rate = report.num / max(report.seconds, 1e-9)
    lines = [
        f"{report.num_correct} of {report.num} correct ({report.num_correct / report.num:.1%}) by "
        f"{report.reward} (policy {report.policy}); {statuses}; {rate:,.0f} per second"
    ]
    if old is not None and new is not None:
        lines.append(
            f"{accuracy_name(new.num_samples)} {accuracy_text(old)} -> {accuracy_text(new)} "
            f"({CONFIDENCE:.0%} intervals)"
        )
        lines.append(f"{num} of {report.num} verdicts changed")
    elif report.judge is None:
        lines.append("Nothing to compare with: the file has no labels, and --against is not given.")
    else:
        figures = [(name, getattr(report, name)) for name in ("accuracy", "precision", "recall")]
        shown = ", ".join(f"{name} {'-' if v is None else f'{v:.4f}'}" for name, v in figures)
        lines.append(f"Compared with {report.judge} ({report.num_compared} completions): {shown}")
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)
    if not num:
        return
    judge = "before" if new is not None else str(report.judge)
    title = f"{num} disagreement{'' if num == 1 else 's'}" if new is None else None
    table = Table("where", "reference", "answer", "ours", judge, "status", title=title)
    for item in report.disagreements[:num_shown]:
        # Text, since rich would interpret square brackets as markup.
        where, reference, answer = (
            Text(printable(text, MAX_SHOWN_CHARS))
            for text in (item.where, item.reference, item.answer or "-")
        )
        verdicts = ["right" if value else "wrong" for value in (item.verdict, item.expected)]
        table.add_row(where, reference, answer, *verdicts, item.status)
    console.print(table)
    if num > num_shown:
        console.print(
            f"and {num - num_shown} more; print all with --show {num}, or write them with --json"
        )
