"""`rl-lora train`: reinforcement learning of an adapter, or the plan for it."""

from __future__ import annotations

import argparse

from rl_lora.commands.job_arguments import RESUME_HINT, add_job_arguments

EXAMPLES = (
    "rl-lora train smoke",
    "rl-lora train quickstart --dry-run",
    "rl-lora train quickstart lora.rank=8 run.name=rank8",
    "rl-lora train quickstart lora.rank=8 run.name=rank8 --resume",
    "rl-lora train smoke data=my.jsonl run.name=mine reward.name=my_reward:score",
    "rl-lora train math_llama31_8b --dry-run --gpu-memory 80",
)
AFTER_INTERRUPT = RESUME_HINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_job_arguments(
        parser,
        example="quickstart",
        plan="settings, parameter counts and the memory plan",
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

        gpu_gib = arguments.gpu_memory
        print_plan(config, gpu_bytes=None if gpu_gib is None else int(gpu_gib * 2**30))
        return 0
    from rl_lora.train import train

    train(
        config,
        resume=arguments.resume,
        quiet=arguments.quiet,
        accept_changed_data=arguments.accept_changed_data,
    )
    return 0
