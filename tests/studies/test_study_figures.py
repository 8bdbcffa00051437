"""The article's figures from a table: the right numbers in the right places; all are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from rl_lora.cli import main
from rl_lora.errors import UserError
from rl_lora.studies.config import Condition
from rl_lora.studies.figures import (
    FIGURES,
    best_results,
    curves_of,
    draw_study,
    envelope,
    mean_curve,
    spread,
)
from rl_lora.studies.results import condition_of, condition_text

RANK_1, FULL = Condition("lora", 1, "all", False, 32), Condition("full", 0, "all", False, 32)


def row(arm: str, seed: int, result: float | None, lr: float = 1e-3, **more: Any) -> dict[str, Any]:
    names = {"rl": ("reward", "tokens"), "sft": ("loss", "test_nll")}[arm]
    end = 1.0 if result is None else result
    curves = {name: {"step": [1, 2, 4], "value": [3.0, 2.0 + seed, end]} for name in names}
    record = {"cell": f"{seed}{lr}{sorted(more.items())}", "arm": arm, "seed": seed, "lr": lr}
    record |= {"mode": "lora", "rank": 1, "layers": "all", "lm_head": False, "batch_size": 32}
    return record | {"result": result, "curves": curves, "status": "done", "error": ""} | more


def sft_rows() -> list[dict[str, Any]]:
    rows = []
    for seed in (0, 1):
        for rank, gain in ((1, 0.0), (8, 0.2)):
            rows += [row("sft", seed, 2.0 - gain, 1e-3, rank=rank)]
            rows += [row("sft", seed, 1.5 - gain + 0.1 * seed, 1e-2, rank=rank)]
        rows += [row("sft", seed, 1.7, 1e-2, batch_size=128)]
        rows += [row("sft", seed, 1.9, 1e-2, layers="attention")]
        rows += [row("sft", seed, 1.4, 1e-3, mode="full", rank=0)]
        rows += [row("sft", seed, None, 1e-1, mode="full", rank=0)]
    return rows


def rl_rows() -> list[dict[str, Any]]:
    return [
        row("rl", seed, 0.5 + lr * 10, lr, rank=rank, layers=layers)
        for seed in (0, 1, 2)
        for lr in (1e-3, 1e-2)
        for rank, layers in ((1, "all"), (8, "all"), (8, "mlp"))
    ]


def lines_of(name: str, rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """label -> points of a figure's curves."""
    axes = Figure().add_subplot()
    FIGURES[name].draw(axes, rows)
    return {
        str(line.get_label()): [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]
        for line in axes.get_lines()
    }


def test_the_best_rate_is_that_of_the_best_mean_without_failures() -> None:
    best = best_results(sft_rows())
    assert best[RANK_1] == (1e-2, [1.5, 1.6])
    assert best[FULL] == (1e-3, [1.4, 1.4])  # at 1e-1 it failed
    assert {rate for rate, _ in best_results(rl_rows()).values()} == {1e-2}  # a reward is maximised


def test_means_over_seeds_are_taken_where_all_seeds_have_a_point() -> None:
    points = mean_curve({0: ([1, 2, 4], [1.0, 2.0, 3.0]), 1: ([2, 4], [4.0, 3.0])})
    assert points == [(2, 3.0, 2.0, 4.0), (4, 3.0, 3.0, 3.0)]
    three = {seed: ([2], [value]) for seed, value in enumerate((1.0, 2.0, 3.0))}
    ((_, mean, _, high),) = mean_curve(three)
    # Standard deviation 1, error 1 / sqrt 3, t for two degrees of freedom 4.3027.
    assert high - mean == pytest.approx(2.4842, abs=1e-3)


def test_figure_1_takes_the_best_rate_at_each_step() -> None:
    rows = [row("sft", 0, 2.0, 1e-3), row("sft", 0, 1.0, 1e-2)]
    rows[0]["curves"]["test_nll"]["value"] = [2.5, 2.2, 2.0]
    rows[1]["curves"]["test_nll"]["value"] = [9.0, 3.0, 1.0]
    curves = [mean_curve(curves_of(rows, "test_nll", RANK_1, lr)) for lr in (1e-3, 1e-2)]
    assert [point[:2] for point in envelope(curves)] == [(1, 2.5), (2, 2.2), (4, 1.0)]
    assert dict(lines_of("figure_1", rows)["rank 1"]) == {1: 2.5, 2: 2.2, 4: 1.0}


