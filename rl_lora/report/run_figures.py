"""A run's figures from its records: reward, completion length, held-out accuracy.

Every figure is drawn from what is there: one step, missing numbers and resumed runs included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rl_lora.errors import UserError
from rl_lora.evaluation.scores import EvalResult, load_result
from rl_lora.runs.log import METRICS_FILE
from rl_lora.storage import jsonl

FOLDER = "figures"

# Okabe and Ito's palette: distinct for all common kinds of colour vision, and line styles differ.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
_SOURCE_COLORS = ("#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MAX_SETS = 4  # columns of evaluations.png; the report has more
_ABOVE: Any = {
    "xytext": (-2, 3),
    "textcoords": "offset points",
    "ha": "right",
    "fontsize": 9,
    "color": GREY,
}
_SMOOTH_FROM = 60  # steps from which on a moving mean is drawn over the faint raw line
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.fontsize": 9,
    "legend.frameon": False,
}

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RunRecords:
    """What the figures are drawn from.

    Example: RunRecords(steps=[{"step": 1, "reward/mean": 0.2}], evaluations=[{"step": 0,
    "eval/accuracy": 0.1, ...}], base={"eval/accuracy": 0.02, ...})
    """

    steps: Records  # lines of metrics.jsonl
    evaluations: Records  # of the held-out evaluations, by step
    base: Mapping[str, Any] | None  # the evaluation of the base model without adapter


def draw_figures(run_folder: Path) -> list[Path]:
    """Writes RUN/figures/{reward,length,accuracy,evaluations,overview}.png; returns those drawn.

    A figure whose numbers were never recorded is not drawn; overview.png has reward, length and
    accuracy side by side. evaluations.png is there from two evaluations on: figure 7b of 'LoRA
    Without Regret'.

    Raises:
        UserError: the run has neither a step nor an evaluation on record, or a damaged record.
    """
    records = read_records(run_folder)
    if not records.steps and not records.evaluations:
        raise UserError(
            f"{run_folder} holds no step and no evaluation; figures are drawn after a run"
        )
    panels = [(name, draw) for name, draw, is_there in _PANELS if is_there(records)]
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in panels:
            figure = Figure(figsize=(6.4, 4.6), layout="constrained")
            draw(figure.add_subplot(), records)
            paths.append(_save(figure, folder / f"{name}.png"))
        if len(_series(records.evaluations, "eval/accuracy")[0]) > 1:
            paths.append(_save(evaluations_figure(records), folder / "evaluations.png"))
        if panels:
            layout = ConstrainedLayoutEngine(wspace=0.05)
            figure = Figure(figsize=(5.2 * len(panels), 4.4), layout=layout)
            all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
            for axes, (_, draw) in zip(all_axes, panels, strict=True):
                draw(axes, records)
            paths.append(_save(figure, folder / "overview.png"))
    return paths


def read_records(run_folder: Path) -> RunRecords:
    """Steps from metrics.jsonl; evaluations from there and from eval/step_*.json, which win.

    Raises:
        UserError: a record is damaged, naming it.
    """
    metrics_path, eval_folder = run_folder / METRICS_FILE, run_folder / "eval"
    steps = jsonl.read_lines(metrics_path) if metrics_path.is_file() else []
    evaluations: dict[int, Mapping[str, Any]] = {
        record["step"]: record for record in steps if "eval/accuracy" in record
    }
    for path in sorted(eval_folder.glob("step_*.json")):
        result = load_result(path)
        if result.step is not None:
            evaluations[result.step] = _evaluation_record(result)
    base = eval_folder / "base.json"
    return RunRecords(
        steps=steps,
        evaluations=[evaluations[step] for step in sorted(evaluations)],
        base=_evaluation_record(load_result(base)) if base.is_file() else None,
    )


def draw_reward(axes: Axes, records: RunRecords) -> None:
    """Mean reward of each step's rollouts, with the shares correct and in the asked format."""
    _line(axes, records.steps, "reward/mean", "mean reward", BLUE, "-")
    _line(axes, records.steps, "reward/correct_mean", "share correct", ORANGE, "--")
    _line(axes, records.steps, "reward/format_mean", "share in the format", GREEN, ":")
    axes.set_ylabel("mean over the step's samples")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _finish(axes, "Reward in training")


