"""vLLM's engine arguments for a model and a machine. vLLM itself is not imported."""

from __future__ import annotations

import json
import os
import shutil
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from transformers import AutoConfig, PretrainedConfig

from rl_lora import distributed
from rl_lora.config import LoraSection, SamplingSection
from rl_lora.config.dynamic import round_size
from rl_lora.errors import UserError
from rl_lora.models.shapes import has_own_head, kv_bytes_per_token
from rl_lora.nn.experts import NUM_EXPERTS_KEYS
from rl_lora.nn.variants import served_rank

RANK_SLOTS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM rounds ranks up to one of these
CPU_NUM_SEQS = 128  # sequences decoded at once
GPU_NUM_SEQS = 256
CPU_BATCHED_TOKENS = 2048  # tokens per step
GPU_BATCHED_TOKENS = 2048  # vLLM's minimum per step; it refuses more sequences than tokens
CPU_BLOCK_SIZE = 32  # tokens of a KV cache block, the unit of prefix caching
CPU_COMPILED_STEPS = 20_000  # decoding steps above which compiling the model pays on a CPU
CPU_MEMORY_SHARE = 0.25  # of the free memory, at most, for the KV cache
# Batch sizes with a CUDA graph; a batch is filled up to the next one (above 64, by a quarter at
# most). Decoding reads all weights whatever the batch, so that this costs little, and each graph
# takes a tenth of a second to make (an engine has two of each, with and without an adapter) and
# some of the GPU's memory. vLLM's own list has 51 sizes up to 512.
_GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448)
_MAX_GRAPH_SIZE = 512  # vLLM's
# Bytes of a GPU that neither the engine nor the learner's weights take while sampling: the learner
# scores fixed tokens meanwhile, and both allocators have gaps.
RESERVE = 4 * 2**30
MAX_MEMORY_FRACTION = 0.95


class ServedPolicy(Protocol):
    """What a sampler needs to know of a `Policy`."""

    @property
    def model_dir(self) -> Path:
        """Has config.json, safetensors and tokenizer."""

    @property
    def lora(self) -> LoraSection:
        """Rank and kind of its adapters; mode "full": whole weights instead."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights, and in the engine also of KV cache and adapter."""

    @property
    def quantize(self) -> str | None:
        """As `model.quantize`: an engine gets the dequantized weights."""

    @property
    def device(self) -> torch.device:
        """cpu, or this process's GPU."""


@dataclass(frozen=True)
class EngineOptions:
    """Options of a vLLM engine; the defaults suit most machines.

    Example: EngineOptions(eager=True, memory_fraction=0.3)
    """

    eager: bool | None = None  # without compilation and CUDA graphs; None: on a CPU
    attention_backend: str | None = None  # on a GPU, e.g. TRITON_ATTN; None: vLLM's choice
    # Add the adapter to vLLM's own copy of the weights; None: in float32.
    merge_adapter: bool | None = None
    # Of the GPU's memory; None: what is free, less learner_bytes and RESERVE.
    memory_fraction: float | None = None
    # Of the KV cache on a GPU, whatever else is free; None: what memory_fraction leaves. vLLM finds
    # that out by measuring, which fails where others take memory of the GPU meanwhile.
    cache_bytes: int | None = None
    learner_bytes: int = 0  # GPU memory that the learner will still take and hold while sampling


def engine_options(
    section: SamplingSection, device: torch.device, learner_bytes: int
) -> EngineOptions:
    """The options of [sampling]. On a GPU memory_fraction is decided here, once: the learner holds
    some of `learner_bytes` already when a later engine is made.

    Raises:
        UserError: nothing would be left for the engine.
    """
    options = EngineOptions(
        eager=section.eager,
        attention_backend=section.attention_backend,
        merge_adapter=section.merge_adapter,
        memory_fraction=section.memory_fraction,
        learner_bytes=learner_bytes,
    )
    return with_memory_fraction(options, device) if device.type == "cuda" else options


def with_memory_fraction(options: EngineOptions, device: torch.device) -> EngineOptions:
    """The options with a memory_fraction, from what is free on the GPU now if none is set.

    Raises:
        UserError: nothing would be left for the engine.
    """
    if options.memory_fraction is not None:
        return options
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    fraction = memory_fraction(total, total - free + options.learner_bytes)
    if fraction <= 0:
        raise UserError(
            f"the GPU has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, and the learner "
            f"takes {options.learner_bytes / 2**30:.1f} GiB more: with {RESERVE / 2**30:.0f} GiB "
            "in reserve nothing is left for vLLM; end what else runs on the GPU, or take a smaller "
            "model or rank"
        )
    return replace(options, memory_fraction=fraction)


