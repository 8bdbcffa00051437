"""`--dry-run`: a job's parameters, memory and compute, from the model's config.json only.

The model is built on PyTorch's meta device, so no weight is read and 8 B parameters cost nothing.
`planning.counts` is exact; `planning.memory` and `planning.capacity` say how accurate they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PretrainedConfig

from rl_lora.config import LoraSection, ModelSection, RunConfig, Section
from rl_lora.config.sft import SftConfig
from rl_lora.models.shapes import build_on_meta, find_model_dir, load_model_config
from rl_lora.nn.experts import num_active_experts
from rl_lora.planning.capacity import Capacity, capacity_line, capacity_warning
from rl_lora.planning.cards import CARDS, Card, card_of_device
from rl_lora.planning.counts import (
    MatmulCounts,
    ParameterCounts,
    matmul_counts,
    parameter_counts,
)
from rl_lora.planning.memory import (
    PHASES,
    MemoryItem,
    Phase,
    bytes_text,
    gpu_memory,
    largest_microbatch,
    learner_memory,
    machine_bytes,
    memory_plan,
    microbatch_tokens,
    peak,
    plan_device,
)
from rl_lora.planning.speed import StepTime, step_time


def print_plan(
    config: RunConfig,
    model_dir: Path | None = None,
    console: Console | None = None,
    gpu_bytes: int | None = None,
    card: Card | None = None,
) -> None:
    """Prints `train --dry-run`: settings, parameters, compute, capacity, memory, and a GPU's time.

    Args:
        config: the job.
        model_dir: its model's directory; None: located without creating or downloading weights.
        console: where to print.
        gpu_bytes: memory of the GPU to plan for; None: the card's.
        card: the GPU to plan for; None: this machine's, or an H100 if it has none.

    Raises:
        UserError: the model's config.json is not available, or the model has no layers to adapt.
    """
    console = console or Console()
    console.print(settings_table(config, RunConfig()))
    model_config, origin = load_model_config(
        config.model, model_dir or find_model_dir(config.model.name)
    )
    model = build_on_meta(model_config)
    counts = parameter_counts(model, config.lora)
    matmuls = matmul_counts(model, config.lora)
    sampling, num_steps = config.sampling, config.run.num_steps
    num_episodes = num_steps * sampling.num_prompts * sampling.num_samples
    capacity = Capacity("episodes", num_episodes, counts.trainable, counts.fixed)
    table = parameter_table(config.model, config.lora, counts, matmuls, origin)
    table.add_row("capacity", capacity_line(capacity))
    longest = config.data.max_prompt_tokens + sampling.max_tokens
    table.add_row("compute, at most", work_text(num_episodes * longest, counts, matmuls, config))
    console.print(table)
    warn_of_capacity(console, capacity, config.lora, num_active_experts(model_config))
    if card is not None and gpu_bytes is None:
        gpu_bytes = card.num_bytes
    parts = memory_plan(config, model_config, counts.base, counts.trainable, gpu_bytes)
    console.print(memory_table(parts, config.model, gpu_bytes))
    card, available = card or _card_here(), gpu_bytes or gpu_memory("cuda")
    fits = max(peak(parts, phase) for phase in PHASES) <= available
    if plan_device(config.model.device) == "cuda" and card is not None and fits:
        cache = sum(part.num_bytes for part in parts if part.part == "KV cache")
        found = step_time(config, model_config, counts, cache, card)
        largest = largest_microbatch(parts, microbatch_tokens(config), available)
        console.print(time_table(config, found, card, largest))


def _card_here() -> Card | None:
    """This machine's GPU, an H100 if it has none; None for a GPU that is not in the table."""
    if not torch.cuda.is_available():
        return CARDS["h100"]
    return card_of_device(torch.cuda.get_device_name())


def print_sft_plan(config: SftConfig, console: Console | None = None) -> None:
    """Prints `sft --dry-run`; tokens are counted if data and tokenizer are on this machine.

    Raises:
        UserError: the model's config.json is not available, or the data cannot be used.
    """
    console = console or Console()
    console.print(settings_table(config, SftConfig()))
    model_dir = find_model_dir(config.model.name)
    model_config, origin = load_model_config(config.model, model_dir)
    model = build_on_meta(model_config)
    counts = parameter_counts(model, config.lora)
    matmuls = matmul_counts(model, config.lora)
    seen = config.run.num_steps * config.sft.batch_size
    num_tokens, how = _sft_tokens(config, model_config, model_dir)
    capacity = Capacity("tokens", num_tokens, counts.trainable, counts.fixed)
    table = parameter_table(config.model, config.lora, counts, matmuls, origin)
    table.add_row("completion tokens to learn", f"{num_tokens:,} ({how})")
    table.add_row("capacity", capacity_line(capacity))
    flops = 2 * (matmuls.full if config.lora.mode == "full" else matmuls.lora)
    table.add_row("compute, at most", flops_text(flops * seen * config.data.max_tokens))
    console.print(table)
    warn_of_capacity(console, capacity, config.lora, num_active_experts(model_config))
    num_tokens = microbatch_tokens(config)
    parts = learner_memory(config, model_config, counts.base, counts.trainable, num_tokens)
    console.print(memory_table(parts, config.model, phases=("learning",)))


