"""`rl-lora train`: reinforcement learning of an adapter, or the plan for it."""

from __future__ import annotations

import argparse
import math

from rl_lora.commands.job_arguments import RESUME_HINT, add_job_arguments, job_options
from rl_lora.errors import UserError

EXAMPLES = (
    "rl-lora train smoke",
    "rl-lora train quickstart --dry-run",
    "rl-lora train quickstart lora.rank=8 run.name=rank8",
    "rl-lora train quickstart lora.rank=8 run.name=rank8 --resume",
    "rl-lora train smoke data=my.jsonl run.name=mine reward.name=my_reward:score",
    "rl-lora train math_llama31_8b --dry-run --gpu h100",
    "rl-lora train deepmath_qwen3_8b --dry-run --gpus 64 --gpu h100 --gpu-price 2.5",
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
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="plan for this many GPUs, one process each (with --dry-run)",
    )
    parser.add_argument(
        "--gpu-price",
        type=float,
        metavar="PRICE",
        help="what a GPU costs for an hour, for the cost of a run (with --dry-run)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Trains, or prints the plan. Raises UserError for bad settings, data or models."""
    from rl_lora.config import load_config

    _check_gpus(arguments)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from rl_lora.commands.plan import print_plan
        from rl_lora.planning.cards import find_card

        gpu_gib = arguments.gpu_memory
        print_plan(
            config,
            gpu_bytes=None if gpu_gib is None else int(gpu_gib * 2**30),
            card=None if arguments.gpu is None else find_card(arguments.gpu),
            num_gpus=arguments.gpus,
            gpu_price=arguments.gpu_price,
        )
        return 0
    from rl_lora.train import train

    train(config, **job_options(arguments))
    return 0


def _check_gpus(arguments: argparse.Namespace) -> None:
    """Raises UserError where an option of GPUs would be ignored, or makes no sense."""
    gib, price = arguments.gpu_memory, arguments.gpu_price
    if gib is not None and not 0 < gib < math.inf:
        raise UserError(f"--gpu-memory {gib:g}: give a GPU's memory in GiB, e.g. 80")
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--gpu-price {price:g}: give what a GPU costs for an hour, e.g. 2.5")
    if arguments.dry_run:
        return
    if arguments.gpus is not None:
        raise UserError(
            f"--gpus {arguments.gpus} is for plans: add --dry-run; to train on {arguments.gpus} "
            f"GPUs: accelerate launch --num_processes {arguments.gpus} -m rl_lora train "
            f"{arguments.config}"
        )
    for name, value in (
        ("--gpu", arguments.gpu),
        ("--gpu-memory", gib),
        ("--gpu-price", price),
    ):
        if value is not None:
            raise UserError(f"{name} {value} is for plans: add --dry-run")
