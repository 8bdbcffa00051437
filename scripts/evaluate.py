"""Evaluates a run's adapter or a base: `python scripts/evaluate.py runs/quickstart`."""

import sys

from rl_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
