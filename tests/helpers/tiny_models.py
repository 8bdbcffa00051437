"""Random tiny models for tests: real architectures, made in milliseconds, no download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rl_lora.config import LoraSection, ModelSection
from rl_lora.policy import Policy, open_policy

VOCAB = 97


def random_llama(path: Path, *, tied: bool = True, seed: int = 0, hidden: int = 64) -> Path:
    """A two-layer Llama of 97 tokens, grouped-query attention, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def small_config() -> LlamaConfig:
    """A shape to compute by hand; a layer: q, o 8x8; k, v 8x4; gate, up, down 8x16."""
    return LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
    )


def random_qwen3(path: Path) -> Path:
    """The same size in Qwen3's shape (norms on q and k)."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        initializer_range=0.2,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def random_gpt2(path: Path) -> Path:
    """Two layers of GPT-2, with biases that are not zero; its layers are Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.save_pretrained(path)
    return path


def make_policy(
    path: Path, *, seed: int = 0, keep_reference: bool = False, **lora: object
) -> Policy:
    """A float32 CPU policy over a model directory."""
    model = ModelSection(name=str(path), device="cpu", dtype="float32")
    section = LoraSection(**lora)  # type: ignore[arg-type]
    return open_policy(path, model, section, seed=seed, keep_reference=keep_reference)


@torch.no_grad()
def shake(policy: Policy, seed: int = 0, size: float = 0.02) -> None:
    """Random trainable weights, so that the adapter matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable().values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


_MIXTURE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def random_mixtral(path: Path, **more: Any) -> Path:
    """Two layers of 4 experts, 2 of them active, in Mixtral's shape."""
    torch.manual_seed(0)
    settings = _MIXTURE | {"num_local_experts": 4, "intermediate_size": 24} | more
    MixtralForCausalLM(MixtralConfig(**settings)).save_pretrained(path)
    return path


def random_qwen3_moe(path: Path, **more: Any) -> Path:
    """The same size in Qwen3-MoE's shape; `mlp_only_layers=[0]` makes the first layer dense."""
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 16}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**(_MIXTURE | sizes | more))).save_pretrained(path)
    return path


def random_qwen2_moe(path: Path, **more: Any) -> Path:
    """The same size in Qwen2-MoE's shape: a shared expert next to the others."""
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48}
    sizes |= {"shared_expert_intermediate_size": 40}
    Qwen2MoeForCausalLM(Qwen2MoeConfig(**(_MIXTURE | sizes | more))).save_pretrained(path)
    return path


def random_olmoe(path: Path, **more: Any) -> Path:
    """The same size in OLMoE's shape."""
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "intermediate_size": 24}
    OlmoeForCausalLM(OlmoeConfig(**(_MIXTURE | sizes | more))).save_pretrained(path)
    return path
