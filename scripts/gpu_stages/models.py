"""Models of known shapes with random weights, made on the spot."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from gpu_stages.stages import Context
from rl_lora.config import LoraSection, ModelSection
from rl_lora.policy import Policy, open_policy

END = 2

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_theta": 100_000.0,
    },
    "qwen3-0.6b": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
    },
    "qwen3-8b": {
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_theta": 1_000_000.0,
    },
}
# Sizes on a CPU: the same architecture in four tiny layers.
TINY = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def make_config(shape: str, context: Context, num_layers: int | None = None) -> PretrainedConfig:
    """The shape's config on a GPU, a tiny one of the same architecture on a CPU.

    Args:
        shape: of SHAPES.
        num_layers: on a GPU, instead of the shape's own number.
    """
    sizes = SHAPES[shape] | ({} if context.is_gpu else TINY)
    if context.is_gpu and num_layers is not None:
        sizes = sizes | {"num_hidden_layers": num_layers}
    kind = Qwen3Config if shape.startswith("qwen3") else LlamaConfig
    return kind(
        **sizes,
        max_position_embeddings=8192,
        # Logits of about standard deviation 0.8: predictions that a wrong weight changes visibly.
        initializer_range=0.8 / sizes["hidden_size"] ** 0.5,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=0,
    )


def make_model(shape: str, context: Context, num_layers: int | None = None) -> Path:
    """The directory of a bfloat16 model with a tokenizer and fixed random weights."""
    config = make_config(shape, context, num_layers)
    folder = context.work / "models" / f"{shape}-{config.num_hidden_layers}-{context.device.type}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):  # stages may run at once
        if not (folder / "tokenizer.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            with torch.random.fork_rng(), torch.device(context.device):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            tame(model)
            model.save_pretrained(folder)
            write_tokenizer(folder, config.vocab_size)
    return folder


@torch.no_grad()
def tame(model: Any) -> None:
    """Scales what is added to the residual stream by 1 / sqrt(2 layers), as GPT-2 does (section
    2.3), so that a random model does not amplify rounding more than a trained one."""
    for layer in model.model.layers:
        for added in (layer.self_attn.o_proj, layer.mlp.down_proj):
            added.weight.mul_((2 * len(model.model.layers)) ** -0.5)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes a tokenizer whose token 5 is 't5'."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=f"t{END}", unk_token="t0"
    ).save_pretrained(folder)


def make_policy(
    folder: Path, context: Context, dtype: torch.dtype, *, compiles: bool | None = None
) -> Policy:
    """A policy of rank 1 on all layers; compiles: as `model.compile`."""
    section = ModelSection(
        name=str(folder),
        device=str(context.device),
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        compile=compiles,
    )
    return open_policy(folder, section, LoraSection(rank=1), seed=0)


@torch.no_grad()
def shake(policy: Policy, seed: int, size: float = 0.002) -> None:
    """Adds noise to A and B, so that the adapter matters: B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable().values():
        noise = torch.randn(parameter.shape, generator=generator) * size
        parameter.add_(noise.to(parameter))
