"""Figures of a study's results table: 1 to 8 after the article, 9 on variants of LoRA.

Points are means over seeds with 95 % intervals (Student's t), or the range of the two seeds if
there are two; colors are Okabe and Ito's, with different line styles and markers. A figure without
data is not drawn.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rl_lora.errors import UserError
from rl_lora.report.run_figures import STYLE
from rl_lora.storage.jsonl import write_bytes_atomically
from rl_lora.studies.config import Condition
from rl_lora.studies.rate_sweep import mean_interval, sweep
from rl_lora.studies.results import GOALS, condition_of, condition_text, results_by_rate

_LOOK = cycler(
    color=("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),
    marker=("o", "s", "^", "D", "v", "P", "X"),
)
_STYLE = STYLE | {
    "legend.fontsize": 8,
    "axes.prop_cycle": cycler(linestyle=("-", "--", "-.", ":")) * _LOOK,
}
Row = Mapping[str, Any]
Points = Sequence[tuple[float, float, float, float]]  # (x, mean, low, high)


# --- data -----------------------------------------------------------------------------------------


def order(condition: Condition) -> tuple[object, ...]:
    """Sort key: adapters by layers, rank and variant (plain LoRA first), full fine-tuning last."""
    return (
        condition.mode == "full",
        condition.layers,
        condition.rank,
        condition.batch_size,
        "" if is_plain(condition) else condition.variant,
        condition.lora_plus_ratio,
    )


def is_plain(condition: Condition) -> bool:
    """Whether it is plain LoRA, as in the article, or full fine-tuning."""
    return condition.variant == "lora" and condition.lora_plus_ratio == 1


def spread(values: Collection[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean's 95 % interval; of two values their range, as Student's t would
    reach 12.7 standard errors."""
    if len(values) == 2:
        return sum(values) / 2, min(values), max(values)
    return mean_interval([*values])


def best_results(rows: Sequence[Row]) -> dict[Condition, tuple[float, list[float]]]:
    """condition -> (rate, results) of the rate with the best mean, among those without a failed
    seed; in `order`."""
    found = {}
    for condition, by_rate in _in_order(rows):
        best = sweep(by_rate, GOALS[rows[0]["arm"]])
        if best is not None:
            found[condition] = best.best_rate, [*by_rate[best.best_rate].values()]
    return found


def _in_order(rows: Sequence[Row]) -> list[tuple[Condition, dict[float, dict[int, float]]]]:
    return sorted(results_by_rate(rows).items(), key=lambda item: order(item[0]))


def curves_of(rows: Sequence[Row], name: str, condition: Condition, lr: float) -> dict[int, Any]:
    """seed -> (steps, values) of a curve for one condition and rate."""
    return {
        int(row["seed"]): (row["curves"][name]["step"], row["curves"][name]["value"])
        for row in rows
        if condition_of(row) == condition and row["lr"] == lr and name in row["curves"]
    }


def mean_curve(by_seed: Mapping[int, Any]) -> Points:
    """The mean over seeds, at the steps that all seeds have."""
    tables = [dict(zip(steps, values, strict=True)) for steps, values in by_seed.values()]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    return [(step, *spread([table[step] for table in tables])) for step in steps]


def envelope(curves: Iterable[Points]) -> Points:
    """Each step's point on the lowest of the curves, as in the article's figure 1."""
    points = [point for curve in curves for point in curve if math.isfinite(point[1])]
    lowest = {point[0]: point for point in sorted(points, key=lambda p: -p[1])}  # the last one wins
    return [lowest[step] for step in sorted(lowest)]


# --- drawing --------------------------------------------------------------------------------------


def _plot(axes: Axes, points: Points, label: str) -> None:
    if not points:
        return
    xs, mean, low, high = np.array(points).T
    (line,) = axes.plot(xs, mean, label=label, markersize=4, linewidth=1.4)
    has_band = np.isfinite(low) & np.isfinite(high)  # a single seed has none
    bounds = np.where(has_band, low, mean), np.where(has_band, high, mean)
    axes.fill_between(xs, *bounds, color=line.get_color(), alpha=0.15, linewidth=0)


def _lowest_over_rates(axes: Axes, rows: Sequence[Row]) -> None:
    for condition, by_rate in _in_order(rows):
        curves = (mean_curve(curves_of(rows, "test_nll", condition, lr)) for lr in by_rate)
        _plot(axes, envelope(curves), condition_text(condition))
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("step")


def _by_rate(axes: Axes, rows: Sequence[Row]) -> None:
    for condition, by_rate in _in_order(rows):
        finite = {
            rate: [value for value in by_rate[rate].values() if math.isfinite(value)]
            for rate in sorted(by_rate)
        }
        points = [(rate, *spread(values)) for rate, values in finite.items() if values]
        _plot(axes, points, condition_text(condition))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    if rows[0]["arm"] == "sft":  # diverged rates would flatten the rest
        losses = [row["result"] for row in rows if row["result"] is not None]
        axes.set_ylim(min(losses) - 0.05, float(np.quantile(losses, 0.9)) + 0.1)


def _by_batch_size(axes: Axes, rows: Sequence[Row]) -> None:
    best = best_results(rows)
    curves: dict[Condition, list[Any]] = {}
    for condition in sorted(best, key=lambda c: c.batch_size):
        point = (condition.batch_size, *spread(best[condition][1]))
        curves.setdefault(condition._replace(batch_size=0), []).append(point)
    for condition in sorted(curves, key=order):
        _plot(axes, curves[condition], condition_text(condition))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch size (sequences)")


