"""A run's figures, from metrics.jsonl alone: reward, completion length, held-out accuracy.

Every figure is drawn from what is there: one step, missing keys and resumed runs included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rl_lora import jsonl
from rl_lora.errors import UserError
from rl_lora.runlog import METRICS_FILE

FOLDER = "figures"

# Okabe and Ito's palette, distinct for all common kinds of colour vision; line styles differ too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"

Records = Sequence[Mapping[str, Any]]


def draw_figures(run_folder: Path) -> list[Path]:
    """Writes RUN/figures/{reward,length,accuracy,overview}.png; returns those that were drawn.

    A figure whose numbers were never recorded is not drawn.

    Raises:
        UserError: the run has no metrics.jsonl, or an empty one.
    """
    metrics_path = run_folder / METRICS_FILE
    records = jsonl.read_lines(metrics_path) if metrics_path.is_file() else []
    if not records:
        raise UserError(f"{metrics_path} holds no step; figures are drawn after a run has started")
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    panels = [(name, draw) for name, key, draw in _PANELS if _series(records, key)[0]]
    paths = []
    for name, draw in panels:
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        draw(figure.add_subplot(), records)
        paths.append(_save(figure, folder / f"{name}.png"))
    if panels:
        figure = Figure(figsize=(5.0 * len(panels), 3.9), layout="constrained")
        for axes, (_, draw) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            draw(axes, records)
        paths.append(_save(figure, folder / "overview.png"))
    return paths


def draw_reward(axes: Axes, records: Records) -> None:
    """Mean reward of each step's rollouts, with the shares correct and formatted."""
    _line(axes, records, "reward/mean", "mean reward", BLUE, "-")
    _line(axes, records, "reward/correct_mean", "share correct", ORANGE, "--")
    _line(axes, records, "reward/format_mean", "share in the format", GREEN, ":")
    axes.set_ylabel("mean over the step's samples")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _finish(axes, "Reward in training")


def draw_length(axes: Axes, records: Records) -> None:
    """Mean completion length, split by correct and wrong, with the truncation rate."""
    _line(axes, records, "cot/tokens_mean", "all", BLUE, "-")
    _line(axes, records, "cot/tokens_correct_mean", "correct", ORANGE, "--")
    _line(axes, records, "cot/tokens_wrong_mean", "wrong", GREEN, ":")
    axes.set_ylabel("completion length (tokens)")
    axes.set_ylim(bottom=0)
    steps, rates = _series(records, "cot/truncated_rate")
    if steps:
        right = axes.twinx()
        right.fill_between(steps, rates, color=GREY, alpha=0.2, linewidth=0)
        right.plot(steps, rates, color=GREY, linewidth=1, label="truncated (right axis)")
        right.set_ylim(0, 1)
        right.set_ylabel("truncated at the token cap")
        right.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(axes, "Length of the chain of thought")


def draw_accuracy(axes: Axes, records: Records) -> None:
    """Held-out accuracy with its interval."""
    steps, accuracies = _series(records, "eval/accuracy")
    lows = [r.get("eval/accuracy_low") for r in records if r["step"] in steps]
    del lows
    axes.plot(steps, accuracies, color=BLUE, marker="o", label="accuracy")
    axes.set_ylabel("held-out accuracy")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(axes, "Held-out accuracy")


_PANELS = (
    ("reward", "reward/mean", draw_reward),
    ("length", "cot/tokens_mean", draw_length),
    ("accuracy", "eval/accuracy", draw_accuracy),
)


def _series(records: Records, key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have the key with a finite number."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def _line(axes: Axes, records: Records, key: str, label: str, color: str, style: str) -> None:
    steps, values = _series(records, key)
    if steps:
        marker = "o" if len(steps) <= 30 else None
        axes.plot(steps, values, style, color=color, label=label, marker=marker, markersize=3.5)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=150, facecolor="white")
    return path
