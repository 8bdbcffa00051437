"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

RESUME_HINT = "; run the same command with --resume to continue from the last checkpoint"
RERUN_HINT = "; run the same command again to continue where it stopped"


def add_job_arguments(parser: argparse.ArgumentParser, *, example: str, plan: str) -> None:
    """The arguments of a training job; its help names a config and what --dry-run prints."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help=f"a TOML file, or a shipped config's name, e.g. {example}",
    )
    add_overrides(parser)
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the newest checkpoint; without one, start from the beginning",
    )
    add_changed_data(parser)
    parser.add_argument("--dry-run", action="store_true", help=f"print {plan}, then exit")
    parser.add_argument("--quiet", action="store_true", help="print only warnings and the summary")


def job_options(arguments: argparse.Namespace) -> dict[str, bool]:
    """The options of `train` and `fine_tune`, as typed."""
    return {key: getattr(arguments, key) for key in ("resume", "quiet", "accept_changed_data")}


def add_overrides(
    parser: argparse.ArgumentParser, example: str = "lora.rank=8 data=my.jsonl"
) -> None:
    """`section.key=value ...`, which take precedence over the config file."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help=f"settings that take precedence over the file's, e.g. {example}",
    )


def add_evaluated(parser: argparse.ArgumentParser) -> None:
    """What is evaluated: a run or a config, its overrides, and `--adapter`."""
    parser.add_argument(
        "target",
        type=Path,
        metavar="RUN_OR_CONFIG",
        help="a run folder, a TOML file, or a shipped config's name",
    )
    add_overrides(parser)
    parser.add_argument(
        "--adapter",
        metavar="ADAPTER",
        help="adapter directory or hub id, 'best' or 'last' of the run, or 'base' for the base "
        "model (default: the run's last adapter; the base model for a config)",
    )


def add_changed_data(parser: argparse.ArgumentParser) -> None:
    """`--accept-changed-data`."""
    parser.add_argument(
        "--accept-changed-data",
        action="store_true",
        help="continue even though the base model or the data changed since the run began",
    )


def add_source(parser: argparse.ArgumentParser) -> None:
    """An adapter, and `--base`."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_ADAPTER",
        help="a run folder, an adapter directory or a hub id",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model: a directory or hub id (default: the one that the adapter names)",
    )
