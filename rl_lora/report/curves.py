"""Keys of metrics.jsonl as figures: curves with moving means and bands, and stacked bars.

For one run, colours are series; for several, colours are runs and dashes are series.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rl_lora.report.blocks import (
    DASHES,
    Figure,
    Trace,
    band,
    bar,
    color,
    curve,
    moving,
    rounded,
    smooth_reach,
)
from rl_lora.report.records import Record, RunRecord, series, thinned


@dataclass(frozen=True, slots=True)
class Series:
    """A key of metrics.jsonl as a curve.

    Example: Series("reward/mean", "mean reward", "c0", has_band=True)
    """

    key: str
    name: str
    color: str
    dash: str = "solid"
    axis: str = "y"
    form: str = ".3f"
    unit: str = ""
    scale: float = 1.0
    has_band: bool = False  # one standard deviation within the moving mean's window
    is_noisy: bool = True  # drawn as a moving mean if there are enough steps


def metric_figure(
    figure_id: str,
    title: str,
    runs: Sequence[RunRecord],
    curves: Sequence[Series],
    form: dict[str, Any],
    note: str = "",
) -> Figure | None:
    """Keys of the steps as curves; None if no run has any of them."""
    curves = [c for c in curves if any(series(run.steps, c.key)[0] for run in runs)]
    data: list[Trace] = []
    notes = [note] if note else []
    reaches = set()
    is_single = len(runs) == 1
    for index, run in enumerate(runs):
        records, group_size = thinned(run.steps)
        if group_size > 1:
            notes.append(f"Each point of {run.label} is the mean of {group_size} steps.")
        for item, dash in zip(curves, itertools.cycle(DASHES), strict=False):
            if not is_single:
                item = replace(item, name=run.label, color=color(index), dash=dash)
            if traces := _metric_traces(records, item):
                data += traces
                reaches.add(smooth_reach(len(records)))
    if not data:
        return None
    named: set[str] = set()  # one legend entry per run, or per series of a single run
    for trace in data:
        if trace["showlegend"]:
            trace["showlegend"] = trace["name"] not in named
            named.add(trace["name"])
    if not is_single and len(curves) > 1:
        words = {"solid": "solid", "dash": "dashed", "dot": "dotted"}
        keys = [f"{words.get(d, d)}: {s.name}" for d, s in zip(DASHES, curves, strict=False)]
        notes.insert(0, "; ".join(keys).capitalize() + ".")
    if any(reaches) and any(item.is_noisy for item in curves):
        windows = " and ".join(str(2 * reach + 1) for reach in sorted(reaches) if reach)
        notes.append(f"Thin: each step. Thick: moving mean over {windows} points.")
        if any(item.has_band for item in curves):
            notes.append("Band: ± one standard deviation.")
    return Figure(figure_id, title, data, form, " ".join(notes))


def _metric_traces(records: Sequence[Record], item: Series) -> list[Trace]:
    """The curve; given enough steps, a moving mean over the faint values, with its band."""
    steps, values = series(records, item.key)
    if not steps:
        return []
    values = [value * item.scale for value in values]
    place = {"yaxis": item.axis, "legendgroup": item.name, "dash": item.dash}
    thick = curve((steps, values), item.name, item.color, form=item.form, **place)
    thick |= {"showlegend": True, "hovertemplate": thick["hovertemplate"] + item.unit}
    reach = smooth_reach(len(steps)) if item.is_noisy else 0
    if reach == 0:
        return [thick]
    means, spreads = moving(values, reach)
    faint = curve((steps, values), item.name, f"{item.color}@0.35", **place)
    faint |= {"mode": "lines", "showlegend": False, "hoverinfo": "skip", "hovertemplate": None}
    faint["line"]["width"] = 1
    thick |= {
        "mode": "lines",
        "y": rounded(means),
        "customdata": rounded(values),
        "hovertemplate": f"%{{customdata:{item.form}}}{item.unit} (mean %{{y:{item.form}}})",
    }
    traces = [faint, thick]
    if item.has_band:
        low, high = np.subtract(means, spreads).tolist(), np.add(means, spreads).tolist()
        look = {"yaxis": item.axis, "legendgroup": item.name}
        traces.insert(0, band(steps, low, high, item.color, **look))
    return traces


def stacked(
    records: Sequence[Record], shares: dict[str, tuple[str, str]], form: str, unit: str = ""
) -> list[Trace]:
    """One stack of bars per step; `shares` maps a name to (key, colour)."""
    data = []
    for name, (key, shade) in shares.items():
        steps, values = series(records, key)
        if any(values):
            hover = f"%{{y:{form}}}{unit}"
            data.append(bar(rounded(steps), rounded(values), name, shade, hover))
    return data
