"""A run's figures as PNG files: the report's own figures, drawn with matplotlib.

They are drawn from whatever the records have: one step, missing numbers and resumed runs included.
"""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rl_lora.errors import UserError
from rl_lora.report import blocks
from rl_lora.report.blocks import LIGHT, Trace
from rl_lora.report.evaluation_figures import evaluation_figure, panels_figure, source_names
from rl_lora.report.figures import length_figure, reward_figure
from rl_lora.report.records import read_run
from rl_lora.storage.jsonl import write_bytes_atomically

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
_MAX_SOURCES = 4  # columns of evaluations.png; the report has more
_NOTE_CHARS = 80  # of a line of a figure's note
_LINE_STYLES: dict[str, Any] = {
    "solid": "-", "dash": "--", "dot": ":", "dashdot": "-.", "longdash": (0, (6, 3))
}  # fmt: skip


def draw_figures(run_folder: Path) -> list[Path]:
    """Writes RUN/figures/{reward,length,accuracy,evaluations,overview}.png; returns those drawn.

    A figure whose numbers were never recorded is not drawn. overview.png shows reward, length and
    accuracy side by side; evaluations.png needs two evaluations, and shows accuracy over length,
    the sources side by side.

    Raises:
        UserError: the run has recorded neither a step nor an evaluation, or a record is damaged.
    """
    run = read_run(run_folder)
    figures = {
        "reward": reward_figure([run]),
        "length": length_figure([run]),
        "accuracy": evaluation_figure([run]),
    }
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    if not run.steps and not drawn:
        raise UserError(f"{run_folder} has no step and no evaluation yet: nothing to draw")
    sheets = {name: [figure] for name, figure in drawn.items()}
    if len(run.held_out) > 1:
        sources = source_names(run.held_out)
        columns = sources[:_MAX_SOURCES] if len(sources) > 1 else [None]
        sheets["evaluations"] = [panels_figure(run, source) for source in columns]
    if drawn:
        sheets["overview"] = [*drawn.values()]
    folder = run_folder / FOLDER
    folder.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, row in sheets.items():
            width = 6.4 if len(row) == 1 else 5.2 * len(row)
            sheet = Figure(figsize=(width, 5.0), layout="constrained")
            parts = sheet.subfigures(1, len(row), squeeze=False)[0]
            for part, figure in zip(parts, row, strict=True):
                draw(figure, part)
            content = io.BytesIO()
            sheet.savefig(content, dpi=150, facecolor="white")
            write_bytes_atomically(folder / f"{name}.png", content.getvalue())
    return [folder / f"{name}.png" for name in sheets]


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
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
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
