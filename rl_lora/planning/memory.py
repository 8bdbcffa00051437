"""What a job's learner and sampler need in memory, from the model's config and the settings.

They take turns, so each has its own peak: the sampler's KV cache and copy of the weights leave the
GPU while the learner works, and the learner's activations are gone while sampling. With
`sampling.max_staleness` both work at once, and everything adds up.

With several processes the plan is for one of them, which has its own GPU and engine, with
a whole copy of the base (tensor parallel size 1). Its learner holds another copy, or with
`model.shard` a share (FSDP2, a unit per decoder layer) and the layers in use. Adapters are not
divided; in full mode masters, gradients and optimizer state are divided like the weights.

Exact for weights, adapter, gradients, optimizer and KV cache; an estimate for activations (within
about 30 % of what autograd keeps, which a test checks) and for what CUDA and vLLM keep besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import psutil
import torch
from transformers import PretrainedConfig

from rl_lora.config import RunConfig
from rl_lora.config.dynamic import round_size
from rl_lora.config.sft import SftConfig
from rl_lora.models.device import pick_dtype
from rl_lora.models.shapes import attention_widths, kv_bytes_per_token, mlp_width
from rl_lora.nn.variants import is_shifted, served_rank
from rl_lora.planning.cards import CARDS
from rl_lora.planning.quantized import quantized_base
from rl_lora.samplers.vllm.settings import (
    CPU_MEMORY_SHARE,
    decoded_at_once,
    lora_settings,
    memory_fraction,
    merges_adapter,
)

Phase = Literal["sampling", "learning"]
PHASES: tuple[Phase, ...] = ("sampling", "learning")
# One block of `nn.token_logprobs`: logits, log-probs and gradient in float32; on a GPU logits and
# exponentials in 16 bits.
_LOGITS_BYTES = {"cpu": 3 * 4 * 2**24, "cuda": 2 * 2 * 2**27}
_CPU_MICROBATCH_TOKENS = 4096
# Of the GPU's: few tokens of a small model are computed sooner than the host starts their kernels
# (docs/gpu.md).
_GPU_MICROBATCH_TOKENS = (16_384, 65_536)
_GPU_MICROBATCH_NUMBERS = 2**25  # tokens times the hidden size
ASSUMED_GPU_BYTES = CARDS["h100"].num_bytes
CONTEXT, _CONTEXT_BYTES = "CUDA", 2**29  # its context and libraries, once a process
_ENGINE_BYTES = 2 * 2**30  # vLLM's activations, logits and CUDA graphs
ASLEEP, _ASLEEP_BYTES = "vLLM, asleep", 2**30  # of those: graphs and workspaces (vllm#28714)
LOADED = ("base weights", "adapter", "reference weights")  # the learner's parts from its start
_MICROBATCH_STEP = 256  # so that small changes of the free memory change nothing
_USABLE = 0.75  # of the free memory, since activations are only estimated
GPUS_PER_NODE = 8
_WHOLE_LAYERS = 2  # of a sharded model: the one in use, and the next, which is gathered meanwhile


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One part of the memory plan.

    Example: MemoryItem(part="optimizer", num_bytes=5368709120, note="Adam, 2 x float32")
    """

    part: str
    num_bytes: int
    note: str
    phases: tuple[Phase, ...] = PHASES  # in which it is held


def peak(parts: Iterable[MemoryItem], phase: Phase) -> int:
    """Bytes held in a phase."""
    return sum(part.num_bytes for part in parts if phase in part.phases)


def activation_bytes(
    config: PretrainedConfig,
    num_tokens: int,
    dtype: torch.dtype,
    *,
    is_checkpointed: bool,
    joins_swiglu: bool = False,
) -> int:
    """Estimated bytes that one microbatch keeps for backward, in a decoder-only transformer.

    Per token and layer: 6 hidden-sized tensors (residuals and norms, partly in float32), queries
    and attention output, keys and values, and 4 tensors of the gated MLP (2 if `lora_swiglu`
    computes it). A mixture keeps 4 tensors of each active expert, and its input and output. With
    checkpointing: one hidden-sized tensor per layer, and one whole layer at a time.
    """
    text = config.get_text_config()
    query, key = attention_widths(text)
    layer = 6 * text.hidden_size + 2 * query + 2 * key + _mlp_elements(text, joins_swiglu)
    layers = text.num_hidden_layers
    elements = text.hidden_size * layers + layer if is_checkpointed else layer * layers
    return num_tokens * elements * dtype.itemsize