def _sft_tokens(
    config: SftConfig, model_config: PretrainedConfig, model_dir: Path | None
) -> tuple[int, str]:
    """(completion tokens that the run trains on, how they were counted)."""
    from rl_lora.models.resolve import context_length, load_tokenizer
    from rl_lora.sft.data import load_sft

    seen = config.run.num_steps * config.sft.batch_size
    is_local = all(":" in s.name or Path(s.name).expanduser().exists() for s in config.data.train)
    if model_dir is None or not is_local:
        return seen * config.data.max_tokens, "at most; model or data are not on this machine"
    context = context_length(model_config)
    sets = load_sft(config.data, load_tokenizer(model_dir), context, config.run.seed)
    share = min(1.0, seen / len(sets.train))
    return round(share * sets.num_train_tokens), f"{share:.0%} of {len(sets.train):,} sequences"


def work_text(
    num_tokens: int, counts: ParameterCounts, matmuls: MatmulCounts, config: RunConfig
) -> str:
    """Floating-point operations (2 per multiply-add) to learn and to sample num_tokens tokens.

    For RL an upper bound: every prompt and completion is as long as the settings allow.
    """
    learn = 2 * num_tokens * (matmuls.full if config.lora.mode == "full" else matmuls.lora)
    sample = 2 * num_tokens * counts.active
    return f"learning {flops_text(learn)}, sampling {flops_text(sample)}"


def flops_text(flops: float) -> str:
    """1.2e+18 floating-point operations as `1.2 EFLOP`."""
    for size, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T")):
        if flops >= size:
            return f"{flops / size:,.3g} {unit}FLOP"
    return f"{flops / 1e9:,.3g} GFLOP"


def warn_of_capacity(
    console: Console, capacity: Capacity, lora: LoraSection, num_active: int = 1
) -> None:
    """Prints a line if the policy is too small for what there is to learn.

    A mixture's rank must be a multiple of num_active.
    """
    rank = None if lora.mode == "full" else lora.rank
    warning = capacity_warning(capacity, rank, multiple_of=num_active)
    if warning:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


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
) -> Table:
    """The parts, and whether each phase's peak fits this machine's device (or the given GPU)."""
    table = Table("part", "size", "held while", "what", title="Memory plan", title_justify="left")
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
            no_cache = any(part.part == "KV cache" and not part.num_bytes for part in parts)
            cure = _NO_CACHE if phase == "sampling" and no_cache else _CURES[phase]
            verdict = f"MORE than {what} {bytes_text(available)}: {cure}"
        if device == "cuda" and here is None:
            verdict += " (this machine has none)"
        table.add_row("peak", bytes_text(total), phase, verdict, style="bold")
    return table


_CURES: dict[Phase, str] = {
    "sampling": "lower sampling.memory_fraction, sampling.max_num_seqs or sampling.max_tokens",
    "learning": "lower optim.microbatch_tokens or sampling.max_tokens, or set "
    "optim.checkpoint_activations",
}
_NO_CACHE = "vLLM's copy of the base does not fit next to the learner's: take a smaller model"


def time_table(config: RunConfig, found: StepTime, card: Card, largest: int) -> Table:
    """A step's estimated time by phase, the run's, and the largest microbatch that fits."""
    title = f"Time on one {card.name}, estimated (assumptions: rl_lora/planning/speed.py)"
    table = Table(title=title, title_justify="left", show_header=False)
    longest, num_steps = config.sampling.max_tokens, config.run.num_steps
    num = config.sampling.num_prompts * config.sampling.num_samples
    rate = num * found.mean_tokens / found.sample_s
    seconds = max(found.sample_s, found.learn_s) if config.sampling.overlap else found.total_s
    rows = {
        "completions": f"{found.mean_tokens:,.0f} tokens on average, assumed of {longest:,}",
        "sampling": f"{found.sample_s:,.1f} s a step; {rate:,.0f} tokens/s, "
        f"{found.num_at_once} sequences at once",
        "learning": f"{found.learn_s:,.1f} s a step; {found.learner_tokens_s:,.0f} tokens/s",
        "sleep and wake": f"{found.switch_s:,.1f} s a step",
        "step": f"{seconds:,.1f} s",
        "run": f"{seconds * num_steps / 3600:,.1f} hours, {num_steps} steps without evaluations",
        "largest microbatch": f"{largest:,} tokens (optim.microbatch_tokens)",
    }
    if config.sampling.overlap:
        del rows["sleep and wake"]
    for name, text in rows.items():
        table.add_row(name, f"{text}; estimated")
    return table
