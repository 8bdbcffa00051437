"""The benchmark's figure: seconds by phase, and the ratios against their baseline."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

PHASES = {"sample": "#0072B2", "score": "#E69F00", "learn": "#009E73", "publish": "#CC79A7"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG; bars of one step for each arm, a dot for each ratio."""
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
    left.set_title("TRL's generation holds its scoring", fontsize=9, color="0.4")
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
    right.set_xlabel("ratio (dot: median, bar: least to greatest)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
