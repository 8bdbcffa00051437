"""What a back end would refuse is refused before data and model are read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora import build as job
from rl_lora.config import parse_config
from rl_lora.errors import UserError
from rl_lora.samplers.vllm import checks
from rl_lora.train import train
from tests.test_train import metrics_of, smoke


@pytest.mark.parametrize(
    ("device", "settings", "told"),
    [
        ("cuda", {"lora": {"lm_head": True}}, "lora.lm_head=true: vLLM on GPUs"),
        ("cuda:1", {}, "vLLM takes the first visible GPU"),
        (
            "cuda",
            {"sampling": {"merge_adapter": True}, "model": {"dtype": "bfloat16"}},
            "sampling.merge_adapter=true with torch.bfloat16: the sum would round",
        ),
        (
            "cuda",
            {"sampling": {"merge_adapter": False}, "model": {"dtype": "float32"}},
            "sampling.merge_adapter=false with torch.float32 on cuda: vLLM's LoRA kernels",
        ),
        (
            "cpu",
            {"sampling": {"merge_adapter": True}, "model": {"dtype": "bfloat16"}},
            "sampling.merge_adapter=true with torch.bfloat16",
        ),
    ],
)
def test_refused_before_data_and_model_are_read(
    device: str,
    settings: dict[str, Any],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "pick_device", lambda _: torch.device(device))
    raw: dict[str, Any] = {"data": "no-such-file.jsonl", "model": {}, **settings}
    raw["model"]["name"] = "tiny-fast"
    with pytest.raises(UserError, match=told), job.open_run(parse_config(raw)):
        pass


def test_missing_vllm_is_reported_before_data_and_model_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    model = {"name": "tiny-fast", "device": "cpu"}
    config = parse_config({"data": "no-such-file.jsonl", "model": model})
    with pytest.raises(UserError, match="vLLM is not installed"), job.open_run(config):
        pass


OWN_SAMPLER = """
from rl_lora.samplers.torch_sampler import TorchSampler

class CountingSampler(TorchSampler):
    num_batches = 0

    def sample(self, prompts_N, params, on_group=None):
        CountingSampler.num_batches += 1
        return super().sample(prompts_N, params, on_group)
"""


def test_a_sampler_from_outside_the_package_trains(
    tmp_path: Path, write_module: Callable[[str, str], Path]
) -> None:
    write_module("own_sampler", OWN_SAMPLER)
    settings = ["run.num_steps=1", "sampling.num_prompts=2", "sampling.max_tokens=8"]
    settings += ["data.held_out=2", "sampling.backend=own_sampler:CountingSampler"]
    train(smoke(tmp_path, *settings), quiet=True)
    assert sys.modules["own_sampler"].CountingSampler.num_batches == 3  # a step, two evaluations
    assert len(metrics_of(tmp_path / "smoke")) == 1


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        ("vlm", "did you mean 'vllm'.*or your own as 'module:Class'"),
        ("own:", "or your own as 'module:Class'"),
        (
            "no_such_module:Sampler",
            "'no_such_module:Sampler': no module 'no_such_module'",
        ),
        ("json:Sampler", "module 'json' has no function 'Sampler'"),
    ],
)
def test_an_unknown_sampler_is_reported_at_once(tmp_path: Path, backend: str, told: str) -> None:
    with (
        pytest.raises(UserError, match=told),
        job.open_run(smoke(tmp_path, f"sampling.backend={backend}", "data.train=no-such.jsonl")),
    ):
        pass


def test_staleness_needs_a_sampler_that_says_it_has_its_own_weights(tmp_path: Path) -> None:
    own = "sampling.backend=rl_lora.samplers.torch_sampler:TorchSampler"
    with (
        pytest.raises(UserError, match=r"sampling\.max_staleness=1: .*has_own_weights"),
        job.open_run(smoke(tmp_path, own, "sampling.max_staleness=1")),
    ):
        pass
