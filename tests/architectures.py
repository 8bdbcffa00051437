"""One tiny random model of each architecture, to be trained a step on both back ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

_WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15}
_USUAL: dict[str, Any] = _WIDE | _HEADS | {"num_key_value_heads": 1}
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32}

# Class name without ForCausalLM or LMHeadModel -> (what it is of, settings of its config)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama 2 and 3, SmolLM 2, Yi", _USUAL),
    "Qwen2": ("Qwen 2 and 2.5", _USUAL | {"tie_word_embeddings": True}),
    "Qwen3": ("Qwen 3", _USUAL | {"head_dim": 32}),
    "Mistral": ("Mistral 7B, Nemo, Small", _USUAL | {"sliding_window": 8}),
    "Ministral": ("Ministral", _USUAL | _WINDOW),
    "Gemma": ("Gemma 1", _USUAL | {"head_dim": 32}),
    "Gemma2": ("Gemma 2 without its cap", _USUAL | _GEMMA | _WINDOW | {"final_logit_softcapping": None}),
    "Gemma3": ("Gemma 3 (text)", _USUAL | _GEMMA | _WINDOW),
    "Phi3": ("Phi 3, 3.5 and 4", _USUAL | {"original_max_position_embeddings": 512}),
    "Phi": ("Phi 1, 1.5 and 2", _USUAL),
    "Olmo": ("OLMo 1", _USUAL),
    "Olmo2": ("OLMo 2", _USUAL),
    "Olmo3": ("OLMo 3", _USUAL | _WINDOW),
    "SmolLM3": ("SmolLM 3", _USUAL),
    "GPTNeoX": ("Pythia, GPT-NeoX", _WIDE | _HEADS),
    "Starcoder2": ("StarCoder 2", _USUAL | {"sliding_window": None}),
    "Glm": ("GLM 4 9B", _USUAL | {"head_dim": 32}),
    "Glm4": ("GLM 4 0414", _USUAL | {"head_dim": 32}),
    "SeedOss": ("Seed-OSS", _USUAL | {"head_dim": 32}),
    "Arcee": ("Arcee AFM", _USUAL),
    "Apertus": ("Apertus", _USUAL),
    "Exaone4": ("EXAONE 4", _USUAL | _WINDOW),
    "Nemotron": ("Nemotron, Minitron", _USUAL),
    "StableLm": ("StableLM 2", _USUAL),
    "Helium": ("Helium", _USUAL | {"head_dim": 32}),
    "Ernie4_5": ("ERNIE 4.5", _USUAL | {"head_dim": 32}),
    "HunYuanDenseV1": ("Hunyuan dense", _USUAL | {"head_dim": 32}),
    "Granite": ("Granite 3 (unscaled)", _USUAL),
    "Cohere": ("Command R", _USUAL),
    "Cohere2": ("Command R7B", _USUAL | _WINDOW),
    "GPT2": ("GPT-2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.15}),
    "OPT": ("OPT", {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "max_position_embeddings": 512, "word_embed_proj_dim": 64, "init_std": 0.15}),
    "Bloom": ("BLOOM", {"hidden_size": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.15}),
    "GPTJ": ("GPT-J", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "rotary_dim": 16, "initializer_range": 0.15}),
    "Falcon": ("Falcon", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.15}),
    "GPTBigCode": ("StarCoder 1", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.15}),
    "Mpt": ("MPT", {"d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 512}),
    "Lfm2": ("LFM 2", _USUAL | {"layer_types": ["conv", "full_attention"]}),
    "Dots1": ("dots", _USUAL),
}  # fmt: skip


def make_architecture(
    name: str, folder: Path, tokenizer: PreTrainedTokenizerBase, **more: Any
) -> Path:
    """Two layers, 64 wide, of float32 weights that do matter, with the tokenizer beside them."""
    _, settings = ARCHITECTURES[name]
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{name}TextConfig", None) or getattr(
        transformers, f"{name}Config"
    )
    model_class = getattr(transformers, f"{name}ForCausalLM", None) or getattr(
        transformers, f"{name}LMHeadModel"
    )
    model_class(config_class(**(settings | ids | more))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
