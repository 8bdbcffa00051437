"""What a job's learner and sampler need in memory, from the model's config and the settings.

Exact for weights, adapter, gradients, optimizer and KV cache; an estimate for activations (within
about 30 % of what autograd keeps, which a test checks).
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from rl_lora.config import RunConfig
from rl_lora.config.sft import SftConfig
from rl_lora.models.device import pick_dtype
from rl_lora.nn.variants import is_shifted
from rl_lora.samplers.vllm.settings import CPU_MEMORY_SHARE, CPU_NUM_SEQS

# Sequences that the engine decodes at once if sampling.max_num_seqs is not set.
_NUM_SEQS = {"cpu": CPU_NUM_SEQS, "cuda": 256}
_LOGITS_ELEMENTS = 2**24  # one chunk of logits in `policy`
_LOGITS_COPIES = 3  # logits, log-probs, gradient
# Tokens of a microbatch if optim.microbatch_tokens is not set; on a GPU, the most.
MICROBATCH_TOKENS = {"cpu": 4096, "cuda": 16_384}
ASSUMED_GPU_BYTES = 79 * 2**30  # an "80 GB" card as CUDA reports it


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One part of the memory plan.

    Example: MemoryItem(part="optimizer", num_bytes=5368709120, note="Adam, 2 x float32")
    """

    part: str
    num_bytes: int
    note: str


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of all layers for one token."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * _head_dim(text) * dtype.itemsize


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
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    query, key = text.num_attention_heads * _head_dim(text), heads * _head_dim(text)
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
) -> list[MemoryItem]:
    """The learner's and the sampler's memory in an RL job.

    Args:
        config: the job.
        model_config: its model's config.json.
        num_base: parameters of the base model.
        num_trainable: trainable parameters.
        gpu_bytes: the GPU's memory; None: this machine's, or ASSUMED_GPU_BYTES if it has no GPU.
    """
    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    tokens = max(planned_microbatch_tokens(config), longest)
    parts = learner_memory(config, model_config, num_base, num_trainable, tokens)
    return parts + _sampler_memory(config, model_config, num_base, gpu_bytes)


def planned_microbatch_tokens(config: RunConfig | SftConfig) -> int:
    """optim.microbatch_tokens, or what it is without any lack of memory."""
    device = plan_device(config.model.device)
    return config.optim.microbatch_tokens or MICROBATCH_TOKENS[device]


def learner_memory(
    config: RunConfig | SftConfig,
    model_config: PretrainedConfig,
    num_base: int,
    num_trainable: int,
    num_tokens: int,
) -> list[MemoryItem]:
    """Weights, gradients, optimizer and the activations of a microbatch of num_tokens tokens."""
    model, lora, optim = config.model, config.lora, config.optim
    dtype = pick_dtype(model.dtype, torch.device(plan_device(model.device)))
    dtype_name = str(dtype).removeprefix("torch.")
    is_full = lora.mode == "full"
    parts = [MemoryItem("base weights", num_base * dtype.itemsize, f"learner, {dtype_name}")]
    if not is_full:
        copies = 2 if is_shifted(lora.variant) else 1
        note = "float32, with its initial value" if copies == 2 else "float32"
        parts.append(MemoryItem("adapter", copies * num_trainable * 4, note))
    elif dtype != torch.float32:
        parts.append(MemoryItem("master weights", num_trainable * 4, "float32"))
    if is_full and isinstance(config, RunConfig) and config.algorithm.kl != "none":
        parts.append(MemoryItem("reference weights", num_base * dtype.itemsize, "for the KL"))
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
    return [
        *parts,
        MemoryItem("gradients", num_trainable * 4, "float32"),
        MemoryItem("optimizer", num_trainable * 4 * 2, "Adam, 2 x float32"),
        MemoryItem("activations", activations, note),
        MemoryItem("logits", _LOGITS_ELEMENTS * _LOGITS_COPIES * 4, "one chunk, float32"),
    ]


def _sampler_memory(
    config: RunConfig, model_config: PretrainedConfig, num_base: int, gpu_bytes: int | None
) -> list[MemoryItem]:
    sampling, device = config.sampling, plan_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, torch.device(device))
    weight_bytes = num_base * dtype.itemsize
    in_step = sampling.num_prompts * sampling.num_samples
    num_seqs = min(sampling.max_num_seqs or _NUM_SEQS[device], in_step)
    length = config.data.max_prompt_tokens + sampling.max_tokens
    per_token = kv_bytes_per_token(model_config, dtype)
    wanted = per_token * num_seqs * length
    note = f"{num_seqs} sequences x {length} tokens x {bytes_text(per_token)}"
    if sampling.backend == "torch":
        return [MemoryItem("KV cache", wanted, note)]
    parts = [MemoryItem("base weights", weight_bytes, "vLLM's copy")]
    if device == "cpu":
        limit = int(CPU_MEMORY_SHARE * psutil.virtual_memory().available)
        taken = min(wanted, limit)
    else:  # vLLM reserves its whole share of the GPU, whatever the job needs
        total = gpu_bytes or gpu_memory(device)
        limit = taken = max(0, int(sampling.memory_fraction * total) - weight_bytes)
        note = f"rest of vLLM's {sampling.memory_fraction:.0%} of the GPU; {note}"
    if limit < wanted:
        fitting = limit // (per_token * length)
        note += f" would be {bytes_text(wanted)}; {fitting} of full length fit at once"
    return [*parts, MemoryItem("KV cache", taken, note)]


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
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    attention = (text.num_attention_heads + 2 * heads) * _head_dim(text) + text.hidden_size
    mlp = 2 * text.intermediate_size + text.hidden_size
    return int(attention * (layers != "mlp") + mlp * (layers != "attention"))


def _mlp_elements(text: PretrainedConfig, joins_swiglu: bool) -> int:
    """Elements of a layer's MLP kept per token: 4 tensors of its width (2 if only gate and up are
    kept), or 4 for each of the token's experts."""
    num_active = getattr(text, "num_experts_per_tok", None)
    if not num_active:
        is_swiglu = getattr(text, "hidden_act", "") in ("silu", "swish")
        return int((2 if joins_swiglu and is_swiglu else 4) * text.intermediate_size)
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return int(num_active * (4 * width + 2 * text.hidden_size) + 4 * shared)


def _head_dim(text: PretrainedConfig) -> int:
    head_dim = getattr(text, "head_dim", None)
    return int(head_dim or text.hidden_size // text.num_attention_heads)
