"""Figures of a study's results table: 1 to 8 after the article, 9 on variants of LoRA.

One function draws each figure, from rows onto axes. Points are means over seeds with 95 % intervals
(Student's t), or the range of the two seeds if there are two; colors are Okabe and Ito's, with
different line styles and markers. A figure without data is not drawn.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rl_lora.errors import UserError
from rl_lora.report.run_figures import STYLE
from rl_lora.studies.config import Condition
from rl_lora.studies.rate_sweep import mean_interval, sweep
from rl_lora.studies.results import GOALS, condition_of, condition_text, results_by_rate

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
_STYLE = STYLE | {"legend.fontsize": 8}
Row = Mapping[str, Any]


# --- data and style -------------------------------------------------------------------------------


def order(condition: Condition) -> tuple[object, ...]:
    """Sort key: adapters by layers, rank and variant (plain LoRA first), full fine-tuning last."""
    variant = "" if is_plain(condition) else condition.variant
    return (
        condition.mode == "full",
        condition.layers,
        condition.rank,
        condition.batch_size,
        variant,
        condition.lora_plus_ratio,
    )


def is_plain(condition: Condition) -> bool:
    """Whether it is plain LoRA, as in the article, or full fine-tuning."""
    return condition.variant == "lora" and condition.lora_plus_ratio == 1


def style_of(number: int) -> dict[str, Any]:
    """Color, marker and line style of the number-th curve."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": LINES[number // len(COLORS) % len(LINES)] if number >= len(COLORS) else "-",
    }


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the mean's 95 % interval; of two values their range, as Student's t would
    reach 12.7 standard errors."""
    if len(values) == 2:
        return sum(values) / 2, min(values), max(values)
    return mean_interval(values)


def best_rates(rows: Sequence[Row]) -> dict[Condition, float]:
    """condition -> the rate with the best mean result, among rates without a failed seed."""
    arm = rows[0]["arm"]
    found: dict[Condition, float] = {}
    for condition, by_rate in results_by_rate(rows).items():
        result = sweep(by_rate, GOALS[arm], tolerance=0.0, num_resamples=1)
        if result is not None:
            found[condition] = result.best_rate
    return found


def curves_of(rows: Sequence[Row], name: str, condition: Condition, lr: float) -> dict[int, Any]:
    """seed -> (steps, values) of a curve for one condition and rate."""
    return {
        int(row["seed"]): (row["curves"][name]["step"], row["curves"][name]["value"])
        for row in rows
        if condition_of(row) == condition and row["lr"] == lr and name in row["curves"]
    }


def mean_curve(
    by_seed: Mapping[int, Any],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """(steps, mean, low, high) over seeds, at the steps that all seeds have."""
    steps = sorted(set.intersection(*(set(steps) for steps, _ in by_seed.values())))
    tables = [dict(zip(steps_s, values, strict=True)) for steps_s, values in by_seed.values()]
    triples = [spread([table[step] for table in tables]) for step in steps]
    mean, low, high = (
        (list(column) for column in zip(*triples, strict=True)) if triples else ([], [], [])
    )
    return list(steps), mean, low, high


def envelope(
    rows: Sequence[Row], name: str, condition: Condition
) -> tuple[list[float], list[float], list[float], list[float]]:
    """(steps, lowest mean over the rates, low, high): each point at the best rate for that many
    steps, as in the article's figure 1."""
    best: dict[float, tuple[float, float, float]] = {}
    for lr in sorted({row["lr"] for row in rows if condition_of(row) == condition}):
        by_seed = curves_of(rows, name, condition, lr)
        if not by_seed:
            continue
        for step, mean, low, high in zip(*mean_curve(by_seed), strict=True):
            if math.isfinite(mean) and (step not in best or mean < best[step][0]):
                best[step] = (mean, low, high)
    steps = sorted(best)
    return steps, *([best[step][k] for step in steps] for k in range(3))  # type: ignore[return-value]


def _plot(axes: Axes, curve: Any, number: int, label: str) -> None:
    xs, mean, low, high = curve
    style = style_of(number)
    axes.plot(xs, mean, label=label, markersize=4, linewidth=1.4, **style)
    has_band = np.isfinite(low) & np.isfinite(high)  # a single seed has none
    bounds = np.where(has_band, low, mean), np.where(has_band, high, mean)
    axes.fill_between(xs, *bounds, color=style["color"], alpha=0.15, linewidth=0)


def _by_rate(axes: Axes, rows: Sequence[Row]) -> None:
    """Result against rate, a curve per condition."""
    conditions = sorted(results_by_rate(rows), key=order)
    for number, condition in enumerate(conditions):
        by_rate = results_by_rate(rows)[condition]
        points = [
            (rate, *spread([v for v in by_seed.values() if math.isfinite(v)]))
            for rate, by_seed in sorted(by_rate.items())
            if any(math.isfinite(v) for v in by_seed.values())
        ]
        if points:
            _plot(axes, tuple(zip(*points, strict=True)), number, condition_text(condition))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")


