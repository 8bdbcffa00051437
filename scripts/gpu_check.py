"""Checks and measurements for a GPU, in stages.

    python scripts/gpu_check.py STAGE… --device cuda --out FOLDER

STAGE is a name of the table, call1 to call4, or all; docs/gpu-check.md says which on the day.
With --device cpu the same stages run at tiny sizes. Exits with 0 if every requested stage passed.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu_stages.run import run_stages, run_together, table  # noqa: E402
from gpu_stages.stages import CPU_LIMIT_S, STAGES, Context, chosen  # noqa: E402


def main() -> int:
    """Runs the stages and prints their table."""
    listed = "\n".join(f"  call{s.call}  {s.name:20} {s.limit_s:3g} s" for s in STAGES)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"stages, with their limits on a GPU:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="+", metavar="STAGE")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="results.jsonl and the logs")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "gpu-check",
        help="models, runs and compile caches (default: %(default)s)",
    )
    parser.add_argument(
        "--gguf", type=Path, nargs="+", default=[], help="the embedded model's file, or its parts"
    )
    parser.add_argument(
        "--total", type=float, default=math.inf, help="seconds for all stages together"
    )
    parser.add_argument("--limit", type=float, help="seconds per stage, instead of its default")
    parser.add_argument(
        "--together",
        type=float,
        metavar="S",
        help="start all stages at once; after S seconds at most, what is timed runs by itself",
    )
    options = parser.parse_args()
    try:
        stages = chosen(options.stages)
    except ValueError as error:
        parser.error(str(error))
    if missing := [path for path in options.gguf if not path.is_file()]:
        parser.error(f"--gguf: no file {missing[0]}")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here")
    context = Context(torch.device(options.device), options.out, options.work, tuple(options.gguf))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage ends as well
    if options.together is not None:
        rows = run_together(stages, context, options.together, options.total)
    else:
        rows = run_stages(
            stages,
            context,
            lambda stage: options.limit or (stage.limit_s if context.is_gpu else CPU_LIMIT_S),
            total_s=options.total,
        )
    print("\n" + table(rows))
    return 0 if all(row["status"] == "passed" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
