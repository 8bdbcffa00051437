"""A run's figures as PNG files: the report's own figures, drawn with matplotlib.

They are drawn from whatever the records have: one step, missing numbers and resumed runs included.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rl_lora.errors import UserError
from rl_lora.evaluation.scores import EvaluationScores
from rl_lora.report import blocks
from rl_lora.report.blocks import LIGHT, Trace
from rl_lora.report.evaluation_figures import evaluation_figure, scores_by_step
from rl_lora.report.figures import length_figure, reward_figure
from rl_lora.report.records import RunRecord, read_run

FOLDER = "figures"

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
_MAX_SETS = 4  # columns of evaluations.png; the report has more
_NOTE_CHARS = 80  # of a line of a figure's note
_LINE_STYLES: dict[str, Any] = {
    "solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (6, 3))
}  # fmt: skip


def draw_figures(run_folder: Path) -> list[Path]:
    """Writes RUN/figures/{reward,length,accuracy,evaluations,overview}.png; returns those drawn.

    A figure whose numbers were never recorded is not drawn. overview.png shows reward, length and
    accuracy side by side; evaluations.png needs two evaluations.

    Raises:
        UserError: the run has recorded neither a step nor an evaluation, or a record is damaged.
    """
    run = read_run(run_folder)
    figures = {
        "reward": reward_figure([run]),
        "length": length_figure([run]),
        "accuracy": evaluation_figure([run], ""),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    if not run.steps and not drawn:
        raise UserError(f"{run_folder} has no step and no evaluation yet: nothing to draw")
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, figure in drawn.items():
            sheet = Figure(figsize=(6.4, 5.0), layout="constrained")
            draw(figure, sheet)
            paths.append(_save(sheet, folder / f"{name}.png"))
        if len(run.evaluations_of("")) > 1:
            paths.append(_save(evaluations_sheet(run), folder / "evaluations.png"))
        if drawn:
            sheet = Figure(figsize=(5.2 * len(drawn), 5.0), layout="constrained")
            parts = sheet.subfigures(1, len(drawn), squeeze=False)[0]
            for part, figure in zip(parts, drawn.values(), strict=True):
                draw(figure, part)
            paths.append(_save(sheet, folder / "overview.png"))
    return paths


def draw(figure: blocks.Figure, sheet: Figure | SubFigure) -> None:
    """Draws the lines, bands and error bars of a report's figure, in one or two panels."""
    forms = [figure.layout[key] for key in ("yaxis", "yaxis2") if key in figure.layout]
    heights = [2, 1][: len(forms)]
    panels = sheet.subplots(len(forms), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for trace in figure.data:
        _draw_trace(panels[1 if trace["yaxis"] == "y2" else 0], trace)
    for axes, form in zip(panels, forms, strict=True):
        axes.set_ylabel(form["title"]["text"])
        if "range" in form:
            axes.set_ylim(form["range"])
        elif form.get("rangemode") == "tozero":
            axes.set_ylim(min(0.0, axes.dataLim.ymin), 1.05 * axes.dataLim.ymax or 1)
        if form.get("tickformat", "").endswith("%"):
            axes.set_ylim(top=max(0.05, axes.get_ylim()[1]))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.xaxis.set_major_locator(_whole_steps())
    panels[0].set_title(figure.title)
    panels[-1].set_xlabel(figure.layout["xaxis"]["title"]["text"])
    # Below the panels, where it covers nothing.
    lines = [line for axes in panels for line in axes.get_legend_handles_labels()[0]]
    sheet.legend(
        handles=lines,
        title=textwrap.fill(figure.note, _NOTE_CHARS),
        title_fontsize=8,
        loc="outside lower center",
        ncols=2,
    )


def evaluations_sheet(run: RunRecord) -> Figure:
    """Held-out score over mean completion length, by step, in one column per source.

    Shaded: the intervals. Figure 7b of 'LoRA Without Regret'.
    """
    evaluations = run.evaluations_of("")
    sources = sorted({source for one in evaluations for source in one.result.by_source})
    columns: list[str | None] = [*sources[:_MAX_SETS]] if len(sources) > 1 else [None]
    base = run.evaluation_named("base")
    sheet = Figure(figsize=(4.6 * len(columns) + 0.6, 6.4), layout="constrained")
    all_axes = sheet.subplots(2, len(columns), squeeze=False, sharex=True)
    for (top, bottom), source in zip(all_axes.T, columns, strict=True):
        points = scores_by_step(evaluations, source)
        _banded(top, points, ("accuracy", "accuracy_low", "accuracy_high"), LIGHT["c0"])
        if base is not None:
            _base_line(top, base.result.total if source is None else base.result.by_source[source])
        top.set_ylim(0, min(1.03, max(0.1, top.get_ylim()[1])))
        top.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        top.set_title(source or "all problems")
        _banded(bottom, points, ("tokens_mean", "tokens_low", "tokens_high"), LIGHT["c1"])
        bottom.set_ylim(0, 1.05 * bottom.get_ylim()[1])
        bottom.set_xlabel("training step")
        bottom.xaxis.set_major_locator(_whole_steps())
    all_axes[0][0].set_ylabel("accuracy")
    all_axes[1][0].set_ylabel("mean completion length (tokens)")
    level = evaluations[-1].result.confidence
    sheet.suptitle(f"Evaluations during training ({level:.0%} intervals)", fontsize=12)
    return sheet


def _draw_trace(axes: Axes, trace: Trace) -> None:
    if trace.get("fill"):
        color, alpha = _color(trace["fillcolor"])
        axes.fill(trace["x"], trace["y"], color=color, alpha=alpha, linewidth=0)
        return
    look = trace["line"]
    color, alpha = _color(look["color"])
    axes.plot(
        trace["x"],
        trace["y"],
        color=color,
        alpha=alpha,
        linestyle=_LINE_STYLES[look["dash"]],
        linewidth=look["width"] * 0.75,  # plotly's pixels as points
        marker="o" if "markers" in trace["mode"] else "",
        markersize=3.5,
        label=trace["name"] if trace.get("showlegend", True) else None,
    )
    if bars := trace.get("error_y"):
        lengths = [bars["arrayminus"], bars["array"]]
        axes.errorbar(
            trace["x"], trace["y"], yerr=lengths, fmt="none", ecolor=color, alpha=0.7, capsize=3
        )


def _color(name: str) -> tuple[str, float]:
    """(colour, opacity) of a name in the palette. Example: "c0@0.16"."""
    key, _, opacity = name.partition("@")
    return LIGHT[key], float(opacity or 1)


def _banded(
    axes: Axes,
    points: Sequence[tuple[float, EvaluationScores]],
    keys: tuple[str, str, str],
    color: str,
) -> None:
    """One number of the evaluations with its interval, if that was recorded."""
    steps = [step for step, _ in points]
    middle, low, high = ([getattr(scores, key) for _, scores in points] for key in keys)
    marker = "o" if len(steps) <= blocks.MAX_MARKERS else ""
    axes.plot(steps, middle, color=color, marker=marker, markersize=4, zorder=3)
    if None not in (*low, *high):
        axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)


def _base_line(axes: Axes, scores: EvaluationScores) -> None:
    axes.axhline(scores.accuracy, color=LIGHT["muted"], linestyle=(0, (6, 3)), linewidth=1)
    axes.annotate(
        "base model",
        (1, scores.accuracy),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=LIGHT["muted"],
    )


def _whole_steps() -> MaxNLocator:
    return MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])


def _save(sheet: Figure, path: Path) -> Path:
    sheet.savefig(path, dpi=150, facecolor="white")
    return path