def test_figure_2_draws_means_and_leaves_failures_out() -> None:
    lines = lines_of("figure_2", sft_rows())
    assert [x for x, _ in lines["rank 1"]] in ([1e-3, 1e-2], [1e-2])
    assert lines["full"] == [(1e-3, 1.4)]


def test_figure_3_goes_by_batch_size() -> None:
    assert lines_of("figure_3", sft_rows())["rank 1"] == [(32, pytest.approx(1.55)), (128, 1.7)]


def test_figure_8_is_the_difference_to_the_largest_rank_seed_by_seed() -> None:
    rows = [row("sft", seed, 1.0, 1e-3, rank=rank) for seed in (0, 1) for rank in (1, 8)]
    for one in rows:
        base = [3.0 + one["seed"], 2.0, 1.0]
        one["curves"]["loss"]["value"] = [v + (0.5 if one["rank"] == 1 else 0.0) for v in base]
    line = lines_of("figure_8", rows)["rank 1 - rank 8"]
    assert [y for _, y in line] == pytest.approx([0.5, 0.5, 0.5])


def variant_rows(arm: str) -> list[dict[str, Any]]:
    more: list[dict[str, Any]] = [{}, {"variant": "dora"}, {"lora_plus_ratio": 16.0}]
    return [
        row(arm, seed, 1.0 + 0.1 * number + 0.2 * seed + lr, lr, **settings)
        for number, settings in enumerate(more)
        for seed in (0, 1)
        for lr in (1e-3, 1e-2)
    ]


def test_figure_9_has_each_variant_at_its_best_rate() -> None:
    axes = Figure().add_subplot()
    FIGURES["figure_9"].draw(axes, variant_rows("rl"))
    labels = [tick.get_text() for tick in axes.get_xticklabels()]
    assert labels == [f"rank 1{name}\nrate 0.01" for name in ("", " DoRA", " LoRA+ 16")]
    means = [float(bar.lines[0].get_ydata()[0]) for bar in axes.containers]  # type: ignore[attr-defined]
    assert means == pytest.approx([1.11, 1.21, 1.31])  # of two seeds 0.2 apart


def test_rows_of_older_tables_are_plain_lora() -> None:
    assert condition_of(row("rl", 0, 1.0)) == RANK_1
    assert condition_text(RANK_1._replace(variant="rslora", lora_plus_ratio=2.0)) == (
        "rank 1 rsLoRA LoRA+ 2"
    )


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        (sft_rows(), {"figure_1", "figure_2", "figure_3", "figure_4", "figure_5", "figure_8"}),
        (rl_rows(), {"figure_4", "figure_5", "figure_6", "figure_7", "figure_7b"}),
        (variant_rows("sft"), {"figure_1", "figure_2", "figure_9"}),
        (variant_rows("rl"), {"figure_6", "figure_7", "figure_7b", "figure_9"}),
        ([row("sft", 0, 1.0)], {"figure_1"}),
        ([row("rl", 0, 1.0)], {"figure_7", "figure_7b"}),
    ],
)
def test_every_figure_that_the_rows_carry_is_drawn(
    tmp_path: Path, rows: list[dict[str, Any]], names: set[str]
) -> None:
    paths = draw_study(rows, tmp_path / "figures")
    assert {path.stem for path in paths} == names
    assert all(path.stat().st_size > 3000 for path in paths)
    assert names <= set(FIGURES)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(json.dumps(one) + "\n" for one in rl_rows())
    (tmp_path / "results.jsonl").write_text(lines)
    assert main(["report", "--study", str(tmp_path)]) == 0
    assert "figure_6.png" in capsys.readouterr().out
    assert (tmp_path / "figures" / "figure_7b.png").is_file()


def test_a_study_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to draw"):
        draw_study([row("sft", 0, None)], tmp_path)
    assert main(["report", "--study", str(tmp_path / "nowhere")]) == 2


def test_a_band_of_two_seeds_is_the_seeds() -> None:
    assert spread([1.0, 3.0]) == (2.0, 1.0, 3.0)
    mean, low, high = spread([1.0, 2.0, 3.0])  # 2 +- 4.303 / sqrt 3
    assert (mean, low, high) == pytest.approx((2.0, -0.4841, 4.4841), abs=1e-3)