def memory_fraction(total: int, taken: int) -> float:
    """The engine's share of a GPU of `total` bytes, of which others take `taken`."""
    return min(MAX_MEMORY_FRACTION, (total - taken - RESERVE) / total)


def decoded_at_once(max_num_seqs: int | None, device_type: str) -> int:
    """Sequences that an engine decodes at once: so many, or what suits a device of this type."""
    return max_num_seqs or (CPU_NUM_SEQS if device_type == "cpu" else GPU_NUM_SEQS)


def engine_settings(
    model_dir: Path,
    options: EngineOptions,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    max_num_seqs: int | None = None,
) -> dict[str, Any]:
    """vLLM's engine arguments, without those for LoRA layers (LOG.md has the measurements).

    Raises:
        UserError: not even one sequence of max_model_len tokens fits into memory (CPU).
    """
    on_cpu = device.type == "cpu"
    num_seqs = decoded_at_once(max_num_seqs, device.type)
    settings: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_model_len + 1,  # a sequence is scored as a prompt with one token more
        "max_num_seqs": num_seqs,
        "enforce_eager": on_cpu if options.eager is None else options.eager,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": 1,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
        "seed": 0,
    }
    if has_own_head(model_dir, AutoConfig.from_pretrained(model_dir)):
        # vLLM goes by the config and would use the embedding; the learner goes by the files.
        settings["hf_overrides"] = {"tie_word_embeddings": False}
    if not on_cpu:
        return settings | _gpu_settings(options, num_seqs, device)
    cache_bytes = cpu_cache_bytes(
        text_config(model_dir),
        dtype=dtype,
        max_model_len=max_model_len,
        num_seqs=num_seqs,
        free_bytes=psutil.virtual_memory().available // distributed.local_size(),
    )
    return settings | {
        "block_size": CPU_BLOCK_SIZE,
        # A prompt split over two steps makes vLLM rewind its seeded generator, which a CPU
        # generator cannot do ("CPU Generator does not use offset"): prompts are not split.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCHED_TOKENS, num_seqs, max_model_len + 1),
        "kv_cache_memory_bytes": cache_bytes,
    }


def _gpu_settings(options: EngineOptions, num_seqs: int, device: torch.device) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "compilation_config": {
            # Separate graphs for batches without an adapter, which then skip its kernels.
            "cudagraph_specialize_lora": True,
            "cudagraph_capture_sizes": graph_sizes(num_seqs),
        },
        "enable_sleep_mode": True,  # for `VllmSampler.release_memory`
    }
    if device.index is not None:
        settings["device_ids"] = [device.index]  # of those in CUDA_VISIBLE_DEVICES
    if options.memory_fraction is not None:
        settings["gpu_memory_utilization"] = options.memory_fraction
    if options.cache_bytes is not None:
        settings["kv_cache_memory_bytes"] = options.cache_bytes
    if num_seqs > GPU_BATCHED_TOKENS:
        settings["max_num_batched_tokens"] = num_seqs
    if options.attention_backend is not None:
        settings["attention_backend"] = options.attention_backend
    return settings


def graph_sizes(num_seqs: int) -> list[int]:
    """Tokens of the batches that get a CUDA graph, up to twice num_seqs (for those that also read
    prompts), as in vLLM; a full batch of num_seqs gets its own.

    Example: graph_sizes(6) == [1, 2, 4, 6, 8, 12]
    """
    largest = min(2 * num_seqs, _MAX_GRAPH_SIZE)
    sizes = {*_GRAPH_SIZES, num_seqs, largest}
    return sorted(size for size in sizes if size <= largest)


def lora_settings(lora: LoraSection, dtype: torch.dtype) -> dict[str, Any]:
    """Engine arguments for LoRA layers in the engine; none in full fine-tuning."""
    if lora.mode != "lora":
        return {}
    rank = served_rank(lora)
    return {
        "enable_lora": True,
        "max_lora_rank": next(slot for slot in RANK_SLOTS if slot >= rank),
        "max_loras": 1,
        "lora_dtype": dtype,
    }


