"""Looks for known vulnerabilities of every version in requirements/*.lock, with pip-audit.

`make audit` runs it. pip-audit asks the package index's vulnerability service about each version,
and counts a version that the service does not know as a success. Here it is a failure: a check
that has looked at nothing must not pass.

Exit code 0: all were looked up, and nothing is known; 1: vulnerabilities; 3: some could not be
looked up, or the index has no such service.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOCKS = sorted((Path(__file__).resolve().parents[1] / "requirements").glob("*.lock"))


def dependencies(requirements: Path) -> list[dict[str, Any]]:
    """pip-audit's report on each version in a file of pins.

    Raises:
        RuntimeError: pip-audit has failed, with its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--no-deps"]
        command += ["--progress-spinner", "off", "--format", "json", "--output", str(report)]
        command += ["--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not report.is_file():
            raise RuntimeError((done.stderr.strip().splitlines() or ["no report"])[-1])
        found: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))["dependencies"]
    return found


def findings(entries: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each known vulnerability."""
    for entry in entries:
        for known in entry.get("vulns", ()):
            fixed = ", ".join(known["fix_versions"]) or "no version"
            yield f"{entry['name']} {entry['version']}: {known['id']}, fixed in {fixed}"


def is_looked_up(requirement: str) -> bool:
    """Whether the service knows this version: asked once, before hundreds are."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        file.write_text(f"{requirement}\n", encoding="utf-8")
        return not any("skip_reason" in entry for entry in dependencies(file))


def main() -> int:
    """Audits all locks; returns the exit code."""
    pins = {
        lock: [line for line in lock.read_text().splitlines() if "==" in line] for lock in LOCKS
    }
    num_missing, num_found = 0, 0
    try:
        if not is_looked_up(next(pin for pins_of in pins.values() for pin in pins_of)):
            print("audit: the package index here has no vulnerability service; nothing was checked")
            return 3
        for lock, wanted in pins.items():
            entries = dependencies(lock)
            skipped = [str(entry["name"]) for entry in entries if "skip_reason" in entry]
            missing = len(wanted) - (len(entries) - len(skipped))
            lines = list(findings(entries))
            for line in lines:
                print(f"{lock.name}: {line}")
            if missing:
                print(f"{lock.name}: {missing} not looked up: {', '.join(skipped)}")
            num_missing, num_found = num_missing + missing, num_found + len(lines)
    except RuntimeError as error:
        print(f"audit: pip-audit failed: {error}")
        return 3
    print(f"audit: {sum(map(len, pins.values()))} versions, {num_found} known vulnerabilities")
    return 1 if num_found else 3 if num_missing else 0


if __name__ == "__main__":
    sys.exit(main())
