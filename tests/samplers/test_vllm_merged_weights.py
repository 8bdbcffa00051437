"""Adapters in the engine's own weights: how its layers are named in the model's files, and plain
weights, as a GPU's engine has them, written in place."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rl_lora.adapters.files import save_adapter
from rl_lora.samplers.vllm import merged_weights
from rl_lora.samplers.vllm.merged_weights import MergedWeights, _joined, read_terms
from tests.helpers.tiny_models import make_policy, random_llama, shake
from tests.samplers.test_vllm_sampler import (
    PARAMS,
    PROMPTS,
    differences,
    expected_logprobs,
    make_model,
    make_sampler,
    publish,
    pytestmark,
)

__all__ = ["pytestmark"]  # applies here, too


def test_an_engines_layer_is_that_of_the_files_or_several_joined() -> None:
    model = nn.Module()
    model.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # type: ignore[assignment]
    name = "model.layers.0.mlp.gate_up_proj"
    apart = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert _joined(model, name, [f"{layer}.weight" for layer in apart]) == apart
    assert _joined(model, name, [f"{name}.weight"]) == [name]  # GLM 4 has them joined
    assert _joined(model, "lm_head", []) == ["lm_head"]


def plain_layers(model: nn.Module) -> list[tuple[str, Any]]:
    layers = [(name, module) for name, module in model.named_modules() if "_proj" in name]
    assert len(layers) == 14
    return layers


def test_plain_weights_are_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same addresses, from the files each time, and rounded once."""
    folder = random_llama(tmp_path / "model")
    policy = make_policy(folder, rank=2)
    monkeypatch.setattr(merged_weights, "_linear_layers", plain_layers)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    places = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    merged = MergedWeights(model, folder)
    assert not merged.load()  # the base already
    for version in (1, 2):
        shake(policy, seed=version, size=0.05)
        adapter = save_adapter(policy, tmp_path / "a", version=version, run_name="test")
        terms = read_terms(adapter)
        merged.set_target(terms)
        assert merged.load()
        for name, weight in model.named_parameters():
            expected = before[name].double()
            if (term := terms.get(name.removesuffix(".weight"))) is not None:
                expected = expected + term.scaling * term.b_OR.double() @ term.a_RI.double()
                assert (weight - before[name]).abs().max() > 1e-4
            assert torch.equal(weight, expected.float()), name
    merged.unload()  # there is nothing to free
    merged.set_target({})
    assert merged.load()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert places == {name: weight.data_ptr() for name, weight in model.named_parameters()}


def test_plain_weights_of_another_layout_are_not_merged_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_llama(tmp_path / "model")
    monkeypatch.setattr(merged_weights, "_linear_layers", plain_layers)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    with pytest.raises(LookupError, match=r"layers\.1\.mlp\.down_proj has weights of \(\d+, \d+\)"):
        MergedWeights(model, folder)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("vllm_installed")
def test_an_engine_with_plain_weights_serves_merged_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own layers, q, k and v joined, without the packing that only a CPU has."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod as Method

    monkeypatch.setattr(Method, "process_weights_after_loading", lambda self, layer: None)
    monkeypatch.setattr(
        Method,
        "apply",
        lambda self, layer, x, bias=None: nn.functional.linear(x, layer.weight, bias),
    )
    model_dir = make_model(tmp_path / "model")
    with contextlib.closing(make_sampler(model_dir)) as sampler:
        assert sampler._merged is not None
        assert {one.is_packed for one in sampler._merged._layers} == {False, True}  # lm_head is
        for version in (1, 2):
            adapter = publish(model_dir, tmp_path / "a", version)
            sampler.set_adapter(adapter)
            for _ in range(2):
                groups = sampler.sample(PROMPTS, PARAMS)
                assert differences(model_dir, adapter, groups, PARAMS.temperature).max() < 1e-4
                assert differences(model_dir, None, groups, PARAMS.temperature).max() > 1e-2
                sampler.release_memory()
        sampler.set_adapter(None)
        ids = PROMPTS[2].token_ids
        found = torch.tensor(sampler.token_logprobs([ids])[0])
        torch.testing.assert_close(
            found, expected_logprobs(model_dir, None, ids), atol=1e-4, rtol=0
        )