def is_worth_compiling(sampling: SamplingSection, num_steps: int) -> bool:
    """Whether compiling the model pays on a CPU for a training job of num_steps RL steps.

    It makes a decoding step 10 ms shorter, whatever the number of sequences (30 layers), and the
    start 75 s longer: 7,500 decoding steps make up for that (LOG.md). Both grow with the number of
    layers, not with their width. Compiling needs a C++ compiler and Python's headers.
    """
    num_sequences = round_size(sampling) * sampling.num_samples
    num_batches = -(-num_sequences // (sampling.max_num_seqs or CPU_NUM_SEQS))
    is_long = num_steps * num_batches * sampling.max_tokens >= CPU_COMPILED_STEPS
    has_compiler = shutil.which(os.environ.get("CXX", "g++")) is not None
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    return is_long and has_compiler and has_headers


def merges_adapter(
    merge_adapter: bool | None, lora: LoraSection, *, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the engine adds adapters to its own copy of the weights (`merged_weights`).

    Raises:
        UserError: merge_adapter is true where the sum would round the adapter away, or false where
            vLLM's LoRA layers do not compute in the dtype.
    """
    if lora.mode != "lora":
        return False
    is_exact = dtype == torch.float32
    if merge_adapter and not is_exact:
        raise UserError(
            f"sampling.merge_adapter=true with {dtype}: the sum would round the adapter away; "
            "leave it out, or set model.dtype='float32'"
        )
    if merge_adapter is False and is_exact and device.type != "cpu":
        raise UserError(
            f"sampling.merge_adapter=false with {dtype} on {device.type}: vLLM's LoRA kernels for "
            "GPUs compute in 16 bits only; leave it out, or set model.dtype='bfloat16'"
        )
    return is_exact if merge_adapter is None else merge_adapter


def cpu_cache_bytes(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    max_model_len: int,
    num_seqs: int,
    free_bytes: int,
) -> int:
    """Size of the KV cache: num_seqs full sequences, or CPU_MEMORY_SHARE of the free memory.

    Raises:
        UserError: one sequence of max_model_len tokens does not fit.
    """
    token_bytes = kv_bytes_per_token(config, dtype)
    num_blocks = -(-max_model_len // CPU_BLOCK_SIZE) + 1  # vLLM keeps one block for itself
    sequence_bytes = num_blocks * CPU_BLOCK_SIZE * token_bytes
    limit = int(CPU_MEMORY_SHARE * free_bytes)
    if sequence_bytes > limit:
        raise UserError(
            f"the KV cache of one sequence of {max_model_len} tokens takes "
            f"{sequence_bytes / 2**30:.1f} GiB, over {CPU_MEMORY_SHARE:.0%} of the free memory; "
            "lower sampling.max_tokens or data.max_prompt_tokens"
        )
    return min(num_seqs * sequence_bytes, limit)


def read_config(model_dir: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    config: dict[str, Any] = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return config


def text_config(model_dir: Path) -> PretrainedConfig:
    """The language model's part of a directory's config, under transformers' names, which the files
    need not have (GPT-2's n_embd is hidden_size)."""
    config: PretrainedConfig = AutoConfig.from_pretrained(model_dir).get_text_config()
    return config


def check_mixture(model_dir: Path, device: torch.device, *, merges: bool) -> None:
    """Raises UserError for a mixture of experts on a CPU, and where adapters are merged.

    With LoRA layers vLLM (0.32) computes any mixture's experts by Triton kernels, also those
    without an adapter, and on a CPU the first sample ends in an AttributeError within them; without
    LoRA layers it samples there with wrong experts once weights are reloaded. See
    tests/samplers/test_vllm_experts.py. Merging knows linear layers only.
    """
    if not any(read_config(model_dir).get(key) for key in NUM_EXPERTS_KEYS):
        return
    if device.type == "cpu":
        raise UserError(
            f"model {model_dir} is a mixture of experts, for which vLLM on a CPU serves neither "
            "adapters (not even on attention only) nor new weights; set "
            'sampling.backend="torch"'
        )
    if merges:
        raise UserError(
            f"model {model_dir} is a mixture of experts, for which vLLM serves no adapters in "
            'float32; set model.dtype="bfloat16" or sampling.backend="torch"'
        )


def check_model(model_dir: Path, max_model_len: int) -> None:
    """Raises UserError if config.json is missing, or the model's context too short."""
    if not (model_dir / "config.json").is_file():
        raise UserError(f"model directory {model_dir} has no config.json")
    limit = getattr(text_config(model_dir), "max_position_embeddings", None)
    if limit is not None and max_model_len > limit:
        raise UserError(
            f"prompts and completions of {max_model_len} tokens exceed the model's context of "
            f"{limit}; lower sampling.max_tokens or data.max_prompt_tokens"
        )
