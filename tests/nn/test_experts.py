"""Adapters on experts, against transformers' own experts with the adapters merged in."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rl_lora.errors import UserError
from rl_lora.nn.context import adapters_off
from rl_lora.nn.experts import LoraExperts, attach_expert_lora, expert_rank, expert_tensors

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "num_experts_per_tok": 2}
TOKENS_BT = torch.arange(1, 25).reshape(2, 12)


def qwen3_moe() -> PreTrainedModel:
    more = {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 16}
    config = Qwen3MoeConfig(**SIZES, **more)
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config).eval()


def mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(**SIZES, num_local_experts=4, intermediate_size=24)
    ).eval()


each_model = pytest.mark.parametrize("make", [qwen3_moe, mixtral])


def experts_of(model: torch.nn.Module) -> list[LoraExperts]:
    return [module for module in model.modules() if isinstance(module, LoraExperts)]


@torch.no_grad()
def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for layer in experts_of(model):
        for matrix in layer.lora_B.values():
            matrix.add_(0.05 * torch.randn(matrix.shape, generator=generator))


@torch.no_grad()
def merged(model: PreTrainedModel, adapted: torch.nn.Module) -> PreTrainedModel:
    """transformers' own model with every expert's W + (alpha / rank) B A."""
    out = copy.deepcopy(model)
    for name, layer in adapted.named_modules():
        if isinstance(layer, LoraExperts):
            base = out.get_submodule(name)
            change = {p: layer.scaling * layer.lora_B[p] @ layer.lora_A[p] for p in layer.lora_A}
            base.gate_up_proj += torch.cat([change["gate_proj"], change["up_proj"]], dim=1)
            base.down_proj += change["down_proj"]
    return out


@each_model
def test_adapted_experts_equal_transformers_with_the_adapters_merged(make) -> None:  # type: ignore[no-untyped-def]
    base = make()
    adapted = copy.deepcopy(base)
    names = attach_expert_lora(adapted, rank=4, alpha=32.0, seed=0)
    assert len(names) == 2
    with torch.no_grad():
        before = adapted(input_ids=TOKENS_BT).logits
        assert torch.allclose(before, base(input_ids=TOKENS_BT).logits, atol=1e-5)  # B is zero
        shake(adapted)
        after = adapted(input_ids=TOKENS_BT).logits
        expected = merged(base, adapted)(input_ids=TOKENS_BT).logits
        assert float((after - before).abs().max()) > 1e-3
        assert torch.allclose(after, expected, atol=1e-5)
        with adapters_off():
            off = adapted(input_ids=TOKENS_BT).logits
        assert torch.allclose(off, base(input_ids=TOKENS_BT).logits, atol=1e-5)


@each_model
def test_only_the_adapters_of_experts_at_work_get_a_gradient(make) -> None:  # type: ignore[no-untyped-def]
    model = make()
    model.requires_grad_(False)
    attach_expert_lora(model, rank=2, alpha=32.0, seed=0)
    shake(model)
    model(input_ids=TOKENS_BT[:1, :1]).logits.sum().backward()  # one token: 2 experts a layer
    for layer in experts_of(model):
        for matrices in (layer.lora_A, layer.lora_B):
            gradient = matrices["down_proj"].grad
            assert gradient is not None
            assert int((gradient.flatten(1).abs().sum(1) > 0).sum()) == 2
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_rank_is_shared_by_the_active_experts() -> None:
    assert expert_rank(8, 2) == 4
    with pytest.raises(UserError, match=r"lora\.rank=1 is divided among 2 active experts"):
        expert_rank(1, 2)
    model = qwen3_moe()
    attach_expert_lora(model, rank=4, alpha=32.0, seed=0)
    (first, _) = experts_of(model)
    assert first.lora_A["gate_proj"].shape == (4, 2, 32)
    assert first.scaling == 16.0  # alpha 32 over rank 2
    # 2 layers x 4 experts x rank 2 x (gate and up: 32 + 24, down: 24 + 32)
    assert sum(t.numel() for t in expert_tensors(model).values()) == 2 * 4 * 2 * 3 * 56


def test_names_are_pefts_and_experts_start_apart() -> None:
    model = qwen3_moe()
    attach_expert_lora(model, rank=2, alpha=32.0, seed=0)
    tensors = expert_tensors(model)
    stem = "base_model.model.model.layers.0.mlp.experts"
    assert tensors[f"{stem}.3.gate_proj.lora_A.weight"].shape == (1, 32)
    assert tensors[f"{stem}.3.down_proj.lora_B.weight"].shape == (32, 1)
    first, other = (tensors[f"{stem}.{e}.gate_proj.lora_A.weight"] for e in (0, 1))
    assert not torch.equal(first, other)
    again = qwen3_moe()
    attach_expert_lora(again, rank=2, alpha=32.0, seed=0)
    assert torch.equal(first, expert_tensors(again)[f"{stem}.0.gate_proj.lora_A.weight"])
