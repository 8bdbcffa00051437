"""Trains a policy: `python scripts/train.py configs/quickstart.toml lora.rank=8`."""

import sys

from rl_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
