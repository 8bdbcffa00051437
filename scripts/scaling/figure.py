"""The figure of the curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from scaling.curve import TODAY, Point

COLOURS = ("#111111", "#b0b0b0", "#7fb3d5", "#2e86c1", "#1a5276")


def draw(own: Sequence[Point], grown: Sequence[Point], path: Path) -> None:
    """Left: seconds of a step of the job's own batch. Right: completions a second and GPU."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, colour in zip(_names(own), COLOURS, strict=True):
        style = {"color": colour, "marker": "o", "markersize": 3, "label": name}
        mine = [point for point in own if point.design == name]
        left.plot([p.num_gpus for p in mine], [p.step_s for p in mine], **style)
        mine = [point for point in grown if point.design == name]
        rates = [3600 * p.num_completions / p.step_s / p.num_gpus for p in mine]
        right.plot([p.num_gpus for p in mine], rates, **style)
    num = own[0].num_completions
    left.set(
        yscale="log", ylabel="seconds of a step", title=f"{num:,} completions a step (simulated)"
    )
    right.set(
        ylim=(0, None),
        ylabel="completions an hour and GPU",
        title=f"from {num // 16} GPUs on 16 a GPU (simulated)",
    )
    for axes, points in ((left, own), (right, grown)):
        axes.set_xscale("log", base=2)
        ticks = [4**power for power in range(7) if 4**power <= points[-1].num_gpus]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xlabel("GPUs")
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _names(own: Sequence[Point]) -> list[str]:
    """Today's design, then the others as they come."""
    return list(dict.fromkeys([TODAY, *(point.design for point in own)]))
