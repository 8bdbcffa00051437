"""The benchmark's figures: seconds by phase and ratios; how a sweep grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.growth import SWEPT, Line, Power

ARMS = {"learner": ("LoRA", "#0072B2", "o"), "full": ("full fine-tuning", "#D55E00", "s")}
PHASES = {"sample": "#0072B2", "score": "#E69F00", "learn": "#009E73", "publish": "#CC79A7"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG: one bar per arm's step, one dot per ratio."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), width_ratios=[1.2, 1])
    arms = [name for name in ("ours", "trl") if name in result["answers"]]
    labels = {"ours": "rl_lora", "trl": "TRL + PEFT"}
    for row, name in enumerate(arms):
        answers = result["answers"][name]
        left_edge = 0.0
        for phase, colour in PHASES.items():
            key = "generated" if name == "trl" and phase == "sample" else phase
            values = [a[key] for a in answers if key in a]
            if values:
                width = median(values)
                legend = phase if row == 0 else None
                left.barh(row, width, left=left_edge, color=colour, label=legend)
                left_edge += width
        left.text(left_edge, row, f" {left_edge:.1f} s", va="center")
    left.set_yticks(range(len(arms)), [labels[name] for name in arms])
    left.invert_yaxis()
    left.set_xlabel("seconds of one step (medians)")
    left.margins(x=0.15)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, frameon=False)
    left.set_title("TRL's generation includes scoring", fontsize=9, color="0.4")
    names = list(result["ratios"])
    for row, name in enumerate(names):
        low, high = result["spread"][name]
        value = result["ratios"][name]
        right.plot([low, high], [row, row], color="#0072B2", lw=3, alpha=0.4)
        right.plot(value, row, "o", color="#0072B2")
        right.annotate(f"{value:.3g}", (value, row), (6, 5), textcoords="offset points")
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set_xscale("log")
    right.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    right.minorticks_off()
    right.axvline(1, color="0.8", lw=1, zorder=0)
    right.margins(x=0.2, y=0.12)
    right.set_xlabel("ratio (dot: median, bar: minimum to maximum)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def draw_sweep(
    kind: str, rows: Sequence[dict[str, Any]], found: Mapping[str, Power | Line], path: Path
) -> None:
    """Writes a PNG: time, products and memory by what was swept, with the fits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    products = "mflop_per_token" if kind in ("ranks", "layers") else "gflop"
    panels = {
        "s": "learning, seconds",
        products: "products, GFLOP" if products == "gflop" else "products, MFLOP a token",
        "memory_mb": "peak memory, MiB",
    }
    figure, all_axes = pyplot.subplots(1, 3, figsize=(12, 3.8))
    for axes, (quantity, title) in zip(all_axes, panels.items(), strict=True):
        for arm in ARMS:
            _draw_arm(axes, kind, rows, f"{arm}_{quantity}", found.get(f"{arm}_{quantity}"))
        _finish(axes, kind, rows)
        axes.set_title(title, fontsize=10)
        if kind in ("samples", "tokens"):
            axes.set_yscale("log")  # a power law is a straight line
            axes.margins(y=0.3)
        else:
            axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_arm(
    axes: Any, kind: str, rows: Sequence[dict[str, Any]], name: str, fit: Power | Line | None
) -> None:
    """One arm's points and its fitted curve."""
    label, colour, marker = ARMS[name.split("_")[0]]
    ys = [row[name] for row in rows]
    if fit is None:
        axes.plot(range(len(rows)), ys, marker, color=colour, label=label)
        return
    xs = [row[SWEPT[kind]] for row in rows]
    axes.plot(xs, ys, marker, color=colour, label=f"{label}: {fit.text()}")
    curve = np.geomspace(min(xs), max(xs), 100)
    axes.plot(curve, [fit.at(float(x)) for x in curve], color=colour, lw=1, alpha=0.6)


def _finish(axes: Any, kind: str, rows: Sequence[dict[str, Any]]) -> None:
    """Labels the axis of what was swept, with its values as ticks."""
    xs = [row[SWEPT[kind]] for row in rows]
    if kind == "layers":
        axes.set_xticks(range(len(xs)), xs)
        axes.set_xlim(-0.5, len(xs) - 0.5)
    else:
        axes.set_xscale("log")
        axes.set_xticks(xs, [str(x) for x in xs])
        axes.minorticks_off()
    axes.set_xlabel(SWEPT[kind])
    axes.spines[["top", "right"]].set_visible(False)
