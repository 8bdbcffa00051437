"""What two runs of one job must have in common: every file, but for what a machine measures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rl_lora.storage import jsonl

MEASURED = ("time/", "speed/", "memory/", "system/")  # keys of metrics
_OF_THE_MACHINE = ("seconds", "peak_mb", "process")  # keys of other files
_LINES = ("metrics.jsonl", "warm_start.jsonl", "transcripts.jsonl")


def run_files(folder: Path) -> dict[str, str]:
    """Path within the folder -> the file's content, or its hash if it is not text.

    Left out are times, memory, process numbers, and of a study the timings and its cells' logs; its
    rows are in the order of the cells' keys, as they end in another order each time.
    """
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    kept = (name for name in names if not name.endswith(".log") and "calibration" not in name)
    return {name: _content(folder / name) for name in kept}


def difference(expected: dict[str, str], found: dict[str, str]) -> str:
    """The first file in which two runs differ, and how; empty if none does."""
    for name in sorted(expected.keys() | found.keys()):
        one, other = expected.get(name), found.get(name)
        if one is None or other is None:
            return f"{name} is only in the {'resumed' if one is None else 'unbroken'} run"
        if one != other:
            return f"{name}: {_first_difference(one, other)}"
    return ""


def _first_difference(one: str, other: str) -> str:
    pairs = zip(one.splitlines(), other.splitlines(), strict=False)
    for number, (line, changed) in enumerate(pairs, start=1):
        if line != changed:
            at = next(i for i in range(len(line)) if line[: i + 1] != changed[: i + 1])
            start = max(0, at - 40)
            return f"line {number}: {line[start : at + 40]!r}, not {changed[start : at + 40]!r}"
    return f"{len(one.splitlines())} lines, not {len(other.splitlines())}"


def _content(path: Path) -> str:
    name = path.name
    if name in (*_LINES, "results.jsonl") or name.endswith(".jsonl.gz"):
        rows = jsonl.read_lines(path)
        if name == "results.jsonl":
            rows.sort(key=lambda row: str(row["cell"]))
        return "\n".join(json.dumps(steady(row)) for row in rows)
    if path.suffix == ".json":
        value = json.loads(path.read_text(encoding="utf-8"))
        if name == "state.json":
            del value["sha256"]  # of all the rest
        return json.dumps(steady(value), indent=1)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steady(value: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics, or another file's record, without what a machine measures."""
    return {
        key: item
        for key, item in value.items()
        if key not in _OF_THE_MACHINE and not key.startswith(MEASURED)
    }
