"""The figures of one run, or of several runs overlaid."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from rl_lora.report.blocks import (
    DASHES,
    Figure,
    Section,
    Trace,
    band,
    bar,
    color,
    curve,
    layout,
    rounded,
    two_panels,
)
from rl_lora.report.curves import Series, metric_figure, stacked
from rl_lora.report.evaluation_figures import evaluation_figures
from rl_lora.report.records import Record, RunRecord, number, series, thinned

_PHASES = ("sample", "learn", "eval", "publish", "score", "warm_start")
_PHASE_COLORS = dict(zip(_PHASES, ("c0", "c1", "c2", "c3", "c4", "c5"), strict=True))


def make_sections(runs: Sequence[RunRecord]) -> list[Section]:
    """All figures that the records have numbers for, in four sections."""
    learning = [
        reward_figure(runs), *evaluation_figures(runs), _reward_by_source(runs),
        _reward_by_term(runs), _warm_start(runs),
    ]  # fmt: skip
    parts = [
        ("learning", "Does it learn?", learning),
        ("answers", "How does it answer?", [length_figure(runs), _groups(runs), _statuses(runs)]),
        ("health", "Is the training healthy?", [_kl(runs), _ratio(runs), _optimizer(runs)]),
        ("cost", "What does it cost?", [_phases(runs), _speed(runs), _memory(runs)]),
    ]
    return [
        Section(section_id, title, there)
        for section_id, title, figures in parts
        if (there := [figure for figure in figures if figure is not None])
    ]


def reward_figure(runs: Sequence[RunRecord]) -> Figure | None:
    """Mean reward of each step's rollouts, with the shares correct and in the requested format."""
    curves = [
        Series("reward/mean", "mean reward", "c0", has_band=True),
        Series("reward/correct_mean", "share correct", "c1", "dash", form=".1%"),
        Series("reward/format_mean", "share in the requested format", "c2", "dot", form=".1%"),
    ]
    form = layout("mean over the step's samples")
    return metric_figure("reward", "Reward during training", runs, curves, form)


def _warm_start(runs: Sequence[RunRecord]) -> Figure | None:
    curves = [Series("sft/loss", "log-loss", "c1", form=".3f", unit=" nats")]
    form = layout("log-loss (nats per token)", x_title="supervised step")
    warm = [replace(run, steps=run.warm_start) for run in runs]
    return metric_figure("warm_start", "Warm start before RL", warm, curves, form)


def _reward_by_source(runs: Sequence[RunRecord]) -> Figure | None:
    return _rewards(runs, r"reward/mean/(.+)", "reward_by_source", "Reward by source")


def _reward_by_term(runs: Sequence[RunRecord]) -> Figure | None:
    return _rewards(runs, r"reward/([^/]+)/mean", "reward_by_term", "Terms of the reward")


def _rewards(runs: Sequence[RunRecord], pattern: str, figure_id: str, title: str) -> Figure | None:
    """The metrics whose keys match the pattern, of one run; its group is a curve's name."""
    keys = {key for run in runs for record in run.steps for key in record}
    names = {key: found[1] for key in sorted(keys) if (found := re.fullmatch(pattern, key))}
    if len(runs) > 1 or not 2 <= len(names) <= 20:  # several runs would hide each other
        return None
    curves = [
        Series(key, name, color(i), DASHES[i % len(DASHES)], has_band=i < 4)
        for i, (key, name) in enumerate(names.items())
    ]
    return metric_figure(figure_id, title, runs, curves, layout("mean reward"))


def length_figure(runs: Sequence[RunRecord]) -> Figure | None:
    """Mean completion length, split by correct and wrong, and the truncation rate below."""
    curves = [
        Series("cot/tokens_mean", "all", "c6", form=".0f", unit=" tokens"),
        Series("cot/tokens_correct_mean", "correct", "c0", "dash", form=".0f", unit=" tokens"),
        Series("cot/tokens_wrong_mean", "wrong", "c1", "dot", form=".0f", unit=" tokens"),
        Series("cot/truncated_rate", "truncated (below)", "c3", axis="y2", form=".1%"),
    ]
    form = two_panels("mean length (tokens)", "truncated", lower_format=".0%")
    caps = {cap for run in runs if (cap := run.setting("sampling", "max_tokens"))}
    note = f"Completions are truncated at {caps.pop():,} tokens." if len(caps) == 1 else ""
    return metric_figure("length", "Length of the chain of thought", runs, curves, form, note)


