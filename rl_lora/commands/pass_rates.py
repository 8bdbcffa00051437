"""`rl-lora pass-rates`: how often each training problem is solved, for `data.pass_rates`.

The training problems are sampled and graded like an evaluation, so a run that was killed resumes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rl_lora.commands.job_arguments import RERUN_HINT, add_changed_data, add_evaluated

EXAMPLES = (
    "rl-lora pass-rates smoke --samples 8 --out rates.jsonl",
    "rl-lora pass-rates runs/smoke --adapter best --samples 8 --out rates.jsonl",
)
AFTER_INTERRUPT = RERUN_HINT
IS_DIVIDED = True  # among a job's processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_evaluated(parser)
    parser.add_argument(
        "--samples", type=int, default=8, metavar="K", help="completions per problem (default: 8)"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the JSONL file to write"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="discard completions of other settings instead of refusing them",
    )
    add_changed_data(parser)


def run(arguments: argparse.Namespace) -> int:
    """Writes the file. Raises UserError as `commands.eval.evaluation` does."""
    from rl_lora import distributed
    from rl_lora.commands.eval import evaluation, settings_of
    from rl_lora.data.pass_rates import PassRate, write_pass_rates
    from rl_lora.evaluation.files import read_evaluation

    sampling = settings_of(arguments.target, arguments.overrides).sampling
    arguments.overrides += [
        f"eval.num_samples={arguments.samples}",
        f"eval.temperature={sampling.temperature}",  # as training samples
        "eval.max_tokens=none",
        "eval.top_p=1",
        *(
            f"data.{key}=none"
            for key in "pass_rates min_pass_rate max_pass_rate curriculum".split()
        ),
    ]
    arguments.name, arguments.against = "pass_rates", None
    path = evaluation(arguments, on_training=True)
    if distributed.is_main():
        _, problems_N = read_evaluation(path)
        rates = [
            PassRate(one.prompt_id, one.question, one.num_correct, len(one.samples_G))
            for one in problems_N
        ]
        write_pass_rates(arguments.out, rates)
        num_open = sum(0 < one.num_correct < one.num_samples for one in rates)
        print(
            f"{arguments.out}: {len(rates)} problems, {num_open} of them solved sometimes; set "
            f"data.pass_rates={arguments.out}"
        )
    return 0
