"""`make audit` passes only where everything was looked up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import audit
import pytest

SAFE: dict[str, Any] = {"name": "a", "version": "1", "vulns": []}
HOLE = {"id": "PYSEC-1", "fix_versions": ["2.1"], "aliases": [], "description": ""}
UNSAFE = {"name": "b", "version": "2", "vulns": [HOLE]}
SKIPPED = {"name": "b", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("probe", "report", "code", "told"),
    [
        ([SAFE], [SAFE, SAFE], 0, "audit: 2 versions, 0 known vulnerabilities"),
        ([SAFE], [SAFE, UNSAFE], 1, "x.lock: b 2: PYSEC-1, fixed in 2.1"),
        ([SAFE], [SAFE, SKIPPED], 3, "x.lock: 1 not looked up: b"),
        ([SAFE], [SAFE], 3, "x.lock: 1 not looked up: "),
        ([SKIPPED], [], 3, "has no vulnerability service; nothing was checked"),
        (None, [], 3, "audit: pip-audit failed: no connection"),
    ],
)
def test_exit_codes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    probe: list[dict[str, Any]] | None,
    report: list[dict[str, Any]],
    code: int,
    told: str,
) -> None:
    lock = tmp_path / "x.lock"
    lock.write_text("# written by hand\na==1\nb==2\n")

    def answer(requirements: Path) -> list[dict[str, Any]]:
        if probe is None:
            raise RuntimeError("no connection")
        return report if requirements == lock else probe

    monkeypatch.setattr(audit, "LOCKS", [lock])
    monkeypatch.setattr(audit, "dependencies", answer)
    assert audit.main() == code
    assert told in capsys.readouterr().out


def test_the_locks_are_found() -> None:
    assert {"cpu.lock", "gpu.lock"} <= {lock.name for lock in audit.LOCKS}