def _at_best(axes: Axes, rows: Sequence[Row], name: str) -> None:
    for condition, (lr, _) in best_results(rows).items():
        points = mean_curve(curves_of(rows, name, condition, lr))
        _plot(axes, points, f"{condition_text(condition)}, rate {lr:.2g}")
    axes.set_xlabel("step")


def _bars(axes: Axes, rows: Sequence[Row], label: str) -> None:
    """Mean with interval at the best rate, a point per condition."""
    best = best_results(rows)
    for number, (_, values) in enumerate(best.values()):
        mean, low, high = spread(values)
        bounds = None if math.isinf(low) else [[mean - low], [high - mean]]
        axes.errorbar([number], [mean], yerr=bounds, linestyle="none", capsize=4)
    labels = [label.format(condition_text(c), rate) for c, (rate, _) in best.items()]
    axes.set_xticks(range(len(best)), labels, rotation=40, ha="right")


def _variants(axes: Axes, rows: Sequence[Row]) -> None:
    if not all(is_plain(condition_of(row)) for row in rows):
        _bars(axes, rows, "{}\nrate {:.2g}")


def _rank_differences(axes: Axes, rows: Sequence[Row]) -> None:
    """Paired by seed, at the rate that most conditions ran at (the lowest on ties)."""
    lora = [row for row in rows if row["mode"] == "lora" and is_plain(condition_of(row))]
    if len({condition_of(row) for row in lora}) < 2:
        return
    counts = Counter(rate for rate, _ in {(row["lr"], condition_of(row)) for row in lora})
    shared = min(counts, key=lambda rate: (-counts[rate], rate))
    *others, largest = sorted({condition_of(r) for r in lora if r["lr"] == shared}, key=order)
    reference = curves_of(lora, "loss", largest, shared)
    for condition in others:
        by_seed = {
            seed: (steps, np.subtract(values, reference[seed][1]).tolist())
            for seed, (steps, values) in curves_of(lora, "loss", condition, shared).items()
            if seed in reference and reference[seed][0] == steps
        }
        label = f"{condition_text(condition)} - {condition_text(largest)}"
        _plot(axes, mean_curve(by_seed), label)
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("step")
    axes.set_title(f"8  Ranks at one rate ({shared:g}), early steps")


# --- the figures ----------------------------------------------------------------------------------


class StudyFigure(NamedTuple):
    """One figure. Example: StudyFigure(_by_rate, "6  RL: ...", arm="rl", varies=("lr",))."""

    draw: Callable[[Axes, Sequence[Row]], None]
    title: str
    y_title: str = ""  # "": that of the result
    arm: str = ""  # "rl" or "sft"; "": either
    varies: tuple[str, ...] = ()  # columns in which the rows must differ


FIGURES = {
    "figure_1": StudyFigure(
        _lowest_over_rates,
        "1  Loss by rank, lowest over learning rates",
        "test loss (nats per token)",
    ),
    "figure_2": StudyFigure(_by_rate, "2  Final loss by learning rate", arm="sft", varies=("lr",)),
    "figure_3": StudyFigure(
        _by_batch_size, "3  Loss by batch size, at the best rate", arm="sft", varies=("batch_size",)
    ),
    "figure_4": StudyFigure(
        partial(_bars, label="{}"),
        "4  Layers with an adapter, at the best rate",
        varies=("layers",),
    ),
    "figure_5": StudyFigure(
        _by_rate, "5  Layers with an adapter, by learning rate", varies=("layers", "lr")
    ),
    "figure_6": StudyFigure(
        _by_rate, "6  RL: final reward by learning rate", arm="rl", varies=("lr",)
    ),
    "figure_7": StudyFigure(
        partial(_at_best, name="reward"), "7  RL: learning curves at the best rate", "mean reward"
    ),
    "figure_7b": StudyFigure(
        partial(_at_best, name="tokens"),
        "7b  RL: length of the chain of thought",
        "completion length (tokens)",
    ),
    "figure_8": StudyFigure(
        _rank_differences,
        "8  Ranks at one rate",
        "difference of training losses (nats per token)",
        arm="sft",
    ),
    "figure_9": StudyFigure(_variants, "9  Variants of LoRA, each at its best rate"),
}


def draw_study(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes every figure that the rows have data for to FOLDER/figure_*.png; returns the files.

    Raises:
        UserError: the table, which is of one arm, is empty or has no cell with a result.
    """
    if not rows or all(row["result"] is None for row in rows):
        raise UserError("the study has no finished cell yet: nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    num = {key: len({row[key] for row in rows}) for key in ("lr", "batch_size", "layers", "seed")}
    arm = rows[0]["arm"]
    result = "final test loss (nats per token)" if arm == "sft" else "mean reward of the last steps"
    paths = []
    with matplotlib.rc_context(_STYLE):
        for name, (draw, title, y_title, only_arm, varies) in FIGURES.items():
            figure = Figure(figsize=(6.4, 4.8), layout="constrained")
            axes = figure.add_subplot()
            axes.set(title=title, ylabel=y_title or result)
            if only_arm in ("", arm) and all(num[key] > 1 for key in varies):
                draw(axes, rows)
            if not axes.has_data():
                continue
            if num["seed"] == 2:
                axes.set_xlabel(f"{axes.get_xlabel()}   (bands: the two seeds)".strip())
            if axes.get_legend_handles_labels()[0]:
                axes.legend(ncols=2)
            paths.append(folder / f"{name}.png")
            content = io.BytesIO()
            figure.savefig(content, dpi=150, facecolor="white")
            write_bytes_atomically(paths[-1], content.getvalue())
    return paths
