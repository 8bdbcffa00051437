"""`rl-lora train`: reinforcement learning of an adapter, or the plan for it."""

from __future__ import annotations

import argparse

from rl_lora.commands.job_arguments import RESUME_HINT, add_job_arguments, job_options

EXAMPLES = (
    "rl-lora train smoke",
    "rl-lora train quickstart --dry-run",
    "rl-lora train quickstart lora.rank=8 run.name=rank8",
    "rl-lora train quickstart lora.rank=8 run.name=rank8 --resume",
    "rl-lora train smoke data=my.jsonl run.name=mine reward.name=my_reward:score",
    "rl-lora train math_llama31_8b --dry-run --gpu h100",
)
AFTER_INTERRUPT = RESUME_HINT
IS_DIVIDED = True  # among a job's processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_job_arguments(
        parser,
        example="quickstart",
        plan="settings, parameter counts, the memory plan and a GPU's estimated time",
    )
    parser.add_argument(
        "--gpu",
        metavar="CARD",
        help="plan for this card: h100, h200, a100, l40s or 4090 (with --dry-run)",
    )
    parser.add_argument(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="plan for a GPU with this much memory (with --dry-run)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains, or prints the plan. Raises UserError for bad settings, data or models."""
    from rl_lora.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from rl_lora.commands.plan import print_plan
        from rl_lora.planning.cards import find_card

        gpu_gib = arguments.gpu_memory
        print_plan(
            config,
            gpu_bytes=None if gpu_gib is None else int(gpu_gib * 2**30),
            card=None if arguments.gpu is None else find_card(arguments.gpu),
        )
        return 0
    from rl_lora.train import train

    train(config, **job_options(arguments))
    return 0
