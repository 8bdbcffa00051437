"""Trains a tiny arithmetic model: `make_tiny_model.py DIRECTORY [--recipe tiny]`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from rl_lora.errors import UserError
from rl_lora.models.tiny import RECIPES, make_tiny_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="new or empty directory for the model")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="tiny")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights and the order of the problems"
    )
    arguments = parser.parse_args()
    started = time.monotonic()
    recipe = dataclasses.replace(RECIPES[arguments.recipe], seed=arguments.seed)
    try:
        accuracy = make_tiny_model(arguments.directory, recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{arguments.directory}: accuracy {accuracy:.1%} on {recipe.num_eval} held-out problems, "
        f"one sample each at temperature 1; {time.monotonic() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
