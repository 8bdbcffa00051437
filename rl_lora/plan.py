"""What a run will take, from the model's config.json alone: parameters, memory, arithmetic.

The model is laid out on PyTorch's meta device, so no weight is read and 8 B parameters cost
nothing. Counts are exact. Memory is exact for weights, adapter, gradients, optimizer and KV cache;
for activations it is an estimate (within about 30 % of what autograd keeps; a test compares them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PretrainedConfig

from rl_lora.config import LoraSection, RunConfig, Section
from rl_lora.lora import target_names
from rl_lora.policy import pick_dtype
from rl_lora.shapes import find_model_dir, lay_out, load_model_config
from rl_lora.vllm_sampler import CPU_MEMORY_SHARE, CPU_NUM_SEQS

# Sequences that the engine decodes at once where sampling.max_num_seqs is not set.
_NUM_SEQS = {"cpu": CPU_NUM_SEQS, "cuda": 256}
_LOGITS_ELEMENTS = 2**24  # a chunk of logits of `policy`
_LOGITS_COPIES = 3  # logits, log-probs, gradient


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of parameters.

    Example, rank 256 on all layers of Llama-3.1-8B: ParameterCounts(base=8030261248,
    adapter=671088640, lm_head_adapter=33882112, trainable=671088640, num_targets=224)
    """

    base: int  # a tied lm_head counts once
    adapter: int  # on the chosen layers, without lm_head
    lm_head_adapter: int  # what an adapter on lm_head adds
    trainable: int  # by lora.mode and lora.lm_head
    num_targets: int  # linear layers with an adapter, lm_head included if it has one

    @property
    def adapter_with_lm_head(self) -> int:
        """The article's count: it has an adapter on lm_head, too."""
        return self.adapter + self.lm_head_adapter


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One part of the memory plan.

    Example: MemoryItem(part="optimizer", num_bytes=5368709120, note="Adam, 2 x float32")
    """

    part: str
    num_bytes: int
    note: str


@dataclass(frozen=True, slots=True)
class MatmulCounts:
    """Multiply-adds of the linear layers, forward and backward, for one token.

    Example, one 4096 x 4096 layer at rank 1: MatmulCounts(lora=33579008, full=50331648)
    """

    lora: int  # 2 N^2 + 6 N R for a square layer with an adapter, 2 N^2 for one without
    full: int  # 3 N^2

    @property
    def ratio(self) -> float:
        """LoRA / full; 2/3 at low rank ('LoRA Without Regret', section on compute)."""
        return self.lora / self.full


def parameter_counts(model: nn.Module, lora: LoraSection) -> ParameterCounts:
    """Counts for a laid-out (or loaded) base model. An adapter has rank x (d_in + d_out) a layer.

    Raises:
        UserError: the model has no layers of the chosen kind.
    """
    base = sum(parameter.numel() for parameter in model.parameters())
    sizes = {
        name: lora.rank * (layer.in_features + layer.out_features)
        for name, layer in _targets(model, lora.model_copy(update={"lm_head": True}))
    }
    lm_head = sum(size for name, size in sizes.items() if _is_lm_head(name))
    adapter = sum(sizes.values()) - lm_head
    return ParameterCounts(
        base=base,
        adapter=adapter,
        lm_head_adapter=lm_head,
        trainable=base if lora.mode == "full" else adapter + lm_head * lora.lm_head,
        num_targets=len(sizes) - (0 if lora.lm_head else sum(map(_is_lm_head, sizes))),
    )


def matmul_counts(model: nn.Module, lora: LoraSection) -> MatmulCounts:
    """Multiply-adds a token. The full arm is the article's 3 N^2: forward, and backward twice.

    With LoRA the frozen W needs no gradient (2 N^2), and A and B take 3 R (d_in + d_out).
    """
    adapted = {name for name, _ in _targets(model, lora)}
    lora_total = full_total = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            weights = layer.in_features * layer.out_features
            full_total += 3 * weights
            lora_total += 2 * weights
            if name in adapted:
                lora_total += 3 * lora.rank * (layer.in_features + layer.out_features)
    return MatmulCounts(lora=lora_total, full=full_total)


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of all layers for one token."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * _head_dim(text) * dtype.itemsize


def activation_bytes(
    config: PretrainedConfig, num_tokens: int, dtype: torch.dtype, *, is_checkpointed: bool
) -> int:
    """Estimate of what backward needs kept for one microbatch of a decoder-only transformer.

    Per token and layer: 6 hidden-sized tensors (residuals and norms, partly in float32), queries
    and attention output, keys and values, and 4 tensors of the gated MLP. With checkpointing, one
    hidden-sized tensor a layer and one whole layer at a time.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    query, key = text.num_attention_heads * _head_dim(text), heads * _head_dim(text)
    layer = 6 * text.hidden_size + 2 * query + 2 * key + 4 * text.intermediate_size
    layers = text.num_hidden_layers
    elements = text.hidden_size * layers + layer if is_checkpointed else layer * layers
    return num_tokens * elements * dtype.itemsize


