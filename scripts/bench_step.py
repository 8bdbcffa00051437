"""Times one GRPO step by phase and compares it with TRL's and with full fine-tuning.

    python scripts/bench_step.py                       # about 15 minutes on two cores
    python scripts/bench_step.py --check               # fails on a loss of over 15 %
    python scripts/bench_step.py --only learners       # adapter and full fine-tuning, no steps
    python scripts/bench_step.py --device cuda         # larger steps, TRL with vLLM on one GPU
    python scripts/bench_step.py --sweep ranks         # learning phase at ranks 1, 8, 64, 256,
                                                       # with fits, in a table and a figure

TRL is a separate extra (`make bench` installs it); without it, its ratios are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.figure import draw, draw_sweep  # noqa: E402
from benchmarks.growth import against_formula, fits, records, sweep_tables  # noqa: E402
from benchmarks.run import PARTS, comparable, compare, has_trl, measure, sweep  # noqa: E402
from benchmarks.workload import SIZES, Size  # noqa: E402

BASELINE = ROOT / "scripts" / "benchmarks" / "baseline.json"
NAMES = {"learner": "learner only", "ours": "in the step", "trl": "TRL"}
SWEEPS = {
    "samples": [Size(num_samples=n) for n in (2, 4, 8)],
    "tokens": [Size(max_tokens=n) for n in (24, 48, 96, 192)],
    "ranks": [Size(rank=n) for n in (1, 8, 64, 256)],
    "layers": [Size(layers=name) for name in ("attention", "mlp", "all")],
}


def read_options() -> tuple[argparse.Namespace, Size, dict[str, Any]]:
    """(options, the workload's size, the baseline); what does not fit together is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="measured steps per arm (default 3)")
    parser.add_argument(
        "--device", choices=SIZES, default="cpu", help="where everything runs (default cpu)"
    )
    parser.add_argument("--prompts", type=int, help="prompts per step (default 16; on a GPU 32)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder of the results"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with scripts/benchmarks/baseline.json"
    )
    parser.add_argument(
        "--save-baseline", action="store_true", help="write scripts/benchmarks/baseline.json"
    )
    parser.add_argument(
        "--only", choices=PARTS, help="measure only this part, and check only its ratios"
    )
    parser.add_argument(
        "--sweep", choices=SWEEPS, help="measure the learning phase at several sizes instead"
    )
    parser.add_argument(
        "--steps", action="store_true", help="with --sweep: also whole steps, by phase"
    )
    options = parser.parse_args()
    size = SIZES[options.device]
    if options.prompts is not None:
        size = replace(size, num_prompts=options.prompts)
    if options.rounds < 1 or size.num_prompts < 1:
        parser.error("--rounds and --prompts are at least 1")
    if reason := missing_device(options.device):
        parser.error(f"--device {options.device}: {reason}")
    baseline = json.loads(BASELINE.read_text("utf-8"))
    if options.check and baseline["size"] != asdict(size):
        parser.error(f"--check compares with a baseline of another size: {baseline['size']}")
    if options.steps and not options.sweep:
        parser.error("--steps needs --sweep")
    if options.only and (options.sweep or options.save_baseline):
        parser.error("--only measures a part, which is neither a sweep nor a whole baseline")
    return options, size, baseline


def main() -> int:
    """Measures, writes JSON and a figure, prints the ratios."""
    options, size, baseline = read_options()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.sweep:
        sizes = [
            replace(s, num_prompts=size.num_prompts, device=size.device)
            for s in SWEEPS[options.sweep]
        ]
        rows = sweep(sizes, options.rounds, options.out, has_steps=options.steps)
        write_sweep(options.sweep, rows, options.out)
        return 0
    if options.only in (None, "steps") and not has_trl():
        print("TRL is not installed (`make bench` installs it): no ratios to it", file=sys.stderr)
    result = measure(size, options.rounds, options.out, options.only)
    result["command"] = "python scripts/bench_step.py " + " ".join(sys.argv[1:])
    (options.out / "bench_step.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    if not options.only:
        draw(result, options.out / "bench_step.png")
    print("\n".join(result_lines(result)))
    if options.save_baseline:
        kept = {key: result[key] for key in ("command", "size", "peak_gflops", "ratios", "spread")}
        BASELINE.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    if options.check:
        expected = comparable(result, baseline)
        for name in sorted(baseline["ratios"].keys() - expected.keys()):
            print(
                f"{name} is not compared: products reach {result['peak_gflops']:g} GFLOP/s here, "
                f"{baseline['peak_gflops']:g} where the baseline is from"
            )
        if options.only:
            expected = {name: was for name, was in expected.items() if name in result["ratios"]}
        lost = compare(result["ratios"], expected)
        print("\n".join(lost) if lost else "no ratio is over 15 % worse than the baseline")
        return 1 if lost else 0
    return 0


def result_lines(result: dict[str, Any]) -> list[str]:
    """Each ratio with its spread; then each arm's learning speed."""
    lines = []
    for name, value in result["ratios"].items():
        low, high = result["spread"][name]
        lines.append(f"{name:24} {value:8.3f}   ({low:g} to {high:g})")
    for name, speed in result["speeds"].items():
        lines.append(
            f"learning, {NAMES[name]:14} {speed['tokens_per_s']:8,} completion tokens/s, "
            f"MFU {speed['mfu']:.1%}, {speed['roofline']:.1%} of the roofline"
        )
    return lines


def missing_device(device: str) -> str:
    """What is missing for the device; empty: nothing."""
    import torch

    if device == "cpu" or torch.cuda.is_available():
        return ""
    return "PyTorch finds no GPU here"


def write_sweep(kind: str, rows: list[dict[str, Any]], out: Path) -> None:
    """Prints the sweep with its fits; both go to sweep_KIND.json and sweep_KIND.png."""
    found = fits(kind, rows)
    result = {
        "command": "python scripts/bench_step.py " + " ".join(sys.argv[1:]),
        "rows": rows,
        "fits": records(found),
        "against_formula": against_formula(found),
    }
    path = out / f"sweep_{kind}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    draw_sweep(kind, rows, found, path.with_suffix(".png"))
    console = Console(width=110)
    for table in sweep_tables(kind, rows):
        console.print(table)
    print(f"{path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    sys.exit(main())