def draw_length(axes: Axes, records: RunRecords) -> None:
    """Mean completion length, split by correct and wrong, over the truncation rate."""
    _line(axes, records.steps, "cot/tokens_mean", "all", BLUE, "-")
    _line(axes, records.steps, "cot/tokens_correct_mean", "correct", ORANGE, "--")
    _line(axes, records.steps, "cot/tokens_wrong_mean", "wrong", GREEN, ":")
    axes.set_ylabel("completion length (tokens)")
    axes.set_ylim(bottom=0)
    steps, rates = _series(records.steps, "cot/truncated_rate")
    if steps:
        right = axes.twinx()
        right.grid(visible=False)
        right.spines["right"].set_visible(True)
        right.fill_between(steps, rates, color=GREY, alpha=0.18, linewidth=0)
        marker = "s" if len(steps) == 1 else ""
        right.plot(steps, rates, color=GREY, linewidth=1, marker=marker, markersize=3.5)
        right.set_ylim(0, 1)
        right.set_ylabel("truncated at the token cap", color=GREY)
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_zorder(right.get_zorder() + 1)  # lines before the area
        axes.patch.set_visible(False)
        # One legend for both axes: a line without data stands for the right one's.
        axes.plot([], [], color=GREY, linewidth=1, label="truncated (right)")
    _finish(axes, "Length of the chain of thought")


def draw_accuracy(axes: Axes, records: RunRecords) -> None:
    """Held-out accuracy with its interval, and the format beside it; sources where there are more.

    The base model's accuracy (before a warm start) is a horizontal line.
    """
    evaluations = records.evaluations
    steps, accuracies = _series(evaluations, "eval/accuracy")
    _, lows = _series(evaluations, "eval/accuracy_low")
    _, highs = _series(evaluations, "eval/accuracy_high")
    axes.plot(steps, accuracies, color=BLUE, marker="o", label="accuracy", zorder=3)
    if len(lows) == len(highs) == len(steps):
        # Rounding may put a bound a hair inside, and an error bar's length is not negative.
        below = np.maximum(np.subtract(accuracies, lows), 0)
        above = np.maximum(np.subtract(highs, accuracies), 0)
        axes.errorbar(
            steps, accuracies, yerr=np.stack([below, above]), fmt="none", ecolor=BLUE, capsize=4
        )
    _line(axes, evaluations, "eval/accuracy_formatted", "accuracy in the format", ORANGE, "--")
    _line(axes, evaluations, "eval/format_rate", "share in the format", GREEN, ":")
    # More sources than colours: the files have them all.
    for key, color in zip(_source_keys(evaluations), _SOURCE_COLORS, strict=False):
        _line(axes, evaluations, key, key.removeprefix("eval/accuracy/"), color, "-.")
    if records.base is not None:
        base = records.base["eval/accuracy"]
        axes.axhline(base, color=GREY, linestyle=(0, (6, 3)), linewidth=1, label="base model")
    axes.set_ylim(0, min(1.03, max(0.1, axes.get_ylim()[1])))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylabel("share of held-out answers")
    _finish(axes, f"Held-out accuracy{_interval_note(evaluations)}")