def memory_plan(
    config: RunConfig, model_config: PretrainedConfig, counts: ParameterCounts
) -> list[MemoryItem]:
    """The parts of the learner's and the sampler's memory."""
    device = plan_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, torch.device(device))
    dtype_name = str(dtype).removeprefix("torch.")
    is_full, optim = config.lora.mode == "full", config.optim
    # An adapter trains in float32; with all weights in training everything has the model's dtype.
    size, name = (dtype.itemsize, dtype_name) if is_full else (4, "float32")
    tokens = max(
        optim.microbatch_tokens, config.data.max_prompt_tokens + config.sampling.max_tokens
    )
    parts = [MemoryItem("base weights", counts.base * dtype.itemsize, f"learner, {dtype_name}")]
    if not is_full:
        parts.append(MemoryItem("adapter", counts.trainable * 4, "float32"))
    elif config.algorithm.kl != "none":
        parts.append(MemoryItem("reference weights", counts.base * dtype.itemsize, "for the KL"))
    checkpointed = ", checkpointed" if optim.checkpoint_activations else ""
    parts += [
        MemoryItem("gradients", counts.trainable * size, name),
        MemoryItem("optimizer", counts.trainable * size * 2, f"Adam, 2 x {name}"),
        MemoryItem(
            "activations",
            activation_bytes(
                model_config, tokens, dtype, is_checkpointed=optim.checkpoint_activations
            ),
            f"estimate, microbatch of {tokens} tokens{checkpointed}",
        ),
        MemoryItem("logits", _LOGITS_ELEMENTS * _LOGITS_COPIES * 4, "one chunk, float32"),
    ]
    return parts + _sampler_memory(config, model_config, counts, dtype, device)


def _sampler_memory(
    config: RunConfig,
    model_config: PretrainedConfig,
    counts: ParameterCounts,
    dtype: torch.dtype,
    device: str,
) -> list[MemoryItem]:
    sampling = config.sampling
    parts = []
    if sampling.backend == "vllm":
        parts.append(MemoryItem("base weights", counts.base * dtype.itemsize, "vLLM's copy"))
    in_step = sampling.num_prompts * sampling.num_samples
    num_seqs = min(sampling.max_num_seqs or _NUM_SEQS[device], in_step)
    length = config.data.max_prompt_tokens + sampling.max_tokens
    per_token = kv_bytes_per_token(model_config, dtype)
    wanted = per_token * num_seqs * length
    limit = _kv_limit(config, device, counts.base * dtype.itemsize)
    note = f"{num_seqs} sequences x {length} tokens x {_bytes(per_token)}"
    if limit is not None and limit < wanted:
        fitting = limit // (per_token * length)
        note += f" is {_bytes(wanted)}; what is free holds {fitting} of full length at once"
    return [*parts, MemoryItem("KV cache", min(wanted, limit or wanted), note)]


