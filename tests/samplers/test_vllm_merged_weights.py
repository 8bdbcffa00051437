"""The names under which the model's files have the layers of an engine."""

from __future__ import annotations

from torch import nn

from rl_lora.samplers.vllm.merged_weights import _joined


def test_an_engines_layer_is_that_of_the_files_or_several_joined() -> None:
    model = nn.Module()
    model.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # type: ignore[assignment]
    name = "model.layers.0.mlp.gate_up_proj"
    apart = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"]
    assert _joined(model, name, [f"{layer}.weight" for layer in apart]) == apart
    assert _joined(model, name, [f"{name}.weight"]) == [name]  # GLM 4 has them joined
    assert _joined(model, "lm_head", []) == ["lm_head"]
