"""The figures of the evaluations: accuracy with its interval, by training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rl_lora.evaluation.scores import EvaluationScores
from rl_lora.report.blocks import (
    DASHES,
    MAX_MARKERS,
    Figure,
    Trace,
    band,
    color,
    curve,
    layout,
    rounded,
    two_panels,
)
from rl_lora.report.records import Evaluation, RunRecord

TITLE = "Held-out accuracy"
_ID = "evaluation_held_out"
# Of the scores: the field, its format and its panel.
_NUMBERS = {"accuracy": ("accuracy", ".1%", "y"), "tokens": ("tokens_mean", ".0f", "y2")}


def evaluation_figures(runs: Sequence[RunRecord]) -> list[Figure | None]:
    """Held-out accuracy over the training steps; its sources if there are several.

    Those of one run are in one figure, those of several runs in a figure each.
    """
    figures = [evaluation_figure(runs)]
    evaluations = [one for run in runs for one in run.held_out]
    sources = source_names(evaluations)
    if not 2 <= len(sources) <= (20 if len(runs) == 1 else 6):
        return figures  # a single source is the whole evaluation; the table has them all
    note = _bands_note(evaluations)
    by_source: list[Trace] = []
    for place, source in enumerate(sources):
        if len(runs) == 1:
            dash = DASHES[place % len(DASHES)]
            by_source += _traces(evaluations, source, source, color(place), dash)
            continue
        data = []
        for index, run in enumerate(runs):
            data += _traces(run.held_out, source, run.label, color(index))
        figures.append(_figure(f"{_ID}_source_{place}", f"{TITLE}: {source}", data, note))
    if by_source:
        figures.append(_figure(f"{_ID}_by_source", f"{TITLE} by source", by_source, note))
    return figures


def evaluation_figure(runs: Sequence[RunRecord]) -> Figure | None:
    """Held-out accuracy by step; of one run also the format, pass@k, maj@k and the base model."""
    data: list[Trace] = []
    for index, run in enumerate(runs):
        if len(runs) > 1:
            data += _traces(run.held_out, None, run.label, color(index))
        elif run.held_out:
            data += _traces(run.held_out, None, "accuracy", "c0")
            data += _extras(run.held_out) + _base_line(run, None)
    if not data:
        return None
    evaluations = [one for run in runs for one in run.held_out]
    counts = sorted({one.result.total.num_problems for one in evaluations})
    sources = source_names(evaluations)
    of = f" of {', '.join(sources)}" if 0 < len(sources) <= 6 else ""
    problems = f"{' or '.join(f'{count:,}' for count in counts)} problems{of}."
    note = f"{problems} {_bands_note(evaluations)}"
    return _figure(_ID, TITLE, data, note, "share of completions")


def panels_figure(run: RunRecord, source: str | None) -> Figure:
    """Held-out accuracy over mean completion length; source None: of all problems.

    Figure 7b of 'LoRA Without Regret'.
    """
    data = _traces(run.held_out, source, "accuracy", "c0") + _base_line(run, source)
    data += _traces(run.held_out, source, "mean length (below)", "c1", number="tokens")
    form = two_panels("accuracy", "length (tokens)", upper_format=".0%")
    return Figure("panels", source or "all problems", data, form, _bands_note(run.held_out))


def source_names(evaluations: Sequence[Evaluation]) -> list[str]:
    """The sources of the evaluations' problems, sorted."""
    return sorted({source for one in evaluations for source in one.result.by_source})


def _bands_note(evaluations: Sequence[Evaluation]) -> str:
    levels = sorted({one.result.confidence for one in evaluations})
    return f"Bands: {' and '.join(f'{level:.0%}' for level in levels)} intervals."


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
    number: str = "accuracy",
) -> list[Trace]:
    """One number with its interval as band and bars, over training steps; source None: of all.

    It is the accuracy, or "tokens": the mean completion length, in the lower panel.
    """
    points = _scores_by_step(evaluations, source)
    if not points:
        return []
    middle, form, axis = _NUMBERS[number]
    steps = [step for step, _ in points]
    mid, low, high = (
        [getattr(scores, key) for _, scores in points]
        for key in (middle, f"{number}_low", f"{number}_high")
    )
    line = curve((steps, mid), name, shade, dash=dash, form=form, legendgroup=name, yaxis=axis)
    if None in (*low, *high):  # of an earlier version
        return [line]
    line["customdata"] = [
        [f"{lo:{form}}", f"{hi:{form}}"] for lo, hi in zip(low, high, strict=True)
    ]
    line["hovertemplate"] += " (%{customdata[0]} to %{customdata[1]})"
    if len(steps) <= MAX_MARKERS:
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
    return [band(steps, low, high, shade, legendgroup=name, yaxis=axis), line]


def _scores_by_step(
    evaluations: Sequence[Evaluation], source: str | None
) -> list[tuple[float, EvaluationScores]]:
    """(step, scores) of the evaluations that have the source; None: all problems."""
    return [
        (float(one.step), scores)
        for one in evaluations
        if one.step is not None
        and (scores := one.result.by_source.get(source) if source else one.result.total)
    ]


def _extras(evaluations: Sequence[Evaluation]) -> list[Trace]:
    """The format, and with several samples per problem pass@k and maj@k."""
    points = _scores_by_step(evaluations, None)
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
            steps, values = zip(*pairs, strict=True)
            data.append(curve((steps, values), name, shade, dash=dash, form=".1%"))
    return data


def _base_line(run: RunRecord, source: str | None) -> list[Trace]:
    base = next((one.result for one in run.evaluations if one.name == "base"), None)
    if base is None:
        return []
    scores = base.total if source is None else base.by_source[source]
    last = max([1, run.last_step, *(one.step or 0 for one in run.evaluations)])
    ends = ([0, last], [scores.accuracy] * 2)
    return [curve(ends, "base model", "muted", dash="longdash", form=".1%", mode="lines")]
