"""Merges an adapter or pushes it: `python scripts/export.py runs/quickstart --merged my-model`."""

import sys

from rl_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
