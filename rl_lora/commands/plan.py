"""`--dry-run`: a job's parameters, memory and compute, from the model's config.json only.

The model is built on PyTorch's meta device, so no weight is read and 8 B parameters cost nothing.
`planning.counts` is exact; `planning.memory` and `planning.capacity` say how accurate they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.text import Text
from transformers import PretrainedConfig

from rl_lora.commands.plan_tables import (
    memory_table,
    parameter_table,
    settings_table,
    split_table,
    time_table,
)
from rl_lora.config import LoraSection, ModelSection, RunConfig
from rl_lora.config.sections import ResourcesSection
from rl_lora.config.sft import SftConfig
from rl_lora.errors import UserError
from rl_lora.models.device import pick_dtype
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
from rl_lora.planning.fit import Change, Job, misfits, what_fits
from rl_lora.planning.memory import (
    MemoryItem,
    gpu_memory,
    machine_bytes,
    plan_device,
)
from rl_lora.planning.speed import step_time, step_work
from rl_lora.planning.split import STALENESS, best_split, split_time

SomeConfig = TypeVar("SomeConfig", RunConfig, SftConfig)


# limits: what is planned, where it runs and where it is printed, each but the first with a default
def print_plan(
    config: RunConfig,
    model_dir: Path | None = None,
    console: Console | None = None,
    gpu_bytes: int | None = None,
    card: Card | None = None,
    num_gpus: int | None = None,
    gpu_price: float | None = None,
) -> None:
    """Prints `train --dry-run`: settings, parameters, compute, capacity, memory, and a GPU's time.

    Args:
        config: the job.
        model_dir: its model's directory; None: located without creating or downloading weights.
        console: where to print.
        gpu_bytes: the GPU's memory; None: the card's.
        card: the GPU; None: this machine's, or an H100 if it has none.
        num_gpus: how many of them, one process each; the time is then only estimated for a card
            that is given or here. None: one.
        gpu_price: of a GPU for an hour, in any currency; None: no cost is printed.

    Raises:
        UserError: the model's config.json is not available, GPUs are given for a job on a CPU, or
            more of them than prompts.
    """
    console = console or Console()
    console.print(settings_table(config, RunConfig()))
    is_for_gpus = any(one is not None for one in (gpu_bytes, card, num_gpus, gpu_price))
    config = _placed(config, is_for_gpus=is_for_gpus)
    num_ranks = _checked_number(config, num_gpus)
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
    available = _available(config.model, gpu_bytes)
    job = Job(config, model_config, counts.base, counts.trainable, available, num_ranks)
    parts = job.parts()
    console.print(memory_table(parts, config.model, gpu_bytes, num_ranks=num_ranks))
    card = card or _card_here(is_assumed=num_gpus is None)
    if print_misfits(console, job) or plan_device(config.model.device) == "cpu":
        return
    if card is None:
        console.print("For the time of a step name the GPU, e.g. --gpu h100.")
        return
    work = step_work(config, model_config, counts, card)
    bounds = sorted({*STALENESS, config.sampling.max_staleness})
    if (num_samplers := config.resources.num_elsewhere) > 0:
        # An engine that shares its GPU has this cache; one of [resources] has more.
        shared = replace(job, config=config.model_copy(update={"resources": ResourcesSection()}))
        cache = _cache_bytes(shared.parts())
        splits = [split_time(work, cache, num_samplers, num_ranks, bound) for bound in bounds]
        console.print(split_table(config, splits, gpu_price))
        return
    cache = _cache_bytes(parts)
    found = step_time(config, model_config, counts, cache, card, num_ranks)
    largest = job.largest_microbatch()
    console.print(time_table(config, found, card, largest, num_ranks, gpu_price))
    if num_ranks > 1:
        splits = [best_split(work, cache, num_ranks, bound) for bound in bounds]
        console.print(split_table(config, splits, gpu_price))


def _cache_bytes(parts: Sequence[MemoryItem]) -> int:
    return sum(part.num_bytes for part in parts if part.part == "KV cache")


def _placed(config: SomeConfig, *, is_for_gpus: bool = False) -> SomeConfig:
    """The job on the device and with the dtype that it is planned for."""
    model = config.model
    device = "cuda" if is_for_gpus and model.device == "auto" else model.device
    kind = plan_device(device)
    if is_for_gpus and kind == "cpu":
        raise UserError(
            f"--gpu, --gpus, --gpu-memory and --gpu-price plan for GPUs, and the job has "
            f"model.device={device}: add model.device=cuda"
        )
    if model.dtype == "auto" and kind == "cuda" and not torch.cuda.is_available():
        dtype = "bfloat16"
    else:
        dtype = str(pick_dtype(model.dtype, torch.device(kind))).removeprefix("torch.")
    return config.model_copy(
        update={"model": model.model_copy(update={"device": device, "dtype": dtype})}
    )


def _checked_number(config: RunConfig, num_gpus: int | None) -> int:
    """Of the learner's processes."""
    num_prompts, num_samplers = config.sampling.num_prompts, config.resources.num_elsewhere
    if num_gpus is None:
        return 1
    if num_gpus < 1 + num_samplers:
        raise UserError(
            f"--gpus {num_gpus}: a job has at least one"
            + (f" and those of its {num_samplers} samplers" if num_samplers else "")
            + f", --gpus {1 + num_samplers}"
        )
    num_gpus -= num_samplers
    if num_gpus > num_prompts:
        raise UserError(
            f"--gpus {num_gpus}: more processes than prompts (sampling.num_prompts={num_prompts}), "
            f"and a process samples whole groups; set sampling.num_prompts={num_gpus}, or "
            f"--gpus {num_prompts}"
        )
    return num_gpus


