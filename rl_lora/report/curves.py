"""Keys of metrics.jsonl as figures: curves with moving means and bands, and stacked bars.

For one run, colours are series; for several, colours are runs and dashes are series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl_lora.report.blocks import (
    DASHES,
    Figure,
    Trace,
    band,
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
    runs_with = [run for run in runs if any(series(run.steps, c.key)[0] for c in curves)]
    data: list[Trace] = []
    notes = [note] if note else []
    is_single = len(runs) == 1
    for index, run in enumerate(runs):
        records, group_size = thinned(run.steps)
        if group_size > 1:
            notes.append(f"Each point of {run.label} is the mean of {group_size} steps.")
        has_entry = False
        for place, item in enumerate(curves):
            label = None if is_single else run.label
            dash = item.dash if is_single else DASHES[place % len(DASHES)]
            traces = _metric_traces(
                records, item, item.color if is_single else color(index), dash, label
            )
            if not is_single:  # one legend entry per run
                for trace in traces:
                    trace["showlegend"] = trace["showlegend"] and not has_entry
                    has_entry = has_entry or trace["showlegend"]
            data += traces
    if not data:
        return None
    if not is_single and len(curves) > 1:
        words = {"solid": "solid", "dash": "dashed", "dot": "dotted"}
        keys = [f"{words.get(d, d)}: {s.name}" for d, s in zip(DASHES, curves, strict=False)]
        notes.insert(0, "; ".join(keys).capitalize() + ".")
    reaches = {smooth_reach(len(thinned(run.steps)[0])) for run in runs_with}
    if any(reaches) and any(item.is_noisy for item in curves):
        windows = " and ".join(str(2 * reach + 1) for reach in sorted(reaches) if reach)
        notes.append(f"Thin: each step. Thick: moving mean over {windows} points.")
        if any(item.has_band for item in curves):
            notes.append("Band: ± one standard deviation.")
    return Figure(figure_id, title, data, form, " ".join(notes))


def _metric_traces(
    records: Sequence[Record], item: Series, shade: str, dash: str, label: str | None
) -> list[Trace]:
    """The curve; given enough steps, a moving mean over the faint values, with its band."""
    steps, values = series(records, item.key)
    if not steps:
        return []
    values = [value * item.scale for value in values]
    group = f"{label}/{item.key}" if label is None else label
    name = item.name if label is None else label
    place = {"yaxis": item.axis, "legendgroup": group}
    hover = f"%{{y:{item.form}}}{item.unit}"
    thick = curve((steps, values), name, shade, dash=dash, hovertemplate=hover, **place)
    thick["showlegend"] = True
    reach = smooth_reach(len(steps)) if item.is_noisy else 0
    if reach == 0:
        return [thick]
    means, spreads = moving(values, reach)
    faint = curve((steps, values), name, f"{shade}@0.35", **place)
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
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        traces.insert(0, band(steps, low, high, shade, **place))
    return traces


def stacked(
    records: Sequence[Record], shares: dict[str, tuple[str, str]], form: str, unit: str = ""
) -> list[Trace]:
    """One stack of bars per step; `shares` maps a name to (key, colour)."""
    data = []
    for name, (key, shade) in shares.items():
        steps, values = series(records, key)
        if any(values):
            data.append(
                {
                    "type": "bar",
                    "x": rounded(steps),
                    "y": rounded(values),
                    "name": name,
                    "marker": {"color": shade, "line": {"width": 0}},
                    "hovertemplate": f"%{{y:{form}}}{unit}",
                }
            )
    return data
