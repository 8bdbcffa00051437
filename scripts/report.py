"""One HTML file of a run: `python scripts/report.py runs/quickstart`."""

import sys

from rl_lora.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
