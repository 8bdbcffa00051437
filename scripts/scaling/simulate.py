"""Simulates a job on 1 to 4,096 GPUs, or compares estimated with measured steps on this CPU.

    python scripts/scaling/simulate.py curve      # minutes; a figure, a table and JSON
    python scripts/scaling/simulate.py failures   # what samplers that fail cost
    python scripts/scaling/simulate.py cpu        # estimated and measured steps of a small model
    python scripts/scaling/simulate.py fleet      # the same of jobs with samplers in Ray actors
    python scripts/scaling/simulate.py lengths runs/mine/transcripts.jsonl   # fits their spread

What `cpu` and `fleet` measure is only as good as the cores are free.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from rl_lora.config.shipped import find_config  # noqa: E402
from rl_lora.planning.cards import find_card  # noqa: E402
from scaling.curve import Point, as_rows, curve, load_scenario, with_failures  # noqa: E402
from scaling.figure import draw  # noqa: E402
from scaling.lengths import MEASURED_SIGMA, fit, recorded  # noqa: E402


def main() -> int:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("curve", "failures"):
        one = commands.add_parser(name)
        one.add_argument("--config", type=Path, default=Path("deepmath_qwen3_8b"))
        one.add_argument("--gpu", default="h100", help="as for rl-lora train --dry-run")
        one.add_argument("--spread", type=float, default=MEASURED_SIGMA, help="sigma of lengths")
        one.add_argument("--out", type=Path, default=Path("runs/scaling"))
    commands.choices["curve"].add_argument("--largest", type=int, default=4096, metavar="GPUS")
    commands.choices["failures"].add_argument("--gpus", type=int, default=64)
    for name in ("cpu", "fleet"):
        commands.add_parser(name).add_argument("--out", type=Path, default=Path("runs/scaling"))
    commands.add_parser("lengths").add_argument("transcripts", type=Path)
    options = parser.parse_args()
    if options.command == "lengths":
        found = fit(*recorded(options.transcripts))
        print(f"mu {found.mu:.3f}, sigma {found.sigma:.3f}, mean {found.mean:.1f} tokens")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.command == "cpu":
        from scaling.cpu_check import check

        return check(options.out)
    if options.command == "fleet":
        from scaling.fleet_check import check as check_fleet

        return check_fleet(options.out)
    scenario = load_scenario(find_config(options.config), find_card(options.gpu), options.spread)
    if options.command == "curve":
        own, grown = curve(scenario, options.largest)
        rows = {"own batch": as_rows(own), "growing batch": as_rows(grown)}
        draw(own, grown, options.out / "scaling.png")
        for title, points in (("Its own batch", own), ("A batch that grows", grown)):
            Console(width=170).print(table(title, points))
    else:
        pairs = with_failures(scenario, options.gpus, every_s=600.0, restart_s=300.0)
        found_points = [one for pair in pairs for one in pair]
        rows = {"undisturbed, with failures": as_rows(found_points)}
        Console(width=170).print(table("Undisturbed; with a failure in 10 minutes", found_points))
    (options.out / f"{options.command}.json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    return 0


def table(title: str, points: list[Point]) -> Table:
    """A row for each simulated design."""
    columns = ("design", "GPUs", "samplers", "completions", "estimated", "simulated", "ratio")
    busy = ("samplers busy", "learners busy", "staleness", "groups again")
    found = Table(*columns, *busy, title=title, title_justify="left")
    for one in points:
        found.add_row(
            one.design,
            f"{one.num_gpus:,}",
            f"{one.num_samplers:,}",
            f"{one.num_completions:,}",
            f"{one.estimated_s:,.1f} s",
            f"{one.step_s:,.1f} s",
            f"{one.estimated_s / one.step_s:.2f}",
            f"{one.sampler_busy:.0%}",
            f"{one.learner_busy:.0%}",
            f"{one.max_staleness}",
            f"{one.num_lost}",
        )
    return found


if __name__ == "__main__":
    sys.exit(main())
