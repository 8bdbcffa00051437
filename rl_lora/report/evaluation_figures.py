"""The figures of the evaluations: accuracy with its interval, by training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_lora.report.blocks import DASHES, Figure, Trace, band, color, curve, layout, rounded
from rl_lora.report.records import Evaluation, RunRecord


def evaluation_figures(runs: Sequence[RunRecord]) -> list[Figure | None]:
    """Each series of evaluations over the training steps, and its sources where it has several."""
    names = dict.fromkeys(
        evaluation.series
        for run in runs
        for evaluation in run.evaluations
        if evaluation.step is not None
    )
    figures: list[Figure | None] = []
    for name in sorted(names):
        figures.append(_evaluation_figure(runs, name))
        if len(runs) == 1:
            figures.append(_evaluation_by_source(runs[0], name))
        else:
            figures += _source_figures(runs, name)
    return figures


def evaluation_title(name: str) -> str:
    """A series' heading. Example: "Held-out accuracy", "AIME 2024"."""
    if not name:
        return "Held-out accuracy"
    if name.lower().startswith("aime") and name[4:].isdigit():
        return f"AIME {2000 + int(name[4:]) % 2000}"
    return name


def _evaluation_figure(runs: Sequence[RunRecord], name: str) -> Figure | None:
    data: list[Trace] = []
    for index, run in enumerate(runs):
        evaluations = run.evaluations_of(name)
        if not evaluations:
            continue
        if len(runs) == 1:
            data += _evaluation_traces(evaluations, None, "accuracy", "c0")
            data += _evaluation_extras(evaluations)
            data += _base_line(run, name)
        else:
            data += _evaluation_traces(evaluations, None, run.label, color(index))
    form = layout("share of the answers", y_format=".0%")
    form["yaxis"]["range"] = [0, _headroom(data)]
    levels = {
        evaluation.result.confidence for run in runs for evaluation in run.evaluations_of(name)
    }
    note = " and ".join(f"{level:.0%}" for level in sorted(levels))
    problems = {
        evaluation.result.total.num_problems
        for run in runs
        for evaluation in run.evaluations_of(name)
    }
    count = " or ".join(f"{number:,}" for number in sorted(problems))
    sources = sorted(
        {
            s
            for run in runs
            for evaluation in run.evaluations_of(name)
            for s in evaluation.result.by_source
        }
    )
    of = f" of {', '.join(sources)}" if 0 < len(sources) <= 6 else ""
    text = f"{count} problems{of}; bands: {note} intervals."
    return Figure(f"evaluation_{name or 'held_out'}", evaluation_title(name), data, form, text)


def _evaluation_by_source(run: RunRecord, name: str) -> Figure | None:
    evaluations = run.evaluations_of(name)
    sources = sorted(
        {source for evaluation in evaluations for source in evaluation.result.by_source}
    )
    if not 2 <= len(sources) <= 20:
        return None
    data = []
    for index, source in enumerate(sources):
        data += _evaluation_traces(
            evaluations, source, source, color(index), DASHES[index % len(DASHES)]
        )
    form = layout("accuracy", y_format=".0%")
    form["yaxis"]["range"] = [0, _headroom(data)]
    title = f"{evaluation_title(name)} by source"
    note = f"Bands: {evaluations[-1].result.confidence:.0%} intervals."
    return Figure(f"evaluation_{name or 'held_out'}_by_source", title, data, form, note)


def _source_figures(runs: Sequence[RunRecord], name: str) -> list[Figure]:
    """Each source of an evaluation, with several runs overlaid."""
    evaluations = [evaluation for run in runs for evaluation in run.evaluations_of(name)]
    sources = sorted(
        {source for evaluation in evaluations for source in evaluation.result.by_source}
    )
    if not 2 <= len(sources) <= 6:  # one is the whole evaluation; the table has them all
        return []
    figures = []
    for place, source in enumerate(sources):
        data = []
        for index, run in enumerate(runs):
            data += _evaluation_traces(run.evaluations_of(name), source, run.label, color(index))
        form = layout("accuracy", y_format=".0%")
        form["yaxis"]["range"] = [0, _headroom(data)]
        figure_id = f"evaluation_{name or 'held_out'}_source_{place}"
        note = f"Bands: {evaluations[-1].result.confidence:.0%} intervals."
        figures.append(Figure(figure_id, f"{evaluation_title(name)}: {source}", data, form, note))
    return figures


def _evaluation_traces(
    evaluations: Sequence[Evaluation],
    source: str | None,
    name: str,
    shade: str,
    dash: str = "solid",
) -> list[Trace]:
    """Accuracy with its interval as band and bars, over training steps."""
    points = [
        (
            evaluation.step,
            evaluation.result.total if source is None else evaluation.result.by_source.get(source),
        )
        for evaluation in evaluations
    ]
    whole = [(step, scores) for step, scores in points if step is not None and scores is not None]
    if not whole:
        return []
    steps = [float(step) for step, _ in whole]
    mid = [scores.accuracy for _, scores in whole]
    low = [scores.accuracy_low for _, scores in whole]
    high = [scores.accuracy_high for _, scores in whole]
    line = curve(steps, mid, name, shade, dash=dash, legendgroup=name)
    line["customdata"] = [[f"{lo:.1%}", f"{hi:.1%}"] for lo, hi in zip(low, high, strict=True)]
    line["hovertemplate"] = "%{y:.1%} (%{customdata[0]} to %{customdata[1]})"
    if len(steps) <= 30:
        line["error_y"] = {
            "type": "data",
            "symmetric": False,
            # Rounding may put a bound a hair inside, and a bar's length is not negative.
            "array": rounded(np.maximum(np.subtract(high, mid), 0).tolist()),
            "arrayminus": rounded(np.maximum(np.subtract(mid, low), 0).tolist()),
            "color": f"{shade}@0.7",
            "thickness": 1,
            "width": 4,
        }
    return [band(steps, low, high, shade, legendgroup=name), line]


def _evaluation_extras(evaluations: Sequence[Evaluation]) -> list[Trace]:
    """Format, and with several samples a problem pass@k and maj@k."""
    steps = [float(evaluation.step) for evaluation in evaluations if evaluation.step is not None]
    totals = [evaluation.result.total for evaluation in evaluations if evaluation.step is not None]
    k = totals[-1].num_samples
    data = [
        curve(
            steps,
            [scores.format_rate for scores in totals],
            "in the asked format",
            "c2",
            dash="dot",
            form=".1%",
        )
    ]
    if k > 1:
        for name, values, shade, dash in (
            (f"pass@{k}", [scores.pass_at_k for scores in totals], "c3", "dash"),
            (f"maj@{k}", [scores.majority_accuracy for scores in totals], "c4", "dashdot"),
        ):
            data.append(curve(steps, values, name, shade, dash=dash, form=".1%"))
    return data


def _base_line(run: RunRecord, name: str) -> list[Trace]:
    base = run.evaluation_named("base" if not name else f"base_{name}")
    if base is None:
        return []
    last = max([run.last_step, *(evaluation.step or 0 for evaluation in run.evaluations)])
    accuracy = base.result.accuracy
    line = curve(
        [0, max(1, last)], [accuracy, accuracy], "base model", "muted", dash="longdash", form=".1%"
    )
    line["mode"] = "lines"
    return [line]


def _headroom(data: Sequence[Trace]) -> float:
    highest = max((max(trace["y"]) for trace in data if trace["y"]), default=0.0)
    return min(1.03, max(0.1, 1.08 * highest))
