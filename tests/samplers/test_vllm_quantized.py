"""vLLM computes with the dequantized weights of the learner's quantized base."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora.adapters.files import save_adapter
from rl_lora.batches import whole_sequence
from rl_lora.config import LoraSection, ModelSection
from rl_lora.policy import open_policy
from rl_lora.samplers.vllm.sampler import EngineOptions, VllmSampler
from tests.helpers.tiny_models import shake
from tests.samplers.test_vllm_sampler import make_model

IDS = tuple(range(3, 40))


@pytest.mark.slow
@pytest.mark.usefixtures("vllm_installed")
@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares float32 of vLLM's CPU back end")
@pytest.mark.parametrize("merges", [True, pytest.param(False, marks=pytest.mark.long)])
def test_logprobs_are_the_learners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merges: bool
) -> None:
    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path / "cache"))
    path = make_model(tmp_path / "model")
    own: dict[str, Any] = {"name": str(path), "device": "cpu", "dtype": "float32"}
    policy = open_policy(path, ModelSection(**own, quantize="nf4"), LoraSection(rank=2), seed=0)
    shake(policy, size=0.05)
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r")
    plain = open_policy(path, ModelSection(**own), LoraSection(rank=2), seed=0)
    options = EngineOptions(merge_adapter=merges)
    with contextlib.closing(
        VllmSampler(policy, max_model_len=64, max_num_seqs=4, end_token_ids=[2], engine=options)
    ) as sampler:
        for version in (None, adapter):
            sampler.set_adapter(version)
            found = torch.tensor(sampler.token_logprobs([IDS])[0])
            with policy.adapter_off() if version is None else contextlib.nullcontext():
                wanted, _ = policy.token_logprobs(whole_sequence(IDS), 1.0)
            assert torch.allclose(found, wanted.detach(), atol=1e-4)
            if version is None:
                unquantized = plain.reference_logprobs(whole_sequence(IDS), 1.0)
                assert not torch.allclose(found, unquantized, atol=1e-2)
