"""A job with a quantized base: killed and resumed, refused without it, exported and served."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rl_lora.adapters.files import save_adapter
from rl_lora.batches import whole_sequence
from rl_lora.cli import main
from rl_lora.config import LoraSection, ModelSection, parse_config
from rl_lora.errors import UserError
from rl_lora.models.dequantized import dequantized_dir
from rl_lora.policy import Policy, open_policy
from tests.export.test_export import base_model
from tests.helpers.tiny_models import shake
from tests.runs.test_resume import kill_at, result, run
from tests.test_train import metrics_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
IDS = (1, 5, 9, 33, 2, 7)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)


@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_run_resumes_on_the_same_base_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ["model.quantize=nf4", "run.checkpoint_every=1"]
    run("rl", tmp_path, "run.name=whole", *own)
    kill_at(monkeypatch, "3", "rl", tmp_path, "run.name=killed", *own)
    for other in ("int8", "none"):
        with pytest.raises(UserError, match=r"model\.quantize='nf4'"):
            run("rl", tmp_path, "run.name=killed", f"model.quantize={other}", own[1], resume=True)
    run("rl", tmp_path, "run.name=killed", *own, resume=True)
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    assert all(row["mismatch/kl"] < 1e-7 for row in metrics_of(tmp_path / "whole"))
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["config"]["model"]["quantize"] == "nf4"


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path / "cache"))
    return base_model(tmp_path / "base")


def trained(base: Path, folder: Path, kind: str) -> tuple[Policy, Path]:
    model = ModelSection(name=str(base), device="cpu", dtype="float32", quantize=kind)
    policy = open_policy(base, model, LoraSection(rank=2), seed=0)
    shake(policy)
    return policy, save_adapter(policy, folder, version=1, run_name="r").path


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_merged_model_is_the_policy_that_was_trained(
    tmp_path: Path, base: Path, kind: str
) -> None:
    policy, adapter = trained(base, tmp_path / "adapters", kind)
    assert main(["export", str(adapter), "--merged", str(tmp_path / "merged")]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logprobs_TV = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
        own_T, _ = policy.token_logprobs(whole_sequence(IDS), 1.0)
    found_T = logprobs_TV[:-1].gather(1, torch.tensor(IDS[1:]).unsqueeze(1)).squeeze(1)
    assert torch.allclose(found_T, own_T, atol=1e-5)
    assert f"quantized to {kind}" in (tmp_path / "merged" / "README.md").read_text()


def test_the_card_and_the_serving_lines_name_the_base(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = trained(base, tmp_path / "adapters", "nf4")
    assert json.loads((adapter / "rl_lora.json").read_text())["trained_as"] == {
        "variant": "lora", "rank": 2, "quantize": "nf4", "dtype": "float32",
    }  # fmt: skip
    assert main(["export", str(adapter)]) == 0
    card = (adapter / "README.md").read_text()
    assert "| base in training | quantized to nf4" in card
    assert 'bnb_4bit_quant_type="nf4"' in card
    assert "torch.float32" in card
    capsys.readouterr()
    assert main(["serve-command", str(adapter)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "dequantized from nf4" in lines[0]
    made = str(dequantized_dir(base, "nf4", torch.float32))
    assert shlex.split(lines[2])[:3] == ["vllm", "serve", made]
    assert f"base = AutoModelForCausalLM.from_pretrained({made!r}, dtype='float32')" in lines


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lora": {"mode": "full"}}, r"lora\.mode='full'.*set lora\.mode='lora'"),
        ({"model": {"shard": True}}, r"set model\.shard=false"),
        ({"model": {"compile": True}}, r"set model\.compile=false"),
    ],
)
def test_what_a_quantized_base_is_not_combined_with(settings: dict[str, Any], text: str) -> None:
    model = {"quantize": "int8", **settings.pop("model", {})}
    with pytest.raises(UserError, match=text):
        parse_config({"model": model, **settings})