def _kv_limit(config: RunConfig, device: str, weight_bytes: int) -> int | None:
    """What vLLM sets aside for keys and values at most, in bytes; None: no bound is known."""
    if config.sampling.backend == "torch":
        return None
    if device == "cpu":
        return int(CPU_MEMORY_SHARE * psutil.virtual_memory().available)
    total = machine_bytes(device)
    return total and max(0, int(config.sampling.memory_fraction * total) - weight_bytes)


def plan_device(name: str) -> str:
    """The kind, "cuda" or "cpu", of `model.device`, whether or not this machine has one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name.startswith("cuda") else "cpu"


def machine_bytes(device: str) -> int | None:
    """Memory of this machine's device; None where it has no such device."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_properties(0).total_memory
    return int(psutil.virtual_memory().total)


def print_plan(
    config: RunConfig, model_dir: Path | None = None, console: Console | None = None
) -> None:
    """What `train --dry-run` shows: settings, parameters, arithmetic and memory.

    Args:
        config: the job.
        model_dir: where its model lies; None: looked for without making or fetching weights.
        console: where it is printed.

    Raises:
        UserError: the model's config.json cannot be had, or the model has no layers to adapt.
    """
    model_dir = model_dir or find_model_dir(config.model.name)
    console = console or Console()
    console.print(settings_table(config))
    model_config, origin = load_model_config(config.model, model_dir)
    model = lay_out(model_config)
    counts = parameter_counts(model, config.lora)
    console.print(_parameter_table(config, counts, matmul_counts(model, config.lora), origin))
    parts = memory_plan(config, model_config, counts)
    device = plan_device(config.model.device)
    console.print(_memory_table(parts, machine_bytes(device), device))


def settings_table(config: RunConfig) -> Table:
    """Every setting; those that are not the default are marked with * and bold."""
    table = Table(title="Settings (* = not the default)", title_justify="left", show_header=False)
    for key, value, is_default in _settings(config, RunConfig()):
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


def _parameter_table(
    config: RunConfig, counts: ParameterCounts, matmuls: MatmulCounts, origin: str
) -> Table:
    lora = config.lora
    title = f"Parameters of {config.model.name}, shapes from {origin}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("base", f"{counts.base:,}")
    where = f"rank {lora.rank} on {lora.layers}"
    table.add_row(f"adapter, {where}, without lm_head", f"{counts.adapter:,}")
    table.add_row(f"adapter, {where}, with lm_head", f"{counts.adapter_with_lm_head:,}")
    share = counts.trainable / counts.base
    table.add_row(
        f"trainable (mode {lora.mode})", f"{counts.trainable:,} ({share:.3%} of the base)"
    )
    table.add_row("multiply-adds a token, LoRA", f"{matmuls.lora:,}")
    table.add_row("multiply-adds a token, all weights", f"{matmuls.full:,}")
    table.add_row("LoRA / all weights", f"{matmuls.ratio:.3f}")
    return table


def _memory_table(parts: list[MemoryItem], available: int | None, device: str) -> Table:
    table = Table("part", "size", "what", title="Memory plan", title_justify="left")
    table.columns[1].justify = "right"
    for part in parts:
        table.add_row(part.part, _bytes(part.num_bytes), part.note)
    total = sum(part.num_bytes for part in parts)
    if available is None:
        verdict = f"no {device} device here to compare with"
    elif total > available:
        verdict = (
            f"MORE than this machine's {_bytes(available)}: lower optim.microbatch_tokens, "
            "sampling.max_num_seqs or sampling.max_tokens, or set optim.checkpoint_activations"
        )
    else:
        verdict = f"of this machine's {_bytes(available)}"
    table.add_section()
    table.add_row("total", _bytes(total), verdict, style="bold")
    return table


def _targets(model: nn.Module, lora: LoraSection) -> Iterator[tuple[str, nn.Linear]]:
    for name in target_names(model, lora):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        yield name, layer


def _is_lm_head(name: str) -> bool:
    return name.rsplit(".", 1)[-1] == "lm_head"


def _head_dim(text: PretrainedConfig) -> int:
    head_dim = getattr(text, "head_dim", None)
    return int(head_dim or text.hidden_size // text.num_attention_heads)


def _bytes(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:,.0f} KiB"
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"
