"""Mixtures of experts through the policy: what trains, what is saved, what PEFT makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rl_lora.adapters.files import load_tensors, open_adapter, save_adapter
from rl_lora.adapters.peft_files import lora_settings
from rl_lora.batches import pack_samples, whole_sequence
from rl_lora.config import LoraSection, ModelSection
from rl_lora.errors import UserError
from rl_lora.learner import Learner
from rl_lora.nn.experts import expert_adapters
from rl_lora.nn.lora import lora_layers
from rl_lora.policy import Policy, open_policy
from rl_lora.samplers.liveness import check_at_start
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.types import Microbatch, Prompt, TrainSample
from tests.helpers.tiny_models import (
    make_policy,
    random_llama,
    random_mixtral,
    random_olmoe,
    random_qwen2_moe,
    random_qwen3_moe,
    shake,
)

IDS_BT = torch.arange(1, 25).reshape(2, 12)
each_mixture = pytest.mark.parametrize(
    "make", [random_mixtral, random_qwen3_moe, random_qwen2_moe, random_olmoe]
)
Make = Callable[..., Path]


def batches(*, share_prompts: bool, microbatch_tokens: int = 256) -> list[Microbatch]:
    samples = [
        TrainSample((5, 6, 7), completion, (-1.0,) * len(completion), advantage, 0)
        for completion, advantage in (((8, 9, 10, 11), 1.0), ((12, 13), -1.0), ((14, 4, 3), 0.5))
    ]
    (packed,) = pack_samples(
        samples,
        microbatch_tokens=microbatch_tokens,
        share_prompts=share_prompts,
    )
    return packed


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS_BT).logits.float()
    return logits


def learner_of(policy: Policy) -> Learner:
    return Learner(policy, 1e-2)


@pytest.mark.parametrize(
    ("layers", "num_linear", "num_experts"), [("all", 14, 2), ("mlp", 6, 2), ("attention", 8, 0)]
)
def test_layers_choose_experts_and_linear_layers(
    tmp_path: Path, layers: str, num_linear: int, num_experts: int
) -> None:
    policy = make_policy(random_qwen2_moe(tmp_path / "m"), rank=4, layers=layers)
    linear = dict(lora_layers(policy.model))
    assert len(linear) == num_linear  # 4 of attention, 3 of the shared expert; no router
    assert not any(name.endswith("gate") for name in linear)
    assert {layer.lora_A.shape[0] for layer in linear.values()} == {4}
    experts = dict(expert_adapters(policy.model))
    assert len(experts) == num_experts
    assert all(layer.lora_A["up_proj"].shape == (4, 2, 32) for layer in experts.values())
    assert all(layer.scaling == 16.0 for layer in experts.values())  # alpha 32, rank 4 / 2


@each_mixture
def test_a_fast_pass_has_the_values_and_gradients_of_one_completion_a_row(
    make: Make, tmp_path: Path
) -> None:
    path = make(tmp_path / "m")
    found = []
    for share_prompts in (False, True):
        policy = make_policy(path, rank=4)
        shake(policy)
        assert policy.can_share_prompts
        if not share_prompts:
            policy.model.set_attn_implementation("sdpa")
        (batch,) = batches(share_prompts=share_prompts)
        logprobs_C, _ = policy.token_logprobs(batch, temperature=0.8)
        weights_C = batch.weights_C * batch.advantages_C
        names = list(policy.trainable())
        gradients = torch.autograd.grad(
            (weights_C * logprobs_C).sum(), list(policy.trainable().values())
        )
        found.append((batch, logprobs_C.detach(), dict(zip(names, gradients, strict=True))))
    (slow, slow_C, slow_grads), (fast, fast_C, fast_grads) = found
    assert torch.allclose(
        slow_C[slow.target_ids_C.argsort()],  # each token occurs once
        fast_C[fast.target_ids_C.argsort()],
        atol=1e-5,
    )
    assert any("experts" in name for name in slow_grads)
    for name, gradient in slow_grads.items():
        assert torch.allclose(gradient, fast_grads[name], atol=1e-5), name


def test_checkpointed_activations_change_no_gradient_and_no_routing(tmp_path: Path) -> None:
    path = random_mixtral(tmp_path / "m", router_jitter_noise=0.5)
    grads = []
    for flag in (False, True):
        policy = open_policy(
            path,
            ModelSection(name=str(path), device="cpu", dtype="float32"),
            LoraSection(rank=2),
            seed=0,
            checkpoint_activations=flag,
        )
        shake(policy)
        (batch,) = batches(share_prompts=True)
        with policy.training():
            policy.token_logprobs(batch, temperature=1.0)[0].sum().backward()
        grads.append({name: p.grad for name, p in policy.trainable().items()})
    for name, expected in grads[0].items():
        assert expected is not None
        assert torch.allclose(expected, grads[1][name], atol=1e-5), name


@each_mixture
def test_training_moves_every_expert_at_work_and_no_base_weight(make: Make, tmp_path: Path) -> None:
    policy = make_policy(make(tmp_path / "m"), rank=2)
    shake(policy)
    before = policy.base_fingerprint()
    used: dict[str, set[int]] = {name: set() for name, _ in expert_adapters(policy.model)}
    hooks = [
        layer.register_forward_pre_hook(  # nothing is predicted from the last token
            lambda module, args, name=name: used[name].update(args[1][:-1].unique().tolist())
        )
        for name, layer in expert_adapters(policy.model)
    ]
    policy.token_logprobs(whole_sequence((5, 6, 7)), temperature=1.0)[0].sum().backward()
    for hook in hooks:
        hook.remove()
    for name, layer in expert_adapters(policy.model):
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            assert matrix.grad is not None
            moved = set(torch.where(matrix.grad.flatten(1).abs().sum(1) > 0)[0].tolist())
            assert moved == used[name]
    assert any(0 < len(experts) < 4 for experts in used.values())  # some are idle, and stay
    policy.model.zero_grad()
    learner = learner_of(policy)
    old = {name: t.clone() for name, t in policy.published_tensors().items()}
    for _ in range(2):
        metrics = learner.update([batches(share_prompts=True, microbatch_tokens=8)])
        assert metrics["learn/updates"] == 1.0
    new = policy.published_tensors()
    assert any(not torch.equal(old[n], new[n]) for n in old if ".experts." in n)
    assert policy.base_fingerprint() == before


@pytest.mark.parametrize("layers", ["all", "mlp", "attention"])
@pytest.mark.parametrize("make", [random_mixtral, random_qwen3_moe, random_olmoe])
def test_peft_computes_what_we_compute(make: Make, layers: str, tmp_path: Path) -> None:
    path = make(tmp_path / "m")
    policy = make_policy(path, rank=4, layers=layers)
    shake(policy, size=0.1)
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    plain = logits_of(base)
    peft = PeftModel.from_pretrained(base, str(adapter.path)).eval()
    own = logits_of(policy.model)
    assert torch.allclose(logits_of(peft), own, atol=1e-5)
    assert float((own - plain).abs().max()) > 0.1
    with policy.adapter_off():
        assert torch.allclose(logits_of(policy.model), plain, atol=1e-5)


@each_mixture
def test_a_saved_adapter_loads_to_the_bit(make: Make, tmp_path: Path) -> None:
    path = make(tmp_path / "m")
    policy = make_policy(path, rank=4)
    shake(policy)
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r")
    assert lora_settings(adapter.path)["rank"] == 4
    raw = json.loads((adapter.path / "adapter_config.json").read_text())
    assert (raw["r"], raw["rank_pattern"]["self_attn.q_proj"]) == (2, 4)
    other = make_policy(path, rank=4, seed=1)
    assert open_adapter(adapter.path, other).rank == 4
    assert torch.equal(logits_of(other.model), logits_of(policy.model))
    with pytest.raises(UserError, match=r"has rank 4; set lora\.rank=4"):
        open_adapter(adapter.path, make_policy(path, rank=2))


def test_names_are_those_of_the_models_files(tmp_path: Path) -> None:
    for make, stem in (
        (random_mixtral, "model.layers.1.block_sparse_moe.experts.3.w2"),
        (random_qwen3_moe, "model.layers.1.mlp.experts.3.down_proj"),
    ):
        path = make(tmp_path / make.__name__)
        assert f"{stem}.weight" in load_tensors_of_base(path)
        tensors = make_policy(path, rank=4).published_tensors()
        assert tensors[f"base_model.model.{stem}.lora_A.weight"].shape == (2, 24)
        assert tensors[f"base_model.model.{stem}.lora_B.weight"].shape == (32, 2)


def load_tensors_of_base(path: Path) -> dict[str, torch.Tensor]:
    return load_tensors(path)  # model.safetensors, as of a full version


@each_mixture
def test_all_weights_are_published_under_the_names_of_the_models_files(
    make: Make, tmp_path: Path
) -> None:
    path = make(tmp_path / "m")
    policy = make_policy(path, mode="full")
    published = policy.published_tensors()
    files = load_tensors_of_base(path)
    assert published.keys() == files.keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in files.items())
    shake(policy)
    version = save_adapter(policy, tmp_path / "full", version=1, run_name="r")
    other = make_policy(path, mode="full")
    open_adapter(version.path, other)
    assert torch.equal(logits_of(other.model), logits_of(policy.model))


def test_the_sampler_serves_the_learners_experts(tmp_path: Path) -> None:
    policy = make_policy(random_mixtral(tmp_path / "m"), rank=2)
    sampler = TorchSampler(policy, tokenizer=Mock(), end_token_ids=[2], max_model_len=64)
    prompts = [Prompt(str(i), "t", "", "", tuple(range(3 + i, 20 + i))) for i in range(2)]
    before = {name: t.clone() for name, t in policy.published_tensors().items()}
    found = check_at_start(policy, sampler, prompts, tmp_path, max_kl=None)
    assert found["probe"] < 1e-5
    assert found["base"] < 1e-5
    assert found["control"] > 0.01
    assert all(torch.equal(before[n], t) for n, t in policy.published_tensors().items())


def test_ranks_and_models_that_do_not_go_get_one_clear_error(tmp_path: Path) -> None:
    path = random_mixtral(tmp_path / "m")
    (path / "model.safetensors").write_bytes(b"junk")  # refused before it is read
    with pytest.raises(UserError, match=r"lora\.rank=3 is divided among 2 active.*multiple of 2"):
        make_policy(path, rank=3)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "minimax", "architectures": ["MiniMaxForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"type 'minimax' are not supported.*mixtral.*attention"):
        make_policy(path, rank=2)
    dense = make_policy(random_llama(tmp_path / "dense"), rank=3)
    assert dense.expert_names == ()
