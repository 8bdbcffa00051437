"""`rl-lora compare`: two evaluations on disk, paired by problem."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = (
    "rl-lora compare runs/a/eval/evaluation.jsonl.gz runs/b/eval/evaluation.jsonl.gz",
    "rl-lora compare runs/a/eval/step_000000.json runs/a/eval/step_000100.json --json change.json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "first", type=Path, metavar="FIRST", help="an evaluation, RUN/eval/NAME.jsonl.gz or .json"
    )
    parser.add_argument(
        "second", type=Path, metavar="SECOND", help="the evaluation to compare it with"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison here")


def run(arguments: argparse.Namespace) -> int:
    """Prints the comparison.

    Raises:
        UserError: no such evaluations, or evaluations of different problems.
    """
    from rl_lora.evaluation.paired import compare_evaluations
    from rl_lora.report.terminal import Display

    result = compare_evaluations(arguments.first, arguments.second)
    with Display() as display:
        display.comparison(result)
    if arguments.json is not None:
        result.save(arguments.json)
    return 0
