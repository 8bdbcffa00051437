"""LoRA's variants in a real vLLM engine: it serves what PEFT computes, and refuses DoRA."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from rl_lora.config import LoraSection
from rl_lora.errors import UserError
from tests.samplers.test_vllm_sampler import (
    PARAMS,
    PROMPTS,
    differences,
    make_model,
    make_sampler,
    publish,
    pytestmark,
)

__all__ = ["pytestmark"]  # applies here, too


@pytest.mark.usefixtures("vllm_installed")
def test_adapters_of_variants_are_served_as_peft_serves_them(tmp_path: Path) -> None:
    """One engine with room for PiSSA's served rank of 16 takes the others as well."""
    model = make_model(tmp_path / "model")
    lora = LoraSection(rank=8, variant="pissa")
    with contextlib.closing(make_sampler(model, lora=lora)) as sampler:
        for version, (variant, rank) in enumerate({"pissa": 8, "olora": 2, "rslora": 8}.items()):
            adapter = publish(model, tmp_path / "a", version, rank=rank, variant=variant)
            sampler.set_adapter(adapter)
            groups = sampler.sample(PROMPTS, PARAMS)
            assert differences(model, adapter, groups, PARAMS.temperature).max() < 1e-3, variant
            assert differences(model, None, groups, PARAMS.temperature).max() > 1e-2  # a control
        dora = publish(model, tmp_path / "a", 9, variant="dora")
        with pytest.raises(UserError, match="DoRA"):
            sampler.set_adapter(dora)
