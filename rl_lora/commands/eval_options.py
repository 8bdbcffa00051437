"""The arguments of `rl-lora eval`; `commands.eval`, which loads torch, does the work."""

from __future__ import annotations

import argparse

from rl_lora.commands.job_arguments import RERUN_HINT, add_changed_data, add_evaluated

EXAMPLES = (
    "rl-lora eval runs/smoke",
    "rl-lora eval runs/smoke --adapter best --name best",
    "rl-lora eval runs/smoke --against base --name vs-base",
    "rl-lora eval runs/smoke data.eval=my_test.jsonl --name my-test",
    "rl-lora eval smoke --name base --overwrite",
)
AFTER_INTERRUPT = RERUN_HINT
IS_DIVIDED = True  # among a job's processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_evaluated(parser)
    parser.add_argument(
        "--against",
        metavar="ADAPTER",
        help="a second adapter to compare with, on the same problems with the same seeds",
    )
    parser.add_argument(
        "--name",
        default="evaluation",
        metavar="NAME",
        help="name of the result files, RUN/eval/NAME.json and .jsonl.gz (default: evaluation)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="discard an existing evaluation of that name instead of continuing it",
    )
    add_changed_data(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluates. Raises UserError as `commands.eval.evaluation` does."""
    from rl_lora.commands.eval import evaluation

    evaluation(arguments)
    return 0
