"""The figures of the evaluations: accuracy with its interval, by training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_lora.evaluation.scores import EvaluationScores
from rl_lora.report.blocks import DASHES, Figure, Trace, band, color, curve, layout, rounded
from rl_lora.report.records import Evaluation, RunRecord


def evaluation_figures(runs: Sequence[RunRecord]) -> list[Figure | None]:
    """Each series of evaluations over the training steps, and its sources if it has several."""
    figures: list[Figure | None] = []
    for name in sorted({name for run in runs for name in run.series_names}):
        figures.append(evaluation_figure(runs, name))
        if len(runs) == 1:
            figures.append(_by_source(runs[0], name))
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


def evaluation_figure(runs: Sequence[RunRecord], name: str) -> Figure | None:
    """A series' accuracy by step; of one run also the format, pass@k, maj@k and the base model."""
    data: list[Trace] = []
    for index, run in enumerate(runs):
        evaluations = run.evaluations_of(name)
        if len(runs) > 1:
            data += _traces(evaluations, None, run.label, color(index))
        elif evaluations:
            data += _traces(evaluations, None, "accuracy", "c0")
            data += _extras(evaluations)
            data += _base_line(run, name)
    if not data:
        return None
    results = [one.result for run in runs for one in run.evaluations_of(name)]
    counts = sorted({result.total.num_problems for result in results})
    sources = sorted({source for result in results for source in result.by_source})
    of = f" of {', '.join(sources)}" if 0 < len(sources) <= 6 else ""
    levels = sorted({result.confidence for result in results})
    note = (
        f"{' or '.join(f'{count:,}' for count in counts)} problems{of}; "
        f"bands: {' and '.join(f'{level:.0%}' for level in levels)} intervals."
    )
    return _figure(_id(name), evaluation_title(name), data, note, "share of completions")


def _by_source(run: RunRecord, name: str) -> Figure | None:
    evaluations = run.evaluations_of(name)
    sources = _sources(evaluations)
    if not 2 <= len(sources) <= 20:
        return None
    data = []
    for index, source in enumerate(sources):
        data += _traces(evaluations, source, source, color(index), DASHES[index % len(DASHES)])
    title = f"{evaluation_title(name)} by source"
    return _figure(f"{_id(name)}_by_source", title, data, _bands_note(evaluations))


def _source_figures(runs: Sequence[RunRecord], name: str) -> list[Figure]:
    """Each source of an evaluation, several runs overlaid."""
    evaluations = [one for run in runs for one in run.evaluations_of(name)]
    sources = _sources(evaluations)
    if not 2 <= len(sources) <= 6:  # one is the whole evaluation; the table has them all
        return []
    figures = []
    for place, source in enumerate(sources):
        data = []
        for index, run in enumerate(runs):
            data += _traces(run.evaluations_of(name), source, run.label, color(index))
        title = f"{evaluation_title(name)}: {source}"
        figure_id = f"{_id(name)}_source_{place}"
        figures.append(_figure(figure_id, title, data, _bands_note(evaluations)))
    return figures


def _id(name: str) -> str:
    return f"evaluation_{name or 'held_out'}"


def _sources(evaluations: Sequence[Evaluation]) -> list[str]:
    return sorted({source for one in evaluations for source in one.result.by_source})


def _bands_note(evaluations: Sequence[Evaluation]) -> str:
    return f"Bands: {evaluations[-1].result.confidence:.0%} intervals."


def _figure(
    figure_id: str, title: str, data: list[Trace], note: str, y_title: str = "accuracy"
) -> Figure:
    form = layout(y_title, y_format=".0%")
    highest = max((max(trace["y"]) for trace in data if trace["y"]), default=0.0)
    form["yaxis"]["range"] = [0, min(1.03, max(0.1, 1.08 * highest))]
    return Figure(figure_id, title, data, form, note)


def _traces(
    evaluations: Sequence[Evaluation],
    source: str | None,
    name: str,
    shade: str,
    dash: str = "solid",
) -> list[Trace]:
    """Accuracy with its interval as band and bars, over training steps; source None: all."""
    points = scores_by_step(evaluations, source)
    if not points:
        return []
    steps = [step for step, _ in points]
    mid = [scores.accuracy for _, scores in points]
    low = [scores.accuracy_low for _, scores in points]
    high = [scores.accuracy_high for _, scores in points]
    line = curve((steps, mid), name, shade, dash=dash, legendgroup=name)
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


def scores_by_step(
    evaluations: Sequence[Evaluation], source: str | None
) -> list[tuple[float, EvaluationScores]]:
    """(step, scores) of the evaluations that have the source; None: all problems."""
    points = []
    for one in evaluations:
        scores = one.result.total if source is None else one.result.by_source.get(source)
        if one.step is not None and scores is not None:
            points.append((float(one.step), scores))
    return points


def _extras(evaluations: Sequence[Evaluation]) -> list[Trace]:
    """The format, and with several samples per problem pass@k and maj@k."""
    points = scores_by_step(evaluations, None)
    k = points[-1][1].num_samples
    shown = [
        ("in the requested format", "format_rate", "c2", "dot"),
        ("accuracy within the format", "accuracy_formatted", "c1", "dash"),
    ]
    if k > 1:
        shown += [
            (f"pass@{k}", "pass_at_k", "c3", "dash"),
            (f"maj@{k}", "majority_accuracy", "c4", "dashdot"),
        ]
    data = []
    for name, key, shade, dash in shown:
        pairs = [(step, value) for step, s in points if (value := getattr(s, key)) is not None]
        if pairs:
            steps, values = [step for step, _ in pairs], [value for _, value in pairs]
            data.append(curve((steps, values), name, shade, dash=dash, form=".1%"))
    return data


def _base_line(run: RunRecord, name: str) -> list[Trace]:
    base = run.evaluation_named("base" if not name else f"base_{name}")
    if base is None:
        return []
    last = max([1, run.last_step, *(one.step or 0 for one in run.evaluations)])
    ends = ([0, last], [base.result.accuracy] * 2)
    line = curve(ends, "base model", "muted", dash="longdash", form=".1%")
    line["mode"] = "lines"
    return [line]