def _groups(runs: Sequence[RunRecord]) -> Figure | None:
    shares = {
        "all solved": ("groups/solved_all_rate", "c0"),
        "mixed": ("groups/mixed_rate", "c2"),
        "none solved": ("groups/solved_none_rate", "c1"),
    }
    title, y_title = "Groups by outcome", "share of the step's groups"
    note = "A group is the samples of one problem; a tied one (all rewards equal) has no gradient."
    if len(runs) > 1:
        curves = [Series(key, name, shade, form=".0%") for name, (key, shade) in shares.items()]
        return metric_figure("groups", title, runs, curves, layout(y_title, y_format=".0%"))
    records, _ = thinned(runs[0].steps)
    data = stacked(records, shares, ".0%")
    steps, tied = series(records, "groups/tied_rate")
    if not data or not steps:
        return None
    data.append(curve((steps, tied), "tied: no gradient", "ink", dash="dot", form=".0%"))
    form = layout(y_title, y_format=".0%")
    form["yaxis"]["range"] = [0, 1.02]
    return Figure("groups", title, data, form, note)


def _statuses(runs: Sequence[RunRecord]) -> Figure | None:
    """The verifier's statuses other than ok; for one run."""
    if len(runs) > 1:
        return None
    records = [record for record in thinned(runs[0].steps)[0] if record.get("rollouts/num")]
    keys = sorted({k for r in records for k in r if k.startswith("score/")} - {"score/ok"})
    shares = {
        key.removeprefix("score/").replace("_", " "): (key, color(i)) for i, key in enumerate(keys)
    }
    scaled = [{**r, **{k: r[k] / r["rollouts/num"] for k in keys if k in r}} for r in records]
    data = stacked(scaled, shares, ".1%")
    if not data:
        return None
    form = layout("share of the step's completions", y_format=".1~%")
    note = "Completions that the verifier could not grade normally; all others are 'ok'."
    return Figure("statuses", "Verifier statuses other than ok", data, form, note)


def _kl(runs: Sequence[RunRecord]) -> Figure | None:
    curves = [
        Series("mismatch/kl", "sampler to policy", "c0", form=".2e", unit=" nats"),
        Series("loss/kl", "policy to base", "c1", "dash", form=".2e", unit=" nats"),
        Series("reward/kl", "sampler to base", "c2", "dash", form=".2e", unit=" nats"),
        Series(
            "policy/kl_to_base", "sampler to base, limited", "c3", "dash", form=".2e", unit=" nats"
        ),
    ]
    values = [v for run in runs for item in curves for v in series(run.steps, item.key)[1]]
    form = layout("KL (nats per token)")
    form["yaxis"] |= {"exponentformat": "power", "tickformat": ""}
    if values and 0 < 10 * min(values) < max(values):
        form["yaxis"] |= {"type": "log", "rangemode": "normal", "dtick": 1}
    return metric_figure("kl", "KL divergences", runs, curves, form)


def _ratio(runs: Sequence[RunRecord]) -> Figure | None:
    """Quantiles of the importance ratio minus 1."""
    data: list[Trace] = []
    for index, run in enumerate(runs):
        records, _ = thinned(run.steps)
        wanted = ("ratio/p01", "ratio/p50", "ratio/p99", "ratio/mean")
        whole = [r for r in records if all(series([r], key)[0] for key in wanted)]
        if not whole:
            continue
        shade = "c0" if len(runs) == 1 else color(index)
        low, mid, high, mean = ([v - 1 for v in series(whole, key)[1]] for key in wanted)
        steps = series(whole, "ratio/p50")[0]
        name = "median" if len(runs) == 1 else run.label
        group = {"legendgroup": run.label}
        data.append(band(steps, low, high, shade, **group))
        data.append(curve((steps, mid), name, shade, form="+.2e", **group))
        if len(runs) == 1:
            data.append(curve((steps, mean), "mean", "c1", dash="dash", form="+.2e"))
    if not data:
        return None
    form = layout("ratio − 1")
    form["yaxis"] |= {"exponentformat": "power", "rangemode": "normal", "zeroline": True}
    note = "Policy over sampler, per token; 0: no difference. Band: 1st to 99th percentile."
    return Figure("ratio", "Importance ratio", data, form, note)


