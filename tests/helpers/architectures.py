"""One tiny random model of each architecture, and the table of docs/architectures.md.

`python -m tests.helpers.architectures` writes it; tests/models/test_architectures.py trains every
row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

DOC = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"
_WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.15}
_USUAL: dict[str, Any] = _WIDE | _HEADS | {"num_key_value_heads": 1}
_WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_HEAD = {"head_dim": 32}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.15}
_OLD = {"hidden_size": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.15}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A row of the table.

    Example: Architecture("Llama", "Llama 2 and 3, SmolLM 2", {"hidden_size": 64, ...})
    """

    name: str  # of transformers' classes, without ForCausalLM or LMHeadModel
    models: str  # who is of it
    settings: dict[str, Any] = field(default_factory=dict)  # of the tiny one's config
    mode: str = "lora"
    num_ends: int = 1  # tokens that end a completion
    refused: str = ""  # what the refusal says; empty: it trains
    advice: str = ""  # in the table, for a refused one
    vllm_refused: str = ""  # what the refusal says, if only the PyTorch sampler serves it

    @property
    def key(self) -> str:
        """Of the row, in test names."""
        return self.name if self.mode == "lora" else f"{self.name}-{self.mode}"

    @property
    def vllm(self) -> str:
        """In the table's column."""
        return "refused: `sampling.backend=torch`" if self.vllm_refused else "trains"


_LOGITS = "another model: its logits are scaled or capped"
_SDPA = "another model: transformers has no SDPA attention for it"

ARCHITECTURES = [
    Architecture(
        "Llama", "Llama 2 and 3, SmolLM 2, Yi", _USUAL | {"rope_parameters": _LLAMA3_ROPE},
        num_ends=40,
    ),
    Architecture("Qwen2", "Qwen 2 and 2.5", _USUAL | {"tie_word_embeddings": True}),
    Architecture("Qwen3", "Qwen 3", _USUAL | _HEAD),
    Architecture("Mistral", "Mistral 7B, Nemo, Small", _USUAL | {"sliding_window": 8}),
    Architecture("Gemma", "Gemma 1", _USUAL | _HEAD),
    Architecture("Gemma3", "Gemma 3, text", _USUAL | _HEAD | _WINDOW),
    Architecture("Phi", "Phi 1, 1.5 and 2", _USUAL),
    Architecture(
        "Phi3", "Phi 3, 3.5 and 4",
        _USUAL | {"original_max_position_embeddings": 512, "rope_parameters": _PARTIAL_ROPE},
    ),
    Architecture("Olmo", "OLMo 1", _USUAL),
    Architecture("Olmo2", "OLMo 2", _USUAL),
    Architecture("Olmo3", "OLMo 3", _USUAL | _WINDOW),
    Architecture("SmolLM3", "SmolLM 3", _USUAL | {"no_rope_layers": [1, 0]}),
    Architecture("GPTNeoX", "Pythia, GPT-NeoX", _WIDE | _HEADS),
    Architecture("Starcoder2", "StarCoder 2", _USUAL | {"sliding_window": None}),
    Architecture("Glm", "GLM 4 9B", _USUAL | _HEAD),
    Architecture("SeedOss", "Seed-OSS", _USUAL | _HEAD),
    Architecture("Arcee", "Arcee AFM", _USUAL),
    Architecture(
        "GPT2", "GPT-2", _GPT2,
        vllm_refused='vLLM serves no adapters on gpt2; set sampling.backend="torch"',
    ),
    Architecture("GPT2", "GPT-2, all weights (`lora.mode=full`)", _GPT2, mode="full"),
    Architecture(
        "Gemma2", "Gemma 2", _USUAL | _HEAD | _WINDOW,
        refused="scales or caps its logits .final_logit_softcapping=30.0", advice=_LOGITS,
    ),
    Architecture(
        "Granite", "Granite 3", _USUAL | {"logits_scaling": 8.0},
        refused="scales or caps its logits .logits_scaling=8.0", advice=_LOGITS,
    ),
    Architecture(
        "Cohere", "Command R", _USUAL,
        refused="scales or caps its logits .logit_scale=0.0625", advice=_LOGITS,
    ),
    Architecture(
        "Cohere2", "Command R7B", _USUAL | _WINDOW,
        refused="scales or caps its logits .logit_scale=0.0625", advice=_LOGITS,
    ),
    Architecture("Bloom", "BLOOM", _OLD, refused="no SDPA attention", advice=_SDPA),
    Architecture("GPTJ", "GPT-J", _GPT2 | {"rotary_dim": 16}, refused="no SDPA", advice=_SDPA),
    Architecture(
        "Mpt", "MPT", {"d_model": 64, "n_heads": 2, "n_layers": 2, "max_seq_len": 512},
        refused="no SDPA attention", advice=_SDPA,
    ),
]  # fmt: skip

SERVED = [row for row in ARCHITECTURES if not row.refused]
REFUSED = [row for row in ARCHITECTURES if row.refused]


def config_of(row: Architecture, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Two layers, 64 wide, of the tokenizer's vocabulary."""
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config_class: Any = getattr(transformers, f"{row.name}TextConfig", None)
    config_class = config_class or getattr(transformers, f"{row.name}Config")
    config: PretrainedConfig = config_class(**(row.settings | ids))
    return config


def make_architecture(row: Architecture, folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The tiny model's directory, with the tokenizer: float32 weights that do matter, also those
    that are made as zeros (biases) or ones (norms)."""
    torch.manual_seed(0)
    model_class: Any = getattr(transformers, f"{row.name}ForCausalLM", None)
    model_class = model_class or getattr(transformers, f"{row.name}LMHeadModel")
    model = model_class(config_of(row, tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.generation_config.eos_token_id = end_ids(row, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def end_ids(row: Architecture, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: the tokenizer's, and further ones of the row's number."""
    return [int(tokenizer.eos_token_id), *range(300, 299 + row.num_ends)]


def document() -> str:
    """docs/architectures.md."""
    lines = [
        "# Architectures",
        "",
        "`tests/models/test_architectures.py` tests each row on a tiny random model: it trains for",
        "a step on a CPU in float32 with each sampler, and sampler and learner have to agree on",
        "log-probs (`mismatch/kl` under 1e-6 nats); or it is refused by its config.json, before",
        "its weights are read. Written by `python -m tests.helpers.architectures`.",
        "",
        "| transformers class | models | torch | vLLM |",
        "|---|---|---|---|",
        *(f"| {row.name} | {row.models} | trains | {row.vllm} |" for row in SERVED),
        "",
        "Refused:",
        "",
        "| transformers class | models | instead |",
        "|---|---|---|",
        *(f"| {row.name} | {row.models} | {row.advice} |" for row in REFUSED),
        "",
        "Mixtures of experts (Mixtral, OLMoE, Qwen 2 and 3 MoE) have separate tests",
        "(`tests/*/test_*expert*.py`); with adapters on experts they need the PyTorch sampler or a",
        "GPU. Models that are quantized, that need their own code (`auto_map`), or whose type the",
        "installed transformers does not know are refused with a message.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    DOC.write_text(document(), encoding="utf-8")
