"""The parts of a report: tiles, figures, tables, sections; the palette; curves and bands.

Figures are plotly's dicts, which the page hands to plotly and `run_figures` draws with matplotlib.
Colours are names in the palette ("c0", or "c0@0.2" with an opacity), which each theme of the page
replaces by its own, so one figure serves light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# After Okabe and Ito's palette (distinct for the common kinds of colour vision), in shades with a
# contrast of at least 3 against each theme's background; dashes and labels differ as well.
LIGHT = {
    "c0": "#0072b2", "c1": "#d55e00", "c2": "#009e73", "c3": "#aa4488", "c4": "#a87900",
    "c5": "#332288", "c6": "#5f6b76", "ink": "#1c2126", "muted": "#5b6570", "line": "#d9dee3",
    "page": "#f5f7f9", "card": "#ffffff", "mark": "#fff3cd",
}  # fmt: skip
DARK = {
    "c0": "#56b4e9", "c1": "#f0883e", "c2": "#2fc39a", "c3": "#dd8fc0", "c4": "#e8c14a",
    "c5": "#a9a2f5", "c6": "#9aa5b1", "ink": "#e4e8ec", "muted": "#9aa5b1", "line": "#333b44",
    "page": "#12161b", "card": "#1a2027", "mark": "#4a3f1a",
}  # fmt: skip
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
MAX_MARKERS = 30  # points of a line that has markers

Trace = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Tile:
    """One number at the top. Example: Tile("Held-out accuracy", "9.0 % → 27.0 %", "+18 points")."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """One plotly figure."""

    id: str
    title: str
    data: list[Trace]
    layout: dict[str, Any]
    note: str = ""  # what bands, dashes and averages mean


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of plain text under their column names; `is_numeric` columns are aligned right."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    is_numeric: list[bool]
    note: str = ""
    is_folded: bool = False


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under a heading."""

    id: str
    title: str
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def color(index: int) -> str:
    """The palette's name for the index-th run or series."""
    return f"c{index % 7}"


def curve(
    points: tuple[Sequence[float], Sequence[float]],
    name: str,
    color: str,
    *,
    dash: str = "solid",
    form: str = ".3g",
    **more: Any,
) -> Trace:
    """A line through (steps, values), with markers if there are few points."""
    x, y = points
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= MAX_MARKERS else "lines",
        "x": rounded(x),
        "y": rounded(y),
        "name": name,
        "yaxis": "y",
        "line": {"color": color, "dash": dash, "width": 2},
        "marker": {"color": color, "size": 5},
        "hovertemplate": f"%{{y:{form}}}",
        **more,
    }


def band(
    x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, **more: Any
) -> Trace:
    """The area between low and high."""
    return {
        "type": "scatter",
        "mode": "lines",
        "x": rounded([*x, *reversed(x)]),
        "y": rounded([*high, *reversed(low)]),
        "yaxis": "y",
        "fill": "toself",
        "fillcolor": f"{color}@0.16",
        "line": {"width": 0, "color": f"{color}@0"},
        "hoverinfo": "skip",
        "showlegend": False,
        **more,
    }


def bar(
    x: Sequence[Any], y: Sequence[Any], name: str, color: str, hover: str, **more: Any
) -> Trace:
    """One level of stacked bars."""
    marker = {"color": color, "line": {"width": 0}}
    trace = {"type": "bar", "x": x, "y": y, "name": name, "marker": marker}
    return {**trace, "hovertemplate": hover, **more}


def moving(values: Sequence[float], reach: int) -> tuple[list[float], list[float]]:
    """(means, standard deviations) over up to `reach` values on either side; fewer at the ends."""
    windows = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [float(np.mean(w)) for w in windows], [float(np.std(w)) for w in windows]


def smooth_reach(num_steps: int) -> int:
    """Values on either side in a moving mean; 0: too few steps for one."""
    return 0 if num_steps < 10 else max(2, num_steps // 20)


def rounded(values: Sequence[float]) -> list[float]:
    """Six digits: as good to the eye, and the page is half as large."""
    return [float(f"{value:.6g}") for value in values]


def layout(y_title: str, *, y_format: str = "", x_title: str = "training step") -> dict[str, Any]:
    """One panel over training steps (or another x)."""
    x_axis, y_axis = {"title": {"text": x_title}}, _axis(y_title, y_format)
    return {"xaxis": x_axis, "yaxis": y_axis, "barmode": "stack"}


def two_panels(
    upper: str, lower: str, *, upper_format: str = "", lower_format: str = ""
) -> dict[str, Any]:
    """Two stacked panels sharing the x axis; curves of the lower panel are on "y2"."""
    return {
        "xaxis": {"title": {"text": "training step"}, "anchor": "y2"},
        "yaxis": {"domain": [0.42, 1.0], **_axis(upper, upper_format)},
        "yaxis2": {"domain": [0.0, 0.33], "anchor": "x", **_axis(lower, lower_format)},
    }


def _axis(title: str, form: str) -> dict[str, Any]:
    return {"title": {"text": title}, "tickformat": form, "rangemode": "tozero"}