def _optimizer(runs: Sequence[RunRecord]) -> Figure | None:
    curves = [
        Series("entropy/mean", "entropy", "c0", unit=" nats"),
        Series("grad/norm", "gradient norm (below)", "c1", axis="y2"),
    ]
    form = two_panels("entropy (nats)", "gradient norm")
    return metric_figure("entropy", "Entropy and gradient norm", runs, curves, form)


def _speed(runs: Sequence[RunRecord]) -> Figure | None:
    curves = [
        Series("speed/sample_tokens_per_s", "sampling", "c0", form=".0f", unit=" tokens/s"),
        Series("speed/learn_tokens_per_s", "learning", "c1", "dash", form=".0f", unit=" tokens/s"),
    ]
    return metric_figure("speed", "Throughput", runs, curves, layout("tokens per second"))


def _phase_records(run: RunRecord) -> list[dict[str, float]]:
    """Each step's seconds by phase; `other` is the time between phases."""
    found = []
    for record in run.steps:
        times = {
            key.removeprefix("time/").removesuffix("_s"): value
            for key in record
            if key.startswith("time/") and (value := number(record[key])) is not None
        }
        if (whole := times.pop("step", None)) is not None:
            times["other"] = max(0.0, whole - sum(times.values()))
        found.append({"step": record["step"], **times})
    return found


def _phase_names(records: Sequence[Record]) -> list[str]:
    names = {key for record in records for key in record if key != "step"}
    return sorted(names, key=lambda name: (name == "other", (*_PHASES, name).index(name), name))


def _phases(runs: Sequence[RunRecord]) -> Figure | None:
    if len(runs) > 1:
        return _phases_by_run(runs)
    records = _phase_records(runs[0])
    shares = {
        name.replace("_", " "): (name, _PHASE_COLORS.get(name, "c6"))
        for name in _phase_names(records)
    }
    data = stacked(thinned(records)[0], shares, ".1f", " s")
    return Figure("time", "Seconds by phase", data, layout("seconds")) if data else None


def _phases_by_run(runs: Sequence[RunRecord]) -> Figure | None:
    records_of = {
        run.label: _phase_records(run) for run in runs if series(run.steps, "time/step_s")[0]
    }
    if not records_of:
        return None
    names = _phase_names([record for records in records_of.values() for record in records])
    data = []
    for name in names:
        means = [fmean(r.get(name, 0.0) for r in records) for records in records_of.values()]
        shade = _PHASE_COLORS.get(name, "c6")
        label, seconds = name.replace("_", " "), rounded(means)
        hover = "%{x:.1f} s"
        data.append(bar(seconds, list(records_of), label, shade, hover, orientation="h"))
    form = layout("", x_title="mean seconds per step") | {"hovermode": "closest"}
    form["yaxis"] = {"automargin": True, "autorange": "reversed"}
    return Figure("time", "Seconds by phase", data, form)


def _memory(runs: Sequence[RunRecord]) -> Figure | None:
    keys = sorted(
        {key for run in runs for r in run.steps[-1:] for key in r if key[:7] == "memory/"}
    )
    curves = [
        Series(
            key,
            key.removeprefix("memory/peak_").removesuffix("_mb").replace("resident", "process"),
            color(index),
            DASHES[index % len(DASHES)],
            form=".2f",
            unit=" GB",
            scale=1e-3,
            is_noisy=False,
        )
        for index, key in enumerate(keys)
    ]
    note = "Peak since the start."
    return metric_figure("memory", "Memory", runs, curves, layout("peak so far (GB)"), note)