# --- the figures ----------------------------------------------------------------------------------


def draw_figure_1(axes: Axes, rows: Sequence[Row]) -> None:
    """Test loss against log steps, a curve per rank, each point at the best rate."""
    for number, condition in enumerate(sorted(results_by_rate(rows), key=order)):
        _plot(axes, envelope(rows, "test_nll", condition), number, condition_text(condition))
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("step")
    axes.set_ylabel("test loss (nats per token)")
    axes.set_title("1  Loss by rank, lowest over learning rates")


def draw_figure_2(axes: Axes, rows: Sequence[Row]) -> None:
    """Final test loss against learning rate, a curve per rank."""
    _by_rate(axes, rows)
    losses = [row["result"] for row in rows if row["result"] is not None]
    if losses:  # diverged rates would flatten the rest
        axes.set_ylim(min(losses) - 0.05, float(np.quantile(losses, 0.9)) + 0.1)
    axes.set_ylabel("final test loss (nats per token)")
    axes.set_title("2  Final loss by learning rate")


def draw_figure_3(axes: Axes, rows: Sequence[Row]) -> None:
    """Loss at the best rate against batch size, a curve per rank."""
    rates = best_rates(rows)
    keys = {condition._replace(batch_size=0) for condition in rates}
    for number, key in enumerate(sorted(keys, key=order)):
        points = []
        same = (c for c in rates if c._replace(batch_size=0) == key)
        for condition in sorted(same, key=lambda c: c.batch_size):
            by_seed = results_by_rate(rows)[condition][rates[condition]]
            points.append((condition.batch_size, *spread(list(by_seed.values()))))
        _plot(axes, tuple(zip(*points, strict=True)), number, condition_text(key))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch size (sequences)")
    axes.set_ylabel("final test loss (nats per token)")
    axes.set_title("3  Loss by batch size, at the best rate")


def draw_figure_4(axes: Axes, rows: Sequence[Row]) -> None:
    """Result at the best rate by layers and rank."""
    _bars(axes, rows, condition_text)
    axes.set_title("4  Layers with an adapter, at the best rate")


def draw_figure_9(axes: Axes, rows: Sequence[Row]) -> None:
    """Result at the best rate, and that rate, for each variant of LoRA."""
    rates = best_rates(rows)
    _bars(axes, rows, lambda c: f"{condition_text(c)}\nrate {rates[c]:.2g}")
    axes.set_title("9  Variants of LoRA, each at its best rate")


def _bars(axes: Axes, rows: Sequence[Row], label: Callable[[Condition], str]) -> None:
    """Mean with interval at the best rate, a point per condition."""
    rates = best_rates(rows)
    conditions = sorted(rates, key=order)
    for number, condition in enumerate(conditions):
        by_seed = results_by_rate(rows)[condition][rates[condition]]
        mean, low, high = spread(list(by_seed.values()))
        bounds = None if math.isinf(low) else [[mean - low], [high - mean]]
        style = style_of(number)
        axes.errorbar(
            [number], [mean], yerr=bounds, fmt=style["marker"], color=style["color"], capsize=4
        )
    axes.set_xticks(range(len(conditions)), [label(c) for c in conditions], rotation=40, ha="right")
    axes.set_ylabel(_result_name(rows))


def draw_figure_5(axes: Axes, rows: Sequence[Row]) -> None:
    """Result against learning rate, a curve each for attention, MLP and all."""
    _by_rate(axes, rows)
    axes.set_ylabel(_result_name(rows))
    axes.set_title("5  Layers with an adapter, by learning rate")


def draw_figure_6(axes: Axes, rows: Sequence[Row]) -> None:
    """RL: final reward against learning rate, a curve per rank."""
    _by_rate(axes, rows)
    axes.set_ylabel("mean reward of the last steps")
    axes.set_title("6  RL: final reward by learning rate")


def draw_figure_7(axes: Axes, rows: Sequence[Row]) -> None:
    """RL: reward by step, a curve per rank at its best rate."""
    _at_best(axes, rows, "reward")
    axes.set_ylabel("mean reward")
    axes.set_title("7  RL: learning curves at the best rate")


def draw_figure_7b(axes: Axes, rows: Sequence[Row]) -> None:
    """RL: length of the chain of thought by step, a curve per rank at its best rate."""
    _at_best(axes, rows, "tokens")
    axes.set_ylabel("completion length (tokens)")
    axes.set_title("7b  RL: length of the chain of thought")


