"""Runs a study: `python scripts/study.py configs/study_sft_rank.toml --dry-run`."""

import sys

from rl_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["study", *sys.argv[1:]]))