def memory_plan(
    config: RunConfig,
    model_config: PretrainedConfig,
    num_base: int,
    num_trainable: int,
    gpu_bytes: int | None = None,
    num_ranks: int = 1,
) -> list[MemoryItem]:
    """The learner's and the sampler's memory in an RL job; of several processes, one rank's. A GPU
    whose samplers are elsewhere has the learner only.

    Args:
        config: the job.
        model_config: its model's config.json.
        num_base: parameters of the base model.
        num_trainable: trainable parameters.
        gpu_bytes: the GPU's memory; None: this machine's, or ASSUMED_GPU_BYTES if it has no GPU.
        num_ranks: processes of the job, one GPU each.
    """
    counts, tokens = (num_base, num_trainable), microbatch_tokens(config, model_config)
    total = gpu_bytes or gpu_memory(plan_device(config.model.device))
    learner = learner_memory(config, model_config, *counts, tokens, num_ranks)
    if plan_device(config.model.device) == "cuda":
        learner.append(MemoryItem(CONTEXT, _CONTEXT_BYTES, "estimate, context and libraries"))
        if config.resources.is_remote:
            return learner
    held = _held_while_sampling(config, learner)
    parts = learner + _sampler_memory(config, model_config, counts, held, total, num_ranks)
    is_turns = not config.sampling.max_staleness
    return parts if is_turns else [replace(part, phases=PHASES) for part in parts]


def longest_sequence(config: RunConfig | SftConfig) -> int:
    """Tokens that the settings allow a prompt with its completion."""
    if isinstance(config, RunConfig):
        return config.data.max_prompt_tokens + config.sampling.max_tokens
    return config.data.max_tokens


def sequences_at_once(config: RunConfig, num_ranks: int = 1) -> int:
    """Sequences that a rank's sampler decodes together at most."""
    sampling = config.sampling
    in_step = math.ceil(round_size(sampling) / num_ranks) * sampling.num_samples
    at_once = decoded_at_once(sampling.max_num_seqs, plan_device(config.model.device))
    return min(at_once, in_step)