def evaluations_figure(records: RunRecords) -> Figure:
    """Evaluation score over mean length of the chain of thought, by step: a column for each
    evaluation set.

    Shaded: the intervals. Figure 7b of 'LoRA Without Regret'.
    """
    sources = [key.removeprefix("eval/accuracy") for key in _source_keys(records.evaluations)]
    columns = (sources or [""])[:_MAX_SETS]
    figure = Figure(figsize=(4.6 * len(columns) + 0.6, 6.4), layout="constrained")
    all_axes = figure.subplots(2, len(columns), squeeze=False, sharex=True)
    for column, suffix in enumerate(columns):
        top, bottom = all_axes[0][column], all_axes[1][column]
        _banded(top, records.evaluations, "accuracy", suffix, BLUE)
        base = (records.base or {}).get(f"eval/accuracy{suffix}")
        if base is not None:
            top.axhline(base, color=GREY, linestyle=(0, (6, 3)), linewidth=1)
            top.annotate("base model", (1, base), xycoords=("axes fraction", "data"), **_ABOVE)
        top.set_ylim(0, min(1.03, max(0.1, top.get_ylim()[1])))
        top.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        top.set_title(suffix.removeprefix("/") or "all problems")
        _banded(bottom, records.evaluations, "tokens", suffix, ORANGE, middle="tokens_mean")
        bottom.set_ylim(0, 1.05 * bottom.get_ylim()[1])
        bottom.set_xlabel("training step")
        bottom.xaxis.set_major_locator(_whole_steps())
    all_axes[0][0].set_ylabel("evaluation score")
    all_axes[1][0].set_ylabel("chain of thought (mean tokens)")
    figure.suptitle(f"Evaluations in training{_interval_note(records.evaluations)}", fontsize=12)
    return figure


def _banded(
    axes: Axes, evaluations: Records, name: str, suffix: str, color: str, middle: str | None = None
) -> None:
    """One number of the evaluations with its interval, as far as it was recorded."""
    low_key, high_key = f"eval/{name}_low{suffix}", f"eval/{name}_high{suffix}"
    steps, values = _series(evaluations, f"eval/{middle or name}{suffix}")
    axes.plot(steps, values, color=color, marker=_marker(steps), markersize=4, zorder=3)
    whole = [r for r in evaluations if isinstance(r.get(low_key), int | float)]
    low_steps, lows = _series(whole, low_key)
    axes.fill_between(low_steps, lows, _series(whole, high_key)[1], color=color, alpha=0.18, lw=0)


_PANELS: tuple[
    tuple[str, Callable[[Axes, RunRecords], None], Callable[[RunRecords], bool]], ...
] = (
    ("reward", draw_reward, lambda records: bool(_series(records.steps, "reward/mean")[0])),
    ("length", draw_length, lambda records: bool(_series(records.steps, "cot/tokens_mean")[0])),
    (
        "accuracy",
        draw_accuracy,
        lambda records: bool(_series(records.evaluations, "eval/accuracy")[0]),
    ),
)


def _evaluation_record(result: EvalResult) -> dict[str, Any]:
    return {"step": result.step, "confidence": result.confidence, **result.metrics()}


def _interval_note(evaluations: Records) -> str:
    levels = {record["confidence"] for record in evaluations if "confidence" in record}
    return f" ({levels.pop():.0%} intervals)" if len(levels) == 1 else ""


def _source_keys(evaluations: Records) -> list[str]:
    keys = {key for record in evaluations for key in record if key.startswith("eval/accuracy/")}
    return sorted(keys)


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have a number under the key."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def _line(axes: Axes, records: Records, key: str, label: str, color: str, style: str) -> None:
    steps, values = _series(records, key)
    if not steps:
        return
    if len(steps) < _SMOOTH_FROM:
        axes.plot(
            steps, values, style, color=color, label=label, marker=_marker(steps), markersize=3.5
        )
        return
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, _moving_mean(values, len(values) // 20), style, color=color, label=label)


def _marker(steps: Sequence[int]) -> str:
    """Markers where steps are few: one step alone draws no line."""
    return "o" if len(steps) <= 30 else ""


def _moving_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean over up to `reach` steps on either side; fewer at the ends."""
    return [
        float(np.mean(values[max(0, index - reach) : index + reach + 1]))
        for index in range(len(values))
    ]


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(_whole_steps())
    # Below the axes, where it covers nothing.
    _, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) == 4 else 3
    placement: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
    axes.legend(ncols=columns, **placement)


def _whole_steps() -> MaxNLocator:
    return MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, facecolor="white")
    return path
