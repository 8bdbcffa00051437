"""Keys of metrics.jsonl as figures: curves with moving means and bands, and stacked bars.

With one run a colour is a series; with several a colour is a run, and dashes tell the series apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    has_band: bool = False  # of the spread in the moving mean's window
    is_noisy: bool = True  # over enough steps drawn as a moving mean


def metric_figure(
    figure_id: str,
    title: str,
    runs: Sequence[RunRecord],
    curves: Sequence[Series],
    form: dict[str, Any],
    note: str = "",
    records_of: Callable[[RunRecord], Sequence[Record]] = lambda run: run.steps,
) -> Figure | None:
    """Keys of the steps as curves; None where no run has any of them."""
    curves = [c for c in curves if any(series(records_of(run), c.key)[0] for run in runs)]
    runs_with = [run for run in runs if any(series(records_of(run), c.key)[0] for c in curves)]
    data: list[Trace] = []
    notes = [note] if note else []
    is_single = len(runs) == 1
    for index, run in enumerate(runs):
        records, group_size = thinned(records_of(run))
        if group_size > 1:
            notes.append(f"Each point of {run.label} is the mean of {group_size} steps.")
        has_entry = False
        for place, item in enumerate(curves):
            label = None if is_single else run.label
            dash = item.dash if is_single else DASHES[place % len(DASHES)]
            traces = _metric_traces(
                records, item, item.color if is_single else color(index), dash, label
            )
            if not is_single:  # one entry of the legend a run
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
    reaches = {smooth_reach(len(thinned(records_of(run))[0])) for run in runs_with}
    if any(reaches) and any(item.is_noisy for item in curves):
        windows = " and ".join(str(2 * reach + 1) for reach in sorted(reaches) if reach)
        text = f"Thin: each step. Thick: moving mean of {windows} points"
        has_band = any(item.has_band for item in curves)
        notes.append(text + (", band ± one standard deviation within." if has_band else "."))
    return Figure(figure_id, title, data, form, " ".join(notes))


def _metric_traces(
    records: Sequence[Record], item: Series, shade: str, dash: str, label: str | None
) -> list[Trace]:
    """The curve; over enough steps a moving mean over the faint steps, and its band."""
    steps, values = series(records, item.key)
    if not steps:
        return []
    values = [value * item.scale for value in values]
    group = f"{label}/{item.key}" if label is None else label
    name = item.name if label is None else label
    look: dict[str, Any] = {
        "dash": dash, "form": item.form, "axis": item.axis, "unit": item.unit,
        "legendgroup": group, "showlegend": True,
    }  # fmt: skip
    reach = smooth_reach(len(steps)) if item.is_noisy else 0
    if reach == 0:
        return [curve(steps, values, name, shade, **look)]
    means, spreads = moving(values, reach)
    faint = curve(steps, values, name, f"{shade}@0.35", **{**look, "showlegend": False})
    faint |= {"mode": "lines", "hoverinfo": "skip", "hovertemplate": None}
    faint["line"] = {**faint["line"], "width": 1, "dash": "solid"}
    traces = [faint, curve(steps, means, name, shade, **look)]
    traces[-1] |= {
        "mode": "lines",
        "customdata": rounded(values),
        "hovertemplate": f"%{{customdata:{item.form}}}{item.unit} (mean %{{y:{item.form}}})",
    }
    if item.has_band:
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        traces.insert(0, band(steps, low, high, shade, axis=item.axis, legendgroup=group))
    return traces


def stacked(
    records: Sequence[Record], shares: dict[str, tuple[str, str]], form: str, unit: str = ""
) -> list[Trace]:
    """One stack of bars a step; `shares` gives name -> (key, colour)."""
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
