"""The numbers around the figures: tiles, tables of runs and evaluations, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rl_lora.config import VARIANT_NAMES, RunConfig
from rl_lora.report.blocks import Section, Table, Tile
from rl_lora.report.evaluation_figures import TITLE
from rl_lora.report.records import RunRecord, series
from rl_lora.report.tables import accuracy_text, seconds_text

_WINDOW = 5  # steps averaged for the reward at the start and at the end


def make_tiles(run: RunRecord) -> list[Tile]:
    """The main numbers that a run has recorded."""
    tiles = []

    def add(label: str, value: str, *details: str) -> None:
        tiles.append(Tile(label, value, "; ".join(detail for detail in details if detail)))

    if (model := run.setting("model", "name")) is not None:
        add("Base model", str(model), str(run.facts.get("dtype", "")).removeprefix("torch."))
    if (mode := run.setting("lora", "mode")) is not None:
        alpha, layers = run.setting("lora", "alpha"), run.setting("lora", "layers")
        count = run.facts.get("trainable_parameters")
        add(
            "Policy",
            policy_name(run),
            f"alpha {alpha:g}, {layers} layers" if mode != "full" and alpha is not None else "",
            f"{count:,} trainable parameters" if isinstance(count, int) else "",
        )
    planned = run.setting("run", "num_steps")
    of = f" of {planned:,}" if isinstance(planned, int) else ""
    prompts, samples = (run.setting("sampling", key) for key in ("num_prompts", "num_samples"))
    per_step = f"{prompts} problems × {samples} samples per step" if prompts and samples else ""
    add("Steps", f"{run.last_step:,}{of}", per_step)
    if run.held_out:
        first, last = run.held_out[0].result, run.held_out[-1].result
        bounds = (
            f"{100 * one.total.accuracy_low:.1f} to {100 * one.total.accuracy_high:.1f}"
            for one in (first, last)
        )
        interval = f"{last.confidence:.0%} interval"
        if len(run.held_out) == 1:
            add(TITLE, f"{last.accuracy:.1%}", f"{next(bounds)}, {interval}")
        else:
            change = f"{100 * (last.accuracy - first.accuracy):+.1f} points"
            ends = f"{first.accuracy:.1%} → {last.accuracy:.1%}"
            add(TITLE, ends, change, f"{interval}s {' and '.join(bounds)}")
    if rewards := series(run.steps, "reward/mean")[1]:
        window = min(_WINDOW, max(1, len(rewards) // 2))
        steps = "step" if window == 1 else f"{window} steps"
        ends = f"{fmean(rewards[:window]):.2f} → {fmean(rewards[-window:]):.2f}"
        add("Reward", ends, f"means of the first and the last {steps}")
    if seconds := series(run.steps, "time/step_s")[1]:
        add("Time", seconds_text(sum(seconds)), f"in steps; {fmean(seconds):.1f} s per step")
    return tiles


def run_table(runs: Sequence[RunRecord]) -> Table:
    """The runs side by side, for a report of several."""
    columns = ["run", "model", "policy", "learning rate", "steps"]
    columns += ["before", "after", "reward at the end", "time"]
    rows = []
    for run in runs:
        evaluations = run.held_out
        rewards = series(run.steps, "reward/mean")[1]
        seconds = series(run.steps, "time/step_s")[1]
        model, rate = run.setting("model", "name"), run.setting("optim", "lr")
        rows.append(
            [
                run.label,
                "–" if model is None else str(model),
                policy_name(run),
                "–" if rate is None else f"{rate:g}",
                f"{run.last_step:,}",
                accuracy_text(evaluations[0].result.total) if evaluations else "–",
                accuracy_text(evaluations[-1].result.total) if len(evaluations) > 1 else "–",
                f"{fmean(rewards[-_WINDOW:]):.3f}" if rewards else "–",
                seconds_text(sum(seconds)) if seconds else "–",
            ]
        )
    return Table("", columns, rows, [False, False, False] + [True] * 6)


def evaluation_table(runs: Sequence[RunRecord]) -> Table | None:
    """Every evaluation of the runs; None if there is none."""
    columns = ["evaluation", "step", "problems", "accuracy", "pass@k", "maj@k"]
    columns += ["in the format", "length", "truncated"]
    rows = []
    for run in runs:
        for evaluation in run.evaluations:
            total, k = evaluation.result.total, evaluation.result.total.num_samples
            rows.append(
                [
                    evaluation.name,
                    "–" if evaluation.step is None else f"{evaluation.step:,}",
                    f"{total.num_problems:,}" + (f" × {k}" if k > 1 else ""),
                    accuracy_text(total),
                    f"{total.pass_at_k:.1%}" if k > 1 else "–",
                    f"{total.majority_accuracy:.1%}" if k > 1 else "–",
                    f"{total.format_rate:.1%}",
                    f"{total.tokens_mean:.0f}",
                    f"{total.truncated_rate:.1%}",
                ]
            )
            if len(runs) > 1:
                rows[-1].insert(0, run.label)
    if not rows:
        return None
    first = ["run"] if len(runs) > 1 else []
    numeric = [False] * (len(first) + 1) + [True] * 8
    note = "Lengths in tokens; '× k': k completions per problem, averaged in the accuracy."
    return Table("", first + columns, rows, numeric, note)


def settings_section(runs: Sequence[RunRecord]) -> Section:
    """The settings that differ from the defaults; all others are folded away."""
    defaults = flat(RunConfig().model_dump(mode="json"))
    settings = [flat(run.config) for run in runs]
    keys = list(dict.fromkeys([*defaults, *(key for values in settings for key in values)]))
    rows = [
        [key, *(_value(values, key) for values in settings), _value(defaults, key)] for key in keys
    ]
    changed = [row for row in rows if any(cell not in ("–", row[-1]) for cell in row[1:-1])]
    columns = ["setting", *(run.label for run in runs), "default"]
    left = [False] * len(columns)
    facts = [flat(run.facts) for run in runs]
    names = list(dict.fromkeys(key for values in facts for key in values))
    versions = [[name, *(_value(values, name) for values in facts)] for name in names]
    title = "Versions and fingerprints"
    tables = [
        Table("Differences from the defaults", columns, changed, left),
        Table("All settings", columns, rows, left, is_folded=True),
        Table(title, ["", *columns[1:-1]], versions, left[:-1], is_folded=True),
    ]
    return Section("settings", "Settings", tables=[table for table in tables if table.rows])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"run": {"seed": 0}} as {"run.seed": 0}; lists are values."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def policy_name(run: RunRecord) -> str:
    """LoRA rank 8, DoRA rank 8, or full fine-tuning."""
    mode, rank = run.setting("lora", "mode"), run.setting("lora", "rank")
    if mode is None:
        return "–"
    kind = VARIANT_NAMES.get(str(run.setting("lora", "variant")), "LoRA")
    return "all weights" if mode == "full" else f"{kind} rank {rank}"


def _value(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "–"
    value = values[key]
    if isinstance(value, list):  # keys of its sections that are null would only make it long
        value = [
            {k: v for k, v in one.items() if v is not None} if isinstance(one, dict) else one
            for one in value
        ]
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
