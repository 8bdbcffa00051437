"""Figures of runs of every kind: drawn, readable and true to the records."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from rl_lora.config import EvalSection
from rl_lora.errors import UserError
from rl_lora.evaluation.intervals import exact_interval
from rl_lora.report import blocks
from rl_lora.report.evaluation_figures import evaluation_figure, panels_figure
from rl_lora.report.figures import length_figure, reward_figure
from rl_lora.report.records import read_run
from rl_lora.report.run_figures import draw, draw_figures
from rl_lora.runs.log import RunLog
from tests.helpers.evaluations import evaluate
from tests.helpers.fakes import FakeReward, FakeSampler, make_prompt

STEP = {
    "reward/mean": 0.5,
    "reward/correct_mean": 0.4,
    "reward/format_mean": 0.9,
    "cot/tokens_mean": 40.0,
    "cot/tokens_correct_mean": 35.0,
    "cot/tokens_wrong_mean": 45.0,
    "cot/truncated_rate": 0.1,
}


def write_run(folder: Path, steps: dict[int, dict[str, Any]]) -> None:
    with RunLog(folder) as log:
        for step, metrics in steps.items():
            log.write(step, metrics)


def write_evaluation(folder: Path, name: str, step: int | None, num_correct: int) -> None:
    """An evaluation of ten problems of two sources."""
    prompts = [make_prompt(f"s/{index}", source=("a", "b")[index % 2]) for index in range(10)]
    sampler = FakeSampler(lambda prompt, _: "7" if int(prompt.prompt_id[2:]) < num_correct else "8")
    evaluate(
        sampler,
        prompts,
        FakeReward(),
        EvalSection(),
        max_tokens=9,
        seed=0,
        step=step,
        folder=folder / "eval",
        name=name,
    )


def drawn(figure: blocks.Figure | None) -> list[Axes]:
    """The panels of a report's figure."""
    assert figure is not None
    sheet = Figure()
    draw(figure, sheet)
    return sheet.axes


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    (line,) = [line for line in axes.get_lines() if line.get_label() == label]
    return [(float(x), float(y)) for x, y in np.asarray(line.get_xydata())]


def labels(panels: list[Axes]) -> list[str]:
    (legend,) = panels[0].figure.legends
    return [text.get_text() for text in legend.get_texts()]


def size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_a_run_gets_all_figures(tmp_path: Path) -> None:
    write_run(tmp_path, dict.fromkeys((1, 2, 3), STEP))
    write_evaluation(tmp_path, "base", None, 0)
    write_evaluation(tmp_path, "step_000000", 0, 2)
    write_evaluation(tmp_path, "step_000003", 3, 8)
    paths = draw_figures(tmp_path)
    assert [path.name for path in paths] == [
        "reward.png",
        "length.png",
        "accuracy.png",
        "evaluations.png",
        "overview.png",
    ]
    assert {path.parent for path in paths} == {tmp_path / "figures"}
    assert size(paths[0]) == (960, 750)
    assert size(paths[4]) == (2340, 750)


def test_one_step_and_no_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path, {1: {"reward/mean": 0.5}})
    assert [path.name for path in draw_figures(tmp_path)] == ["reward.png", "overview.png"]


def test_evaluations_without_a_step(tmp_path: Path) -> None:
    write_run(tmp_path, {})
    write_evaluation(tmp_path, "step_000000", 0, 2)
    assert [path.name for path in draw_figures(tmp_path)] == ["accuracy.png", "overview.png"]


