"""Repeats a short job and compares everything that its seed determines.

    python scripts/repeat_check.py                        # 200 runs, half next to busy processes
    python scripts/repeat_check.py --times 20 --job sft
    python scripts/repeat_check.py optim.microbatch_tokens=100000   # further settings of the job

Compared are the adapter, the metrics but for the machine's, transcripts and evaluations. Each run
is a process; twenty are forked from one that has loaded the libraries and computed nothing, and the
next twenty, with other addresses and string hashes, from another one. Exits with 1 if two runs
differ; of each different result one run is kept in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.helpers.run_files import steady

JOBS = {
    "rl": ["train", "smoke", "run.num_steps=6", "data.held_out=16"],
    "sft": ["sft", "sft_tiny", "run.num_steps=30", "data.held_out=16"],
}
AT_ONCE = 20  # runs of one interpreter
PROGRAM = """
import os, sys
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import reasoning_gym, rl_lora.sft.train, rl_lora.train, scipy.stats
from rewards.workers.pool import WorkerPool
from rl_lora.cli import main

# Half of so short a run: figures, which are not compared, and processes that are rarely needed here
# and start when they are.
rl_lora.train.draw_figures = lambda folder: None
WorkerPool.start = lambda pool: None
folder, count, *arguments = sys.argv[1:]
for number in range(int(count)):
    child = os.fork()
    if not child:
        os._exit(main([*arguments, f"run.output_dir={folder}", f"run.name={number}", "--quiet"]))
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(1)
"""


def results(folder: Path) -> dict[str, str]:
    """Hashes of what a run has written and its seed determines, by name; the metrics of each step
    by themselves."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name == "metrics.jsonl":
            for line in path.read_text().splitlines():
                row = json.loads(line)
                found[f"metrics of step {row['step']:3d}"] = _hash(steady(row))
        elif name.startswith("eval/") and path.suffix == ".json":
            found[name] = _hash(steady(json.loads(path.read_text())))
        elif name == "transcripts.jsonl" or name.startswith("adapter/adapter_"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _hash(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute without end."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(arguments: list[str], folder: Path, count: int) -> None:
    """Runs the job `count` times, in folder/0, folder/1, ..."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-c", PROGRAM, str(folder), str(count), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    """Runs all, and prints a line for each run and each different result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", help="of the job, as KEY=VALUE")
    parser.add_argument("--times", type=int, default=200, help="runs in all (default 200)")
    parser.add_argument("--job", choices=JOBS, default="rl")
    parser.add_argument("--busy", type=int, default=2, help="processes next to half of the runs")
    parser.add_argument("--out", type=Path, default=Path("runs/repeat"), help="the runs' folder")
    options = parser.parse_args()
    kept: dict[str, dict[str, str]] = {}  # what each different result consists of, by its hash
    counts: Counter[str] = Counter()
    for first in range(0, options.times, AT_ONCE):
        num_busy = options.busy * (first // AT_ONCE % 2)
        count = min(AT_ONCE, options.times - first)
        with busy(num_busy):
            run([*JOBS[options.job], *options.settings], options.out / "last", count)
        for number in range(count):
            found = results(options.out / "last" / str(number))
            key = _hash(found)[:12]
            counts[key] += 1
            load = f"{num_busy} busy processes, load {os.getloadavg()[1]:.1f}"
            print(f"{first + number + 1:4d}  {key}  {load}", flush=True)
            if key not in kept:
                kept[key] = found
                shutil.rmtree(options.out / key, ignore_errors=True)
                (options.out / "last" / str(number)).rename(options.out / key)
    (usual, _), *others = counts.most_common()
    print(f"{counts[usual]} of {counts.total()} runs are {usual} ({len(kept[usual])} parts)")
    for key, count in others:
        names = sorted({*kept[usual], *kept[key]})
        differing = [name for name in names if kept[usual].get(name) != kept[key].get(name)]
        print(f"{count} are {key}, where {len(differing)} parts differ: {', '.join(differing[:4])}")
    return 0 if len(kept) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
