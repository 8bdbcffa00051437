"""`rl-lora sft`: supervised fine-tuning of an adapter, or the plan for it."""

from __future__ import annotations

import argparse

from rl_lora.commands.job_arguments import RESUME_HINT, add_job_arguments, job_options

EXAMPLES = (
    "rl-lora sft sft_tiny",
    "rl-lora sft sft_tiny --dry-run",
    "rl-lora sft sft_tiny lora.rank=8 run.name=sft-rank8",
    "rl-lora sft sft_tiny data=chats.jsonl run.name=sft-mine",
)
AFTER_INTERRUPT = RESUME_HINT
IS_DIVIDED = True  # among a job's processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_job_arguments(
        parser,
        example="sft_tiny",
        plan="settings, adapter capacity and the memory plan",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fine-tunes, or prints the plan. Raises UserError for bad settings, data or models."""
    from rl_lora.config.sft import load_sft_config

    config = load_sft_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from rl_lora.commands.plan import print_sft_plan

        print_sft_plan(config)
        return 0
    from rl_lora.sft.train import fine_tune

    fine_tune(config, **job_options(arguments))
    return 0