def test_a_run_without_any_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        draw_figures(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "half')
    with pytest.raises(UserError, match="no step and no evaluation yet"):
        draw_figures(tmp_path)


def test_reward_lines_skip_missing_and_null_numbers(tmp_path: Path) -> None:
    first, second = {"reward/mean": 0.5, "reward/format_mean": 0.9}, {"reward/mean": float("nan")}
    write_run(tmp_path, {1: first, 2: second, 3: {"reward/mean": 0.7}})
    panels = drawn(reward_figure([read_run(tmp_path)]))
    assert points(panels[0], "mean reward") == [(1, 0.5), (3, 0.7)]
    assert points(panels[0], "share in the requested format") == [(1, 0.9)]
    assert labels(panels) == ["mean reward", "share in the requested format"]
    assert panels[0].get_xlabel() == "training step"


def test_length_has_its_unit_and_the_truncation_rate_below(tmp_path: Path) -> None:
    write_run(tmp_path, {1: STEP, 2: STEP})
    panels = drawn(length_figure([read_run(tmp_path)]))
    upper, lower = panels
    assert "tokens" in upper.get_ylabel()
    assert points(upper, "correct") == [(1, 35), (2, 35)]
    assert points(lower, "truncated (below)") == [(1, 0.1), (2, 0.1)]
    assert labels(panels) == ["all", "correct", "wrong", "truncated (below)"]
    assert upper.get_ylim()[0] == lower.get_ylim()[0] == 0


def test_long_runs_are_smoothed_over_the_raw_line(tmp_path: Path) -> None:
    write_run(tmp_path, {step: {"reward/mean": float(step % 2)} for step in range(1, 101)})
    panels = drawn(reward_figure([read_run(tmp_path)]))
    smooth = points(panels[0], "mean reward")
    assert len(smooth) == 100
    assert all(abs(y - 0.5) < 0.05 for _, y in smooth[5:-5])  # 11 steps: 5/11 or 6/11
    raw = panels[0].get_lines()[0]
    assert [float(y) for y in raw.get_ydata()] == [float(step % 2) for step in range(1, 101)]
    assert labels(panels) == ["mean reward"]


def test_accuracy_has_interval_bars_and_the_base(tmp_path: Path) -> None:
    write_run(tmp_path, {10: STEP})
    write_evaluation(tmp_path, "base", None, 1)
    write_evaluation(tmp_path, "step_000000", 0, 3)
    write_evaluation(tmp_path, "step_000010", 10, 8)
    write_evaluation(tmp_path, "by-hand", None, 10)  # an evaluation outside the training
    panels = drawn(evaluation_figure([read_run(tmp_path)]))
    assert points(panels[0], "accuracy") == [(0, 0.3), (10, 0.8)]
    (bars,) = [
        collection.get_segments()
        for collection in panels[0].collections
        if hasattr(collection, "get_segments")
    ]
    for segment, (step, num_correct) in zip(bars, [(0, 3), (10, 8)], strict=True):
        low, high = exact_interval(num_correct, 10)
        assert segment.ravel().tolist() == pytest.approx([step, low, step, high], rel=1e-5)
    assert points(panels[0], "base model") == [(0, 0.1), (10, 0.1)]
    assert labels(panels)[0] == "accuracy"
    (legend,) = panels[0].figure.legends
    assert "95% intervals" in legend.get_title().get_text()


def test_evaluation_score_and_length_by_step_for_each_set(tmp_path: Path) -> None:
    write_run(tmp_path, {10: STEP})
    write_evaluation(tmp_path, "base", None, 1)
    write_evaluation(tmp_path, "step_000000", 0, 3)
    write_evaluation(tmp_path, "step_000010", 10, 8)
    run = read_run(tmp_path)
    score_a, length_a = drawn(panels_figure(run, "a"))
    score_b, _ = drawn(panels_figure(run, "b"))
    assert (score_a.get_title(), score_b.get_title()) == ("a", "b")
    assert points(score_a, "accuracy") == [(0, 0.4), (10, 0.8)]
    assert points(score_b, "accuracy") == [(0, 0.2), (10, 0.8)]
    assert points(length_a, "mean length (below)") == [(0, 2), (10, 2)]  # one character and an end
    (band,) = score_a.patches
    assert isinstance(band, Polygon)
    corners = band.get_xy().round(5).tolist()
    for bound in exact_interval(2, 5):
        assert [0, round(bound, 5)] in corners
    assert points(score_a, "base model") == [(0, 0.2), (10, 0.2)]  # the first problem is of a


def test_a_damaged_evaluation_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, {1: STEP})
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "step_000001.json").write_text("{")
    with pytest.raises(UserError, match=r"step_000001\.json is not an evaluation result"):
        draw_figures(tmp_path)