def default_tokens(device_type: str, hidden: int) -> int:
    """Tokens of a microbatch if optim.microbatch_tokens is not set; on a GPU, the most.

    hidden: the model's hidden size.
    """
    if device_type == "cpu":
        return _CPU_MICROBATCH_TOKENS
    least, most = _GPU_MICROBATCH_TOKENS
    tokens = min(max(_GPU_MICROBATCH_NUMBERS // hidden, least), most)
    return tokens - tokens % _MICROBATCH_STEP


def microbatch_tokens(config: RunConfig | SftConfig, model_config: PretrainedConfig) -> int:
    """Tokens of the largest microbatch: one sequence may exceed optim.microbatch_tokens."""
    hidden = model_config.get_text_config().hidden_size
    usual = default_tokens(plan_device(config.model.device), hidden)
    return max(config.optim.microbatch_tokens or usual, longest_sequence(config))


def bytes_to_come(
    config: RunConfig,
    model_config: PretrainedConfig,
    num_base: int,
    num_trainable: int,
    num_ranks: int = 1,
) -> int:
    """What a learner whose weights are loaded will still take, and hold while sampling: gradients
    and optimizer; where it learns meanwhile (`sampling.max_staleness`), activations and logits."""
    tokens = microbatch_tokens(config, model_config)
    parts = learner_memory(config, model_config, num_base, num_trainable, tokens, num_ranks)
    return _held_while_sampling(config, [part for part in parts if part.part not in LOADED])


def _held_while_sampling(config: RunConfig, parts: list[MemoryItem]) -> int:
    """What the engine leaves to the learner, of these parts; if that learns meanwhile and chooses
    the size of microbatches, so much that `fitting_microbatch` is the usual one."""
    if not config.sampling.max_staleness:
        return peak(parts, "sampling")
    to_come = peak((part for part in parts if part.part not in (*LOADED, CONTEXT)), "learning")
    share = _USABLE if config.optim.microbatch_tokens is None else 1
    return peak(parts, "learning") + math.ceil(to_come / share - to_come)


def largest_microbatch(parts: list[MemoryItem], num_tokens: int, available: int) -> int:
    """The tokens of the largest microbatch that fits into `available` bytes while learning; 0 if
    none does. `parts` are planned for one of num_tokens."""
    (activations,) = (part.num_bytes for part in parts if part.part == "activations")
    room = available - (peak(parts, "learning") - activations)
    return max(0, room * num_tokens // activations)


def fitting_microbatch(to_come: list[MemoryItem], num_tokens: int, free_bytes: int) -> int:
    """Tokens of a GPU's microbatches where optim.microbatch_tokens is not set: num_tokens, or what
    fits into the free memory. `to_come` are planned for num_tokens, without what is loaded."""
    fitting = largest_microbatch(to_come, num_tokens, int(_USABLE * free_bytes))
    tokens = min(num_tokens, fitting)
    return max(_MICROBATCH_STEP, tokens - tokens % _MICROBATCH_STEP)


def learner_memory(
    config: RunConfig | SftConfig,
    model_config: PretrainedConfig,
    num_base: int,
    num_trainable: int,
    num_tokens: int,
    num_ranks: int = 1,
) -> list[MemoryItem]:
    """Weights, gradients, optimizer and the activations of a microbatch of num_tokens tokens; of a
    sharded model one rank's share of them."""
    model, lora, optim = config.model, config.lora, config.optim
    dtype = pick_dtype(model.dtype, torch.device(plan_device(model.device)))
    is_full, num_shards = lora.mode == "full", shards(config, num_ranks)
    share = f", 1/{num_shards} of the model's" if num_shards > 1 else ""
    base_bytes, trained = num_base * dtype.itemsize // num_shards, "float32"
    if is_full:
        num_trainable, trained = num_trainable // num_shards, f"float32{share}"
    layer_bytes = 0
    if model.quantize is not None:
        quantized = quantized_base(model_config, num_base, model.quantize, dtype)
        base_bytes, layer_bytes = quantized.num_bytes, quantized.layer
    if is_full and num_shards > 1:  # the shares are their own masters
        parts = [MemoryItem("base weights", num_base // num_shards * 4, f"learner, {trained}")]
    else:
        name = model.quantize or str(dtype).removeprefix("torch.")
        parts = [MemoryItem("base weights", base_bytes, f"learner, {name}{share}")]
    if layer_bytes:
        parts.append(MemoryItem("dequantized layer", layer_bytes, "the largest, for one product"))
    if num_shards > 1:
        parts += _gathered_weights(config, model_config, num_base, dtype)
    if not is_full:
        copies = 2 if is_shifted(lora.variant) else 1
        note = "float32, with its initial value" if copies == 2 else "float32"
        parts.append(MemoryItem("adapter", copies * num_trainable * 4, note))
    elif dtype != torch.float32 and num_shards == 1:
        parts.append(MemoryItem("master weights", num_trainable * 4, "float32"))
    if is_full and isinstance(config, RunConfig) and config.algorithm.needs_base:
        parts.append(MemoryItem("reference weights", base_bytes, f"for the KL{share}"))
    checkpointed = ", checkpointed" if optim.checkpoint_activations else ""
    activations = activation_bytes(
        model_config,
        num_tokens,
        dtype,
        is_checkpointed=optim.checkpoint_activations,
        joins_swiglu=not is_full and lora.layers != "attention" and lora.variant != "dora",
    )
    if lora.variant == "dora":
        text = model_config.get_text_config()
        num_layers = 1 if optim.checkpoint_activations else text.num_hidden_layers
        outputs = _adapted_outputs(text, lora.layers)
        activations += num_tokens * num_layers * outputs * dtype.itemsize
    note = f"estimate, microbatch of {num_tokens} tokens{checkpointed}"
    logits = _LOGITS_BYTES[plan_device(config.model.device)]
    return [
        *parts,
        MemoryItem("gradients", num_trainable * 4, trained),
        MemoryItem("optimizer", num_trainable * 4 * 2, f"Adam, 2 x {trained}"),
        MemoryItem("activations", activations, note, ("learning",)),
        MemoryItem("logits", logits, "of one block", ("learning",)),
    ]


def _sampler_memory(
    config: RunConfig,
    model_config: PretrainedConfig,
    counts: tuple[int, int],
    held: int,
    total: int,
    num_ranks: int,
) -> list[MemoryItem]:
    """counts: parameters of the base, trainable ones. held: by the learner, of the GPU's total."""
    sampling, device = config.sampling, plan_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, torch.device(device))
    num_seqs = sequences_at_once(config, num_ranks)
    length = longest_sequence(config)
    per_token = kv_bytes_per_token(model_config, dtype)
    wanted = per_token * num_seqs * length
    note = f"{num_seqs} sequences x {length} tokens x {bytes_text(per_token)}"
    if sampling.backend == "torch":
        return [MemoryItem("KV cache", wanted, note, ("sampling",))]
    num_base, num_trainable = counts
    copy = "vLLM's copy, dequantized" if config.model.quantize else "vLLM's copy"
    weights = MemoryItem("base weights", num_base * dtype.itemsize, copy)
    merges = merges_adapter(
        sampling.merge_adapter, config.lora, dtype=dtype, device=torch.device(device)
    )
    if device == "cpu":
        limit = int(CPU_MEMORY_SHARE * psutil.virtual_memory().available)
        taken = min(wanted, limit)
        if merges:
            weights = replace(weights, phases=("sampling",))
        parts = [weights]
    else:  # vLLM takes its whole share of the GPU, whatever the job needs
        fraction = sampling.memory_fraction or max(0.0, memory_fraction(total, held))
        how = "set" if sampling.memory_fraction else "what the learner leaves"
        slot = 0 if merges else lora_settings(config.lora, dtype).get("max_lora_rank", 0)
        slot_bytes = num_trainable * slot // served_rank(config.lora) * dtype.itemsize
        host = "in the host's memory while learning"
        if (local := min(num_ranks, GPUS_PER_NODE)) > 1:
            host += f", {bytes_text(local * weights.num_bytes)} for the {local} of a node"
        parts = [
            replace(weights, note=copy if sampling.max_staleness else f"{copy}, {host}"),
            MemoryItem("adapter slot", slot_bytes, f"vLLM's, rank {slot}"),
            MemoryItem("vLLM", _ENGINE_BYTES, "estimate, activations and CUDA graphs"),
        ]
        parts = [replace(part, phases=("sampling",)) for part in parts if part.num_bytes]
        limit = taken = max(0, int(fraction * total) - peak(parts, "sampling"))
        if not sampling.max_staleness:
            asleep = "estimate, CUDA graphs of the sleeping engine"
            parts.append(MemoryItem(ASLEEP, _ASLEEP_BYTES, asleep, ("learning",)))
        note = f"rest of vLLM's {fraction:.0%} of the GPU ({how}); {note}"
    if limit < wanted:
        fitting = limit // (per_token * length)
        note += f" would be {bytes_text(wanted)}; {fitting} of full length fit at once"
    return [*parts, MemoryItem("KV cache", taken, note, ("sampling",))]


def shards(config: RunConfig | SftConfig, num_ranks: int) -> int:
    """How many shares the base is divided into: the number of ranks with `model.shard`, else 1."""
    shard = config.lora.mode == "full" if config.model.shard is None else config.model.shard
    return num_ranks if shard else 1


def _gathered_weights(
    config: RunConfig | SftConfig, model_config: PretrainedConfig, num_base: int, dtype: torch.dtype
) -> list[MemoryItem]:
    """What of a sharded model is gathered at a time, all layers being equally large."""
    text = model_config.get_text_config()
    outer = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    layers = _WHOLE_LAYERS * (num_base - outer) // text.num_hidden_layers
    num_bytes = (outer + layers) * dtype.itemsize
    note = f"estimate, embedding, output layer and {_WHOLE_LAYERS} layers"
    if config.lora.mode == "full":
        num_bytes, note = 2 * num_bytes, f"{note}, with gradients"
    parts = [MemoryItem("gathered weights", num_bytes, note, ("learning",))]
    if isinstance(config, RunConfig) and config.sampling.backend == "torch":
        whole = num_base * dtype.itemsize
        parts.append(MemoryItem("gathered weights", whole, "all of them", ("sampling",)))
    return parts


def plan_device(name: str) -> str:
    """The kind of `model.device`, "cuda" or "cpu", whether or not this machine has one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return "cuda" if name.startswith("cuda") else "cpu"


def machine_bytes(device: str) -> int | None:
    """Memory of this machine's device; None if it has no such device."""
    if device == "cuda":
        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_properties(0).total_memory
    return int(psutil.virtual_memory().total)


def gpu_memory(device: str) -> int:
    """Memory to plan for: this machine's GPU, or an 80 GB card if it has none."""
    return machine_bytes(device) or ASSUMED_GPU_BYTES


def bytes_text(num_bytes: int) -> str:
    """1.50 GiB, 12.0 MiB, 3 KiB."""
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:,.0f} KiB"
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB"


def _adapted_outputs(text: PretrainedConfig, layers: str) -> int:
    """Outputs per token of a layer's adapted matrices, which DoRA keeps before scaling them."""
    query, key = attention_widths(text)
    attention = query + 2 * key + text.hidden_size
    mlp = 2 * mlp_width(text) + text.hidden_size
    return int(attention * (layers != "mlp") + mlp * (layers != "attention"))


def _mlp_elements(text: PretrainedConfig, joins_swiglu: bool) -> int:
    """Elements of a layer's MLP kept per token: 4 tensors of its width (2 if only gate and up are
    kept), or 4 for each of the token's experts."""
    num_active = getattr(text, "num_experts_per_tok", None)
    if not num_active:
        is_swiglu = getattr(text, "hidden_act", "") in ("silu", "swish")
        return (2 if joins_swiglu and is_swiglu else 4) * mlp_width(text)
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return int(num_active * (4 * mlp_width(text) + 2 * text.hidden_size) + 4 * shared)
