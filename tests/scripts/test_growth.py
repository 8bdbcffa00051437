"""Growth in a sweep: exponents and lines of hand-made numbers, the formula, table and figure."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks.figure import draw_sweep
from benchmarks.growth import (
    Line,
    Power,
    against_formula,
    fits,
    line,
    power_law,
    records,
    sweep_tables,
)
from benchmarks.our_arms import formula_per_token
from benchmarks.run import learning_row, phase_row
from rich.console import Console

from rl_lora.config import LoraSection, ModelSection
from rl_lora.policy import open_policy
from tests.helpers.tiny_models import random_llama

RANKS = (1, 8, 64, 256)


def rank_rows(factor: float = 1.0) -> list[dict[str, Any]]:
    """A layer of 64 x 64: 2 N^2 + 6 N R = 8192 + 384 R for LoRA, 3 N^2 = 12288 for full."""
    return [
        {
            "rank": rank,
            "tokens": 100,
            "learner_s": 2.0 + 0.5 * rank,
            "full_s": 4.0,
            "learner_mflop_per_token": 8192 + factor * 384 * rank,
            "full_mflop_per_token": 12288.0,
            "learner_formula_mflop_per_token": 8192 + 384 * rank,
            "full_formula_mflop_per_token": 12288.0,
        }
        for rank in RANKS
    ]


def test_a_power_law_gives_its_exponent_and_factor() -> None:
    fit = power_law([1, 2, 4], [3, 12, 48])
    assert fit == pytest.approx((3.0, 2.0, 0.0), abs=1e-12)
    assert fit.at(8) == pytest.approx(192)
    assert fit.text() == "3 x n^2.000"
    assert power_law([2, 8, 32], [10, 5, 2.5])[:2] == pytest.approx((10 * math.sqrt(2), -0.5))


def test_a_power_law_between_points_misses_by_the_residual() -> None:
    # Base-2 logarithms 0, 1, 2 against 0, 1, 0: level 1/3, off by -1/3, 2/3, -1/3.
    fit = power_law([1, 2, 4], [1, 2, 1])
    assert fit == pytest.approx((2 ** (1 / 3), 0.0, math.sqrt(2 / 9) * math.log(2)), abs=1e-12)


def test_a_line_gives_intercept_and_slope() -> None:
    fit = line(RANKS, [8192 + 384 * rank for rank in RANKS])
    assert fit == pytest.approx((8192, 384, 0), abs=1e-8)
    assert fit.at(2) == pytest.approx(8960)
    assert line([0, 1, 2], [1, 2, 1]) == pytest.approx((4 / 3, 0, math.sqrt(2 / 9) / (4 / 3)))


@pytest.mark.parametrize(("xs", "ys"), [([2, 2], [1, 3]), ([1], [1]), ([1, 2], [0, 1]), ([], [])])
def test_what_no_power_law_goes_through_is_refused(xs: list[float], ys: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needs (two different|positive) numbers"):
        power_law(xs, ys)


def test_each_sweep_has_its_form() -> None:
    ranks = fits("ranks", rank_rows())
    assert ranks["learner_s"] == pytest.approx((2.0, 0.5, 0.0), abs=1e-9)
    assert isinstance(ranks["learner_s"], Line)
    rows = [{"num_samples": n, "learner_s": 0.5 * n**1.5, "full_s": n} for n in (2, 4, 8)]
    samples = fits("samples", rows)
    assert isinstance(samples["learner_s"], Power)
    assert samples["learner_s"][:2] == pytest.approx((0.5, 1.5))
    assert set(samples) == {"learner_s", "full_s"}  # what was measured, no more
    assert records(samples)["full_s"] == pytest.approx(
        {"form": "power", "factor": 1.0, "exponent": 1.0, "residual": 0.0}, abs=1e-12
    )
    assert fits("layers", [{"layers": "mlp", "learner_s": 1.0}]) == {}


def test_measured_products_are_compared_with_the_formula() -> None:
    found = against_formula(fits("ranks", rank_rows(factor=1.25)))
    assert found["learner"] == pytest.approx({"intercept": 1.0, "slope": 1.25})
    assert found["full"] == pytest.approx({"intercept": 1.0})


def test_the_formula_of_a_model_is_the_articles_count(tmp_path: Path) -> None:
    inner = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # two layers: q and o, k and v, MLP
    ends = 2 * (2 * 128 + 2 * 96 + 3 * 160)  # d_in + d_out of all adapted layers
    head = 97 * 64
    model_dir = random_llama(tmp_path)
    model = ModelSection(name=str(model_dir), dtype="float32", device="cpu")
    lora = open_policy(model_dir, model, LoraSection(rank=3), seed=0)
    assert formula_per_token(lora, 1.0) == 2 * (2 * (inner + head) + 3 * 3 * ends)
    assert formula_per_token(lora, 0.25) == 2 * (2 * inner + 2 * head / 4 + 3 * 3 * ends)
    full = open_policy(model_dir, model, LoraSection(mode="full"), seed=0)
    assert formula_per_token(full, 0.5) == 2 * (3 * inner + 3 * head / 2)


def test_rows_take_medians_of_seconds_and_the_greatest_peak() -> None:
    learned = {
        "learner": [{"learn": s, "memory": 100 - s, "computed_tokens": 50} for s in (1, 9, 2)],
        "full": [{"learn": 4, "memory": 7, "computed_tokens": 60}],
    }
    flops = {name: {"products_per_token": 2e9, "formula_per_token": 3e9} for name in learned}
    row = learning_row(learned, flops)
    assert (row["learner_s"], row["learner_memory_mb"], row["full_s"]) == (2, 99, 4)
    assert row["tokens"] == 50
    assert row["learner_gflop"] == pytest.approx(100)
    assert row["full_formula_mflop_per_token"] == pytest.approx(3000)
    phases = ("sample", "score", "learn", "publish")
    steps = [dict.fromkeys(phases, s) | {f"memory_{p}": 10 * s for p in phases} for s in (1, 5, 3)]
    assert phase_row(steps)["step_sample_s"] == 3
    assert phase_row(steps)["step_publish_memory_mb"] == 50


def test_tables_have_ratios_fits_residuals_and_the_formula() -> None:
    out = io.StringIO()
    for table in sweep_tables("ranks", rank_rows(factor=2.0)):
        Console(file=out, width=110).print(table)
    lines = {
        text.split("│")[1].strip(): text for text in out.getvalue().splitlines() if "│" in text
    }
    assert "0.667" not in lines["LoRA / full, mflop_per_token"]
    assert "0.729" in lines["LoRA / full, mflop_per_token"]  # (8192 + 768) / 12288 at rank 1
    assert "2 + 0.5 n" in out.getvalue()
    assert "2.0000" in lines["learner: slope, measured / 2 N^2 + 6 N R"]


@pytest.mark.parametrize("kind", ["ranks", "layers", "samples"])
def test_the_figure_is_drawn(kind: str, tmp_path: Path) -> None:
    rows = [
        {
            **row,
            "layers": f"l{i}",
            "num_samples": 2**i,
            **{
                f"{arm}_{name}": 1.0 + i
                for arm in ("learner", "full")
                for name in ("gflop", "memory_mb")
            },
        }
        for i, row in enumerate(rank_rows())
    ]
    path = tmp_path / "sweep.png"
    draw_sweep(kind, rows, fits(kind, rows), path)
    assert path.read_bytes().startswith(b"\x89PNG")