def draw_figure_8(axes: Axes, rows: Sequence[Row]) -> None:
    """Early loss of each rank minus that of the largest rank, at one rate, paired by seed."""
    lora = _plain_rows(rows)
    shared = _shared_rate(lora)
    conditions = sorted({condition_of(row) for row in lora if row["lr"] == shared}, key=order)
    reference = curves_of(lora, "loss", conditions[-1], shared)
    for number, condition in enumerate(conditions[:-1]):
        by_seed = {}
        for seed, (steps, values) in curves_of(lora, "loss", condition, shared).items():
            if seed in reference and list(reference[seed][0]) == list(steps):
                gaps = np.subtract(values, reference[seed][1])
                by_seed[seed] = (steps, gaps.tolist())
        if by_seed:
            label = f"{condition_text(condition)} - {condition_text(conditions[-1])}"
            _plot(axes, mean_curve(by_seed), number, label)
    axes.axhline(0, color="#666666", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_xscale("log")
    axes.set_ylabel("difference of training losses (nats per token)")
    axes.set_title(f"8  Ranks at one rate ({shared:g}), early steps")


def _at_best(axes: Axes, rows: Sequence[Row], name: str) -> None:
    for number, (condition, lr) in enumerate(
        sorted(best_rates(rows).items(), key=lambda p: order(p[0]))
    ):
        by_seed = curves_of(rows, name, condition, lr)
        if by_seed:
            _plot(axes, mean_curve(by_seed), number, f"{condition_text(condition)}, rate {lr:.2g}")
    axes.set_xlabel("step")


def _shared_rate(rows: Sequence[Row]) -> float:
    """The rate that most conditions ran at; the lowest on ties."""
    rates: dict[float, set[Condition]] = {}
    for row in rows:
        rates.setdefault(row["lr"], set()).add(condition_of(row))
    return min(rates, key=lambda rate: (-len(rates[rate]), rate))


def _result_name(rows: Sequence[Row]) -> str:
    return (
        "final test loss (nats per token)"
        if rows[0]["arm"] == "sft"
        else "mean reward of the last steps"
    )


def _num(rows: Sequence[Row], key: str) -> int:
    return len({row[key] for row in rows})


def _is_sft(rows: Sequence[Row]) -> bool:
    return bool(rows[0]["arm"] == "sft")


def _is_rl(rows: Sequence[Row]) -> bool:
    return not _is_sft(rows)


def _plain_rows(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["mode"] == "lora" and is_plain(condition_of(row))]


def _has_ranks(rows: Sequence[Row]) -> bool:
    return len({condition_of(row) for row in _plain_rows(rows)}) > 1


def _has_variants(rows: Sequence[Row]) -> bool:
    return not all(is_plain(condition_of(row)) for row in rows)


Draw = Callable[[Axes, Sequence[Row]], None]
Has = Callable[[Sequence[Row]], bool]
# name -> (function, whether the rows have what it takes)
FIGURES: dict[str, tuple[Draw, Has]] = {
    "figure_1": (draw_figure_1, _is_sft),
    "figure_2": (draw_figure_2, lambda rows: _is_sft(rows) and _num(rows, "lr") > 1),
    "figure_3": (draw_figure_3, lambda rows: _is_sft(rows) and _num(rows, "batch_size") > 1),
    "figure_4": (draw_figure_4, lambda rows: _num(rows, "layers") > 1),
    "figure_5": (draw_figure_5, lambda rows: _num(rows, "layers") > 1 and _num(rows, "lr") > 1),
    "figure_6": (draw_figure_6, lambda rows: _is_rl(rows) and _num(rows, "lr") > 1),
    "figure_7": (draw_figure_7, _is_rl),
    "figure_7b": (draw_figure_7b, _is_rl),
    "figure_8": (draw_figure_8, lambda rows: _is_sft(rows) and _has_ranks(rows)),
    "figure_9": (draw_figure_9, _has_variants),
}


def draw_study(
    rows: Sequence[Row], folder: Path, *, suffixes: Sequence[str] = ("png",)
) -> list[Path]:
    """Writes every figure that the rows have data for; returns the files.

    Args:
        rows: a study's table, of one arm.
        folder: where to, made if needed.
        suffixes: png, svg or both.

    Raises:
        UserError: the table is empty, or has no cell with a result.
    """
    if not rows or all(row["result"] is None for row in rows):
        raise UserError("the study has no finished cell yet: nothing to draw")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(_STYLE):
        for (name, (draw, is_there)), suffix in itertools.product(FIGURES.items(), suffixes):
            if not is_there(rows):
                continue
            figure = Figure(figsize=(6.4, 4.8), layout="constrained")
            axes = figure.add_subplot()
            draw(axes, rows)
            if _num(rows, "seed") == 2:
                axes.set_xlabel(f"{axes.get_xlabel()}   (bands: the two seeds)".strip())
            if axes.get_legend_handles_labels()[0]:
                axes.legend(ncols=2)
            paths.append(folder / f"{name}.{suffix}")
            figure.savefig(paths[-1], dpi=150, facecolor="white")
    return paths
