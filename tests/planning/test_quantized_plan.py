"""The plan's bytes of a quantized base are those of its tensors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora.config import LoraSection, ModelSection, parse_config
from rl_lora.errors import UserError
from rl_lora.models.shapes import build_on_meta, known_config
from rl_lora.nn.quantized import QuantizedWeight, stored_bytes
from rl_lora.planning.counts import parameter_counts
from rl_lora.planning.memory import memory_plan
from rl_lora.planning.quantized import quantized_base
from rl_lora.policy import open_policy
from tests.helpers.tiny_models import random_gpt2, random_llama, random_mixtral


def test_bytes_of_a_weight_by_hand() -> None:
    # 300 x 100 values; int8: a float32 per row. nf4: 469 blocks of 64 (the last one partly
    # filled), whose scales of a byte are 2 blocks of 256 with a float32 each, and their offset.
    assert stored_bytes(300, 100, "int8") == 30_000 + 1200
    assert stored_bytes(300, 100, "nf4") == 15_000 + 469 + 8 + 4


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.parametrize("make", [random_llama, random_gpt2])
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_tensors(tmp_path: Path, make: Any, kind: Any, dtype: Any) -> None:
    path = make(tmp_path / "model")
    model = ModelSection(name=str(path), device="cpu", dtype=dtype, quantize=kind)
    policy = open_policy(path, model, LoraSection(rank=1), seed=0)
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    quantized = [p for p in frozen if isinstance(p, QuantizedWeight)]
    held = sum(p.stored_bytes if isinstance(p, QuantizedWeight) else p.nbytes for p in frozen)
    num_base = sum(p.numel() for p in frozen)
    found = quantized_base(policy.model.config, num_base, kind, policy.dtype)
    assert found.num_bytes == held
    largest = max(p.dequantized().nbytes for p in quantized)
    # int8 is dequantized to float32 first.
    assert found.layer == largest * (3 if (kind, dtype) == ("int8", "bfloat16") else 1)


def test_a_plan_by_hand() -> None:
    model = {"name": "meta-llama/Llama-3.1-8B", "device": "cuda", "dtype": "bfloat16"}
    sampling = {"max_tokens": 256, "num_prompts": 4, "num_samples": 8}
    config = parse_config({"model": model | {"quantize": "nf4"}, "sampling": sampling})
    shape = known_config("meta-llama/Llama-3.1-8B")
    assert shape is not None
    counts = parameter_counts(build_on_meta(shape), config.lora)
    parts = memory_plan(config, shape, counts.base, counts.trainable, 64 * 2**30)
    # 32 layers of 218,103,808 linear weights, all multiples of 64 * 256: half a byte, 1/64 byte
    # and 4 / 16,384 bytes each, and an offset of 4 bytes for each of 7 matrices.
    linear = 32 * 218_103_808
    stored = linear // 2 + linear // 64 + linear // 4096 + 32 * 7 * 4
    assert [(part.part, part.num_bytes) for part in parts[:2]] == [
        ("base weights", stored + 2 * (counts.base - linear)),
        ("dequantized layer", 2 * 4096 * 14336),
    ]
    assert parts[0].note == "learner, nf4"
    (engine,) = (part for part in parts[2:] if part.part == "base weights")
    assert engine.num_bytes == 2 * counts.base
    assert engine.note.startswith("vLLM's copy, dequantized")


def test_a_mixture_has_no_plan(tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(random_mixtral(tmp_path / "model"))
    with pytest.raises(UserError, match=r"remove model\.quantize"):
        quantized_base(config, 1000, "nf4", torch.float32)
