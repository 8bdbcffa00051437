"""Runs small jobs with faults injected at random, one after another in one process, for hours.

    python scripts/soak.py --hours 2 --folder /tmp/soak

After each job a line goes to FOLDER/soak.jsonl: memory, file descriptors, threads, processes,
shared memory, what temporary folders hold. At the end FOLDER/soak.png shows them, and the exit code
is 1 if one of them grows over the second half by more than `LIMITS` per 1,000 jobs, or if a job did
not end as it should have.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import psutil
from matplotlib.figure import Figure
from scipy.stats import theilslopes

# What 1,000 jobs may add. Memory: the allocator keeps what a job has freed, some of it for good.
LIMITS = {
    "resident_mb": 20.0,
    "objects": 2000.0,
    "file_descriptors": 1.0,
    "threads": 1.0,
    "processes": 1.0,
    "shared_memory": 1.0,
    "temporary_files": 1.0,
    "disk_mb": 1.0,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=float, default=2.0, help="how long jobs are started")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="for all it writes")
    parser.add_argument("--seed", type=int, default=0, help="of the jobs and their faults")
    parser.add_argument("--only", help="run only this job, by its function's name")
    parser.add_argument("--judge", action="store_true", help="only judge and draw what is there")
    arguments = parser.parse_args(argv)
    lines = arguments.folder / "soak.jsonl"
    if not arguments.judge:
        run_jobs(lines, arguments.hours, arguments.seed, arguments.only)
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return report(rows, arguments.folder / "soak.png")


def run_jobs(lines: Path, hours: float, seed: int, only: str | None) -> None:
    """Runs jobs until the time is over, and writes a line after each."""
    folder = lines.parent.resolve()
    scratch, work = folder / "tmp", folder / "work"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tempfile.tempdir = os.environ["TMPDIR"] = str(scratch)
    from tests.helpers.soak_jobs import JOBS

    source = random.Random(seed)
    started = time.monotonic()
    with lines.open("w", encoding="utf-8") as file:
        number = 0
        while (elapsed := time.monotonic() - started) < hours * 3600:
            number += 1
            name, own = only or source.choice([*JOBS]), random.Random(f"{seed} {number}")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            error = run_job(JOBS[name], work, own)
            shutil.rmtree(work)
            row = {"job": number, "name": name, "at_s": round(elapsed, 1), **figures(scratch)}
            row["seconds"] = round(time.monotonic() - started - elapsed, 2)
            row["error"] = error
            print(json.dumps(row), file=file, flush=True)
            if error:
                print(f"job {number} ({name}):\n{error}", flush=True)


def run_job(job: Any, folder: Path, source: random.Random) -> str:
    """Runs a job; returns what went wrong, empty if it ended as it should have."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            job(folder, source)
    except BaseException:  # noqa: BLE001 (a soak continues, and fails at its end)
        return traceback.format_exc()
    return ""


def figures(scratch: Path) -> dict[str, float]:
    """What this process holds now, by the names of `LIMITS`."""
    gc.collect()
    process = psutil.Process()
    return {
        "resident_mb": round(process.memory_info().rss / 1e6, 2),
        "objects": len(gc.get_objects()),
        "file_descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "processes": len(process.children(recursive=True)),
        "shared_memory": len(own_shared_memory()),
        "temporary_files": sum(1 for _ in scratch.rglob("*")),
        "disk_mb": round(sum(f.stat().st_size for f in scratch.rglob("*")) / 1e6, 3),
    }


def own_shared_memory() -> list[Path]:
    """Entries of /dev/shm made since this process began, of this user."""
    began = psutil.Process().create_time()
    found = []
    for path in Path("/dev/shm").glob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if status.st_uid == os.getuid() and status.st_mtime >= began:
            found.append(path)
    return found


def slopes(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Growth per 1,000 jobs over the second half of the rows: the median of the slopes between all
    pairs (Theil-Sen), which single jobs do not move."""
    half = rows[len(rows) // 2 :]
    jobs = [row["job"] for row in half]
    return {
        name: 1000 * float(theilslopes([row[name] for row in half], jobs).slope) for name in LIMITS
    }


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The figures that grow, and the jobs that did not end as they should have."""
    growth = slopes(rows)
    grown = [
        f"{name} grows by {growth[name]:.2f} per 1,000 jobs; the limit is {limit:g}"
        for name, limit in LIMITS.items()
        if not growth[name] <= limit  # not a number, if there are too few jobs
    ]
    return grown + [f"job {row['job']} ({row['name']}) failed" for row in rows if row["error"]]


def report(rows: Sequence[dict[str, Any]], picture: Path) -> int:
    """Prints the judgement and draws the figures; returns the exit code."""
    growth, found = slopes(rows), problems(rows)
    print(f"{len(rows)} jobs in {(rows[-1]['at_s'] + rows[-1]['seconds']) / 3600:.2f} hours")
    for name in LIMITS:
        first, last = rows[len(rows) // 2][name], rows[-1][name]
        print(f"{name}: {first:g} at half time, {last:g} at the end, {growth[name]:+.2f} per 1,000")
    print("\n".join(found or ["nothing grows, and each job ended as it should have"]))
    draw(rows, picture)
    return int(bool(found))


def draw(rows: Sequence[dict[str, Any]], picture: Path) -> None:
    sheet = Figure(figsize=(12, 6), layout="constrained")
    hours = [row["at_s"] / 3600 for row in rows]
    with matplotlib.rc_context({"font.size": 9}):
        for axes, name in zip(sheet.subplots(2, 4).flat, LIMITS, strict=True):
            axes.plot(hours, [row[name] for row in rows], linewidth=0.8)
            axes.set_title(name.replace("_", " "))
            axes.set_ylim(bottom=0)
            axes.set_xlabel("hours")
        sheet.savefig(picture, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
