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


@pytest.mark.filterwarnings("ignore:One or more sample arguments is too small")
def test_a_figure_that_grows_is_found_and_noise_is_not() -> None:
    assert soak.problems(rows()) == []
    for name, limit in soak.LIMITS.items():
        growth = 2 * limit / 1000 + 0.01
        assert soak.slopes(rows(**{name: growth}))[name] == pytest.approx(1000 * growth, rel=0.2)
        (found,) = soak.problems(rows(**{name: growth}))
        assert found.startswith(f"{name} grows by ")
    assert len(soak.problems(rows()[:2])) == len(soak.LIMITS)  # too few to judge


def test_a_job_that_does_not_end_as_it_should_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = rows()
    bad[7]["error"] = "Traceback"
    assert soak.problems(bad) == ["job 7 (x) failed"]
    assert soak.report(bad, tmp_path / "soak.png") == 1
    assert "400 jobs in 0.56 hours" in capsys.readouterr().out
    assert (tmp_path / "soak.png").stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_each_job_ends_as_it_should(tmp_path: Path, name: str) -> None:
    JOBS[name](tmp_path, random.Random(0))
