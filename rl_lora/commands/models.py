"""`rl-lora models`: the built-in base models, listed or fetched."""

from __future__ import annotations

import argparse

EXAMPLES = (
    "rl-lora models",
    "rl-lora models tiny-fast",
    "rl-lora models smollm2-135m-instruct",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="print this model's directory, after downloading or training it if need be",
    )


def run(arguments: argparse.Namespace) -> int:
    """Lists the models, or prints the directory of one. Raises UserError for an unknown model."""
    from rl_lora.config import ModelSection
    from rl_lora.models.resolve import list_models, resolve_model

    if arguments.name:
        print(resolve_model(ModelSection(name=arguments.name)))
        return 0
    for entry in list_models():
        print(f"{entry.name:26s} {entry.path or '-'}  {entry.description}")
    return 0