def _available(model: ModelSection, gpu_bytes: int | None) -> int:
    """Memory that one process has."""
    if plan_device(model.device) == "cuda":
        return gpu_bytes or gpu_memory("cuda")
    return machine_bytes("cpu") or 0


def _card_here(*, is_assumed: bool) -> Card | None:
    """This machine's GPU; if it has none, an H100 if one is assumed. None: not in the table."""
    if not torch.cuda.is_available():
        return CARDS["h100"] if is_assumed else None
    return card_of_device(torch.cuda.get_device_name())


def print_misfits(console: Console, job: Job) -> bool:
    """Prints what does not fit and with which change it would; whether there is such a thing."""
    if not (lines := misfits(job)):
        return False
    text = f"does not fit: {'; '.join(lines)}. {way_text(job, what_fits(job))}"
    console.print(Text(text, style="yellow"), soft_wrap=True)
    return True


def way_text(job: Job, change: Change | None) -> str:
    """It fits on 8 GPUs (--gpus 8) with model.shard=true."""
    is_on_gpus = plan_device(job.config.model.device) == "cuda"
    if change is None and is_on_gpus and isinstance(job.config, RunConfig):
        return (
            "No setting that leaves the results as they are, no number of GPUs up to "
            f"sampling.num_prompts={job.config.sampling.num_prompts} and no known card makes it "
            "fit: take a smaller model or shorter sequences."
        )
    if change is None:
        return (
            "No setting that leaves the results as they are makes it fit: take a smaller model or "
            "shorter sequences."
        )
    text = "It fits"
    if change.card is not None:
        key = next(key for key, card in CARDS.items() if card is change.card)
        text += f" on {change.card.name} (--gpu {key})"
    elif change.num_ranks != job.num_ranks:
        text += f" on {change.num_ranks} GPUs (--gpus {change.num_ranks})"
    return text + (f" with {' '.join(change.overrides)}." if change.overrides else ".")


def print_sft_plan(config: SftConfig, console: Console | None = None) -> None:
    """Prints `sft --dry-run`; tokens are counted if data and tokenizer are on this machine.

    Raises:
        UserError: the model's config.json is not available, or the data cannot be used.
    """
    console = console or Console()
    console.print(settings_table(config, SftConfig()))
    config = _placed(config)
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
    available = _available(config.model, None)
    job = Job(config, model_config, counts.base, counts.trainable, available)
    console.print(memory_table(job.parts(), config.model, phases=("learning",)))
    print_misfits(console, job)


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
