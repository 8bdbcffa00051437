"""The soak: its jobs end as they should, and its judgement finds what grows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import soak

from tests.helpers.soak_jobs import JOBS

pytestmark = pytest.mark.faults


def rows(**growth: float) -> list[dict[str, Any]]:
    """400 jobs; each figure is 100 and some noise, and grows by so much a job."""
    source = random.Random(0)
    return [
        {"job": job, "at_s": 5.0 * job, "seconds": 5.0, "name": "x", "error": ""}
        | {name: 100 + source.randint(0, 1) + job * growth.get(name, 0) for name in soak.LIMITS}
        for job in range(400)
    ]


def test_a_figure_that_grows_fails_and_noise_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.report(rows(), tmp_path / "flat.png") == 0
    assert "grows" not in capsys.readouterr().out
    for name, limit in soak.LIMITS.items():
        assert soak.slopes(rows(**{name: 0.01}))[name] == pytest.approx(10, abs=2)
        assert soak.report(rows(**{name: 2 * limit / 1000 + 0.01}), tmp_path / "grows.png") == 1
        (line,) = [one for one in capsys.readouterr().out.splitlines() if "grows" in one]
        assert line.startswith(f"{name}: ")
    assert (tmp_path / "flat.png").stat().st_size > 10_000


def test_a_job_that_does_not_end_as_it_should_fails(tmp_path: Path) -> None:
    bad = rows()
    bad[7]["error"] = "Traceback"
    assert soak.report(bad, tmp_path / "x.png") == 1


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_each_job_ends_as_it_should(tmp_path: Path, name: str) -> None:
    JOBS[name](tmp_path, random.Random(0))
