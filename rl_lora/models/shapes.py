"""A model's shape without its weights, from config.json or a table of known models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rl_lora.config import ModelSection
from rl_lora.errors import UserError
from rl_lora.models.architectures import check_config
from rl_lora.models.resolve import list_models
from rl_lora.models.tiny import RECIPES

HEAD_NAMES = ("lm_head", "embed_out")  # of the output layer


# limits: one row of the table below; config.json has the same six numbers
def _shape(
    hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    shape = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return shape | {"vocab_size": vocabulary, **more}


# Shapes of the models in the shipped configs, so that a dry run needs no network; from config.json
# in the hub repository (smollm2-135m-instruct: HuggingFaceTB/SmolLM2-135M-Instruct).
KNOWN_SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "meta-llama/Llama-3.1-8B": (
        LlamaConfig,
        _shape(4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False),
    ),
    "Qwen/Qwen3-8B-Base": (
        Qwen3Config,
        _shape(4096, 12288, 36, 32, 8, 151936, head_dim=128, tie_word_embeddings=False),
    ),
    "Qwen/Qwen3-30B-A3B-Base": (
        Qwen3MoeConfig,
        _shape(2048, 6144, 48, 32, 4, 151936, head_dim=128, tie_word_embeddings=False)
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
    "smollm2-135m-instruct": (
        LlamaConfig,
        _shape(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    ),
}


def known_config(name: str) -> PretrainedConfig | None:
    """The shape of a model in KNOWN_SHAPES or of a tiny model; None for others."""
    if name in RECIPES:
        return RECIPES[name].config()
    config_class, shape = KNOWN_SHAPES.get(name, (None, {}))
    return None if config_class is None else config_class(**shape)


def find_model_dir(name: str) -> Path | None:
    """The model's local directory, if it is a directory or already made; else None."""
    if entry := next((entry for entry in list_models() if entry.name == name), None):
        return entry.path
    path = Path(name).expanduser()
    return path if path.is_dir() else None


def load_model_config(
    section: ModelSection, model_dir: Path | None
) -> tuple[PretrainedConfig, str]:
    """The model's config and where it was found, without network if possible.

    Searched in this order: model_dir, the hub's local cache, KNOWN_SHAPES, the hub.

    Raises:
        UserError: it is in none of them.
    """
    if model_dir is not None:
        return check_config(model_dir), str(model_dir)
    name, revision = section.name, section.revision
    try:
        local = AutoConfig.from_pretrained(
            name, revision=revision, local_files_only=True, trust_remote_code=False
        )
        return local, "the hub's cache"
    except (OSError, ValueError, KeyError):
        known = known_config(name)
    if known is not None:
        return known, "the built-in table (its config.json is not on this machine)"
    try:
        hub = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        return hub, "the hub"
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"model.name={name!r}: its config.json is not on this machine and cannot be "
            "downloaded; give a directory, or download the model on a machine with network"
        ) from error


def has_own_head(model_dir: Path, config: PretrainedConfig) -> bool:
    """Whether the files have a separate lm_head although the config ties it to the embedding.

    transformers then unties them, if both tensors are in the files and differ; this is the same
    check without loading the model.
    """
    if not any(c.tie_word_embeddings for c in (config, config.get_text_config())):
        return False
    files: dict[str, Path] = {}
    for path in model_dir.glob("*.safetensors"):
        with safe_open(path, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), path)
    if not any(name.removesuffix(".weight").endswith(HEAD_NAMES) for name in files):
        return False
    model: Any = build_on_meta(config)
    tied: dict[str, str] = model.all_tied_weights_keys

    def read(name: str) -> Any:
        with safe_open(files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    return any(
        head in files and source in files and not torch.equal(read(head), read(source))
        for head, source in tied.items()
    )


def build_on_meta(config: PretrainedConfig) -> nn.Module:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def head_size(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def attention_widths(config: PretrainedConfig) -> tuple[int, int]:
    """Widths of a layer's queries, and of its keys, for one token: all heads together."""
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = head_size(config)
    return config.num_attention_heads * size, key_heads * size


def mlp_width(config: PretrainedConfig) -> int:
    """Width of a layer's MLP; of one expert, in a mixture."""
    names = ("moe_intermediate_size", "intermediate_size", "n_inner")  # the last is GPT-2's
    widths = (getattr(config, name, None) for name in names)
    return next(filter(None, widths), 4 * config.hidden_size)  # GPT-2's if n_inner is None


def kv_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of all layers for one token."""
    text = config.get_text_config()
    return 2 * text.num_hidden_layers * attention_widths(text)[1] * dtype.itemsize
