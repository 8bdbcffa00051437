"""The tables that a plan prints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from rl_lora.config import LoraSection, ModelSection, RunConfig, Section
from rl_lora.config.dynamic import round_size
from rl_lora.planning.cards import Card
from rl_lora.planning.counts import MatmulCounts, ParameterCounts
from rl_lora.planning.memory import (
    PHASES,
    MemoryItem,
    Phase,
    bytes_text,
    gpu_memory,
    machine_bytes,
    peak,
    plan_device,
)
from rl_lora.planning.speed import StepTime
from rl_lora.planning.split import Split

_LEFT: Any = {"title_justify": "left", "caption_justify": "left"}


def settings_table(config: Section, default: Section) -> Table:
    """Every setting; non-default ones are bold and marked with *."""
    table = Table(title="Settings (* = not the default)", title_justify="left", show_header=False)
    for key, value, is_default in _settings(config, default):
        mark, style = ("  ", "dim") if is_default else ("* ", "bold")
        table.add_row(Text(mark + key, style=style), Text(repr(value), style=style))
    return table


def _settings(config: Section, default: Section) -> Iterator[tuple[str, Any, bool]]:
    for key in type(config).model_fields:
        value, usual = getattr(config, key), getattr(default, key)
        if isinstance(value, Section):
            for inner, inner_value, is_default in _settings(value, usual):
                yield f"{key}.{inner}", inner_value, is_default
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            yield key, [item.model_dump(exclude_defaults=True) for item in value], value == usual
        else:
            yield key, value, value == usual


def parameter_table(
    model: ModelSection,
    lora: LoraSection,
    counts: ParameterCounts,
    matmuls: MatmulCounts,
    origin: str,
) -> Table:
    """Parameters, in total and trainable, and the compute per token."""
    title = f"Parameters of {model.name}, shapes from {origin}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("base", f"{counts.base:,}")
    if counts.active != counts.base:
        table.add_row("base, active per token", f"{counts.active:,}")
    variant = "" if lora.variant == "lora" else f"{lora.variant}, "
    where = f"{variant}rank {lora.rank}, {lora.layers} layers"
    table.add_row(f"adapter, {where}", f"{counts.adapter:,}")
    table.add_row("adapter with lm_head as well", f"{counts.adapter_with_lm_head:,}")
    share = counts.trainable / counts.base
    table.add_row(
        f"trainable (mode {lora.mode})", f"{counts.trainable:,} ({share:.3%} of the base)"
    )
    table.add_row("multiply-adds per token, LoRA", f"{matmuls.lora:,}")
    table.add_row("multiply-adds per token, all weights", f"{matmuls.full:,}")
    table.add_row("LoRA / all weights", f"{matmuls.ratio:.3f}")
    return table


def memory_table(
    parts: list[MemoryItem],
    model: ModelSection,
    gpu_bytes: int | None = None,
    phases: Sequence[Phase] = PHASES,
    num_ranks: int = 1,
) -> Table:
    """The parts, and whether each phase's peak fits this machine's device (or the given GPU)."""
    title = "Memory plan" if num_ranks == 1 else f"Memory plan of each of {num_ranks} GPUs"
    table = Table("part", "size", "held while", "what", title=title, title_justify="left")
    table.columns[1].justify = "right"
    for part in parts:
        when = "both" if part.phases == PHASES else part.phases[0]
        table.add_row(part.part, bytes_text(part.num_bytes), when, part.note)
    device = plan_device(model.device)
    here = machine_bytes(device)
    available, what = here, "this machine's"
    if device == "cuda" and (gpu_bytes is not None or here is None):
        available, what = gpu_bytes or gpu_memory(device), "a GPU's"
    assert available is not None
    table.add_section()
    for phase in phases:
        total = peak(parts, phase)
        verdict = f"of {what} {bytes_text(available)}"
        if total > available:
            verdict = f"MORE than {what} {bytes_text(available)}"
        if device == "cuda" and here is None:
            verdict += " (this machine has none)"
        table.add_row("peak", bytes_text(total), phase, verdict, style="bold")
    return table


# limits: what is estimated, where it runs, and at which price
def time_table(
    config: RunConfig,
    found: StepTime,
    card: Card,
    largest: int,
    num_ranks: int = 1,
    gpu_price: float | None = None,
) -> Table:
    """A step's estimated time by phase, the run's, and the largest microbatch that fits.

    gpu_price is that of a GPU for an hour.
    """
    where = f"one {card.name}" if num_ranks == 1 else f"{num_ranks} x {card.name}"
    title = f"Time on {where}, estimated (assumptions: rl_lora/planning/roofline.py)"
    table = Table(title=title, show_header=False, caption=_not_counted(config), **_LEFT)
    sampling, num_steps = config.sampling, config.run.num_steps
    rate = round_size(sampling) * sampling.num_samples * found.mean_tokens / found.sample_s
    learn_s = found.learn_s + found.all_reduce_s
    seconds = max(found.sample_s, learn_s) if sampling.max_staleness else found.total_s
    hours = seconds * num_steps / 3600
    rows = {
        "completions": f"{found.mean_tokens:,.0f} tokens on average, assumed of "
        f"{sampling.max_tokens:,}",
        "sampling": f"{found.sample_s:,.1f} s a step; {rate:,.0f} tokens/s, "
        f"{found.num_at_once} sequences at once",
        **_sampling_rows(found),
        "learning": f"{found.learn_s:,.1f} s a step; {found.learner_tokens_s:,.0f} tokens/s, "
        f"{found.learner_mfu:.0%} of the peak",
        "hand-over": f"{found.hand_over_s:,.2f} s a step, from learner to engine",
        "sleep and wake": f"{found.switch_s:,.1f} s a step",
        "step": f"{seconds:,.1f} s",
        "bottleneck": f"{found.bottleneck}, {found.phases[found.bottleneck]:,.1f} s",
        "run": f"{hours:,.1f} hours, {num_steps} steps without evaluations",
        "largest microbatch": f"{largest:,} tokens (optim.microbatch_tokens)",
    }
    if num_ranks > 1:
        rows = _rows_of_several(config, found, num_ranks, rows)
        rows["run"] += f"; {hours * num_ranks:,.1f} GPU hours"
    if gpu_price is not None:
        rows["run"] += f"; costs {hours * num_ranks * gpu_price:,.2f} at {gpu_price:g} a GPU hour"
    if sampling.max_staleness:
        del rows["sleep and wake"]
    for name, text in rows.items():
        table.add_row(name, f"{text}; estimated")
    return table


def _sampling_rows(found: StepTime) -> dict[str, str]:
    """What sampling consists of; parts that take no time are left out."""
    notes = {
        "decoding, bound by bandwidth": "weights and KV cache are read",
        "decoding, bound by compute": "",
        "decoding, bound by the host": "the engine's Python, for each sequence",
        "decoding, launches": "sampler and kernels' launches",
        "long tail": "while fewer than half of an engine's sequences still run",
    }
    rows = {}
    for name in ("prefill", *notes):
        if seconds := found.phases[name]:
            note = notes.get(name)
            rows[f"  {name}"] = f"{seconds:,.1f} s" + (f", {note}" if note else "")
    return rows


def _not_counted(config: RunConfig) -> str | None:
    """What a job does that the estimates leave out, or None."""
    environment = config.environment
    parts = []
    if config.model.quantize is not None:
        parts.append(f"dequantization (model.quantize={config.model.quantize})")
    if environment.name is not None and environment.max_turns > 1:
        parts.append("an environment's turns after the first, each of which waits for the longest")
    if config.sampling.max_rounds > 1:
        parts.append("further rounds of dynamic sampling (sampling.max_rounds)")
    return f"not counted: {'; '.join(parts)}" if parts else None


def split_table(
    config: RunConfig, splits: Sequence[Split], gpu_price: float | None = None
) -> Table:
    """The best splits into samplers and learners, a row for each bound on staleness."""
    num_gpus = splits[0].num_samplers + splits[0].num_learners
    title = f"{num_gpus} GPUs divided into samplers (resources.samplers) and learners; estimated"
    columns = ["max. staleness", "samplers", "learners", "step", "bound by", "run"]
    if gpu_price is not None:
        columns.append("cost")
    table = Table(*columns, title=title, caption=_not_counted(config), **_LEFT)
    for split in splits:
        hours = split.seconds * config.run.num_steps / 3600
        cells = [
            f"{split.max_staleness}",
            f"{split.num_samplers}",
            f"{split.num_learners}",
            f"{split.seconds:,.1f} s",
            split.bound,
            f"{hours:,.1f} hours",
        ]
        if gpu_price is not None:
            cells.append(f"{hours * num_gpus * gpu_price:,.2f}")
        table.add_row(*cells)
    return table


def _rows_of_several(
    config: RunConfig, found: StepTime, num_ranks: int, rows: dict[str, str]
) -> dict[str, str]:
    """The rows with those that several GPUs have besides, in order."""
    num_prompts = math.ceil(round_size(config.sampling) / num_ranks)
    num = num_prompts * config.sampling.num_samples
    if found.all_reduce_bytes:
        size = bytes_text(found.all_reduce_bytes)
        exchange = f"{1000 * found.all_reduce_s:,.2f} ms a step; {size} of gradients"
    else:
        exchange = "none; gradients are added up layer by layer, within learning"
    more = {
        "completions": ("largest share", f"{num_prompts} prompts, {num} completions"),
        "sampling": ("longest completion", f"{found.longest_s:,.1f} s, on any number of GPUs"),
        "learning": ("all-reduce", exchange),
    }
    result = {}
    for name, text in rows.items():
        result[name] = text
        if name in more:
            result[more[name][0]] = more[name][1]
    result["sampling"] += " on each"
    return result
