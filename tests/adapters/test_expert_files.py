"""Mixtures of experts out of the house: merged, fitted to another rank, described; whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_lora.adapters.files import load_tensors, open_adapter, save_adapter
from rl_lora.adapters.model_card import card_text
from rl_lora.adapters.peft_files import is_peft_loadable
from rl_lora.adapters.resize import common_settings, fitted
from rl_lora.cli import main
from rl_lora.config import ModelSection, load_config
from rl_lora.config.sft import load_sft_config
from rl_lora.errors import UserError
from rl_lora.export.merge import export_merged
from rl_lora.models.resolve import resolve_model
from rl_lora.samplers.vllm.process import process_kept
from rl_lora.samplers.vllm.settings import check_mixture
from rl_lora.sft.train import fine_tune
from rl_lora.train import train
from tests.helpers.tiny_models import (
    make_policy,
    random_mixtral,
    random_olmoe,
    random_qwen2_moe,
    random_qwen3_moe,
    shake,
)

ROOT = Path(__file__).resolve().parents[2]
IDS_BT = torch.arange(1, 25).reshape(2, 12)
each_mixture = pytest.mark.parametrize(
    "make", [random_mixtral, random_qwen3_moe, random_qwen2_moe, random_olmoe]
)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS_BT).logits.float()
    return logits


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@each_mixture
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_merged_mixture_computes_what_the_policy_computes(
    make: Any, mode: str, tmp_path: Path
) -> None:
    base = make(tmp_path / "base")
    (base / "tokenizer.json").write_text("{}")  # an export wants one, whatever is in it
    policy = make_policy(base, mode=mode, rank=4)
    shake(policy, size=0.05)
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r")
    merged = export_merged(base, adapter.path, tmp_path / "merged")
    own = logits_of(policy.model)
    assert torch.allclose(logits_of(load(merged)), own, atol=1e-5)
    assert float((own - logits_of(load(base))).abs().max()) > 0.1
    assert (
        load_file(merged / "model.safetensors").keys()
        == load_file(base / "model.safetensors").keys()
    )


def test_an_adapter_of_lower_rank_is_served_as_one_of_higher_rank(tmp_path: Path) -> None:
    base = random_mixtral(tmp_path / "base")
    low, high = make_policy(base, rank=2), make_policy(base, rank=8)
    shake(low)
    saved = save_adapter(low, tmp_path / "low", version=1, run_name="low").path
    wide = fitted(saved, high, tmp_path / "wide")
    open_adapter(wide, high)
    assert torch.allclose(logits_of(high.model), logits_of(low.model), atol=1e-5)


@pytest.mark.parametrize("layers", ["all", "mlp", "attention"])
def test_an_evaluation_finds_rank_and_layers_of_an_adapter(layers: str, tmp_path: Path) -> None:
    policy = make_policy(random_mixtral(tmp_path / "base"), rank=4, layers=layers)
    path = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r").path
    found = common_settings([path])
    assert (found["rank"], found["layers"]) == (4, layers)


def test_the_card_of_a_mixture_has_both_ranks(tmp_path: Path) -> None:
    policy = make_policy(random_qwen3_moe(tmp_path / "base"), rank=4)
    path = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r").path
    text = card_text(path)
    assert "| rank, alpha | 4, 32 |" in text
    assert "| rank of one expert | 2 |" in text
    assert "PeftModel.from_pretrained" in text


@pytest.mark.parametrize(
    ("make", "more"), [(random_qwen2_moe, {}), (random_qwen3_moe, {"mlp_only_layers": [0]})]
)
def test_what_peft_cannot_load_is_said_on_the_card(make: Any, more: Any, tmp_path: Path) -> None:
    """Dense layers named as experts are: PEFT 0.21 leaves them without adapter."""
    base = make(tmp_path / "base", **more)
    policy = make_policy(base, rank=4)
    shake(policy, size=0.05)
    path = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r").path
    assert not is_peft_loadable(path)
    text = card_text(path)
    assert "PEFT cannot load this adapter" in text
    assert "PeftModel" not in text
    peft = PeftModel.from_pretrained(load(base), str(path)).eval()
    own = logits_of(policy.model)
    assert not torch.allclose(logits_of(peft), own, atol=1e-3)  # once it is, lift the refusal
    attention = make_policy(base, rank=4, layers="attention")
    path = save_adapter(attention, tmp_path / "attention", version=1, run_name="r").path
    assert is_peft_loadable(path)


@pytest.mark.usefixtures("vllm_installed")
@each_mixture
def test_vllm_reads_every_experts_matrices_and_scalings(make: Any, tmp_path: Path) -> None:
    """vLLM's own reader of adapters, which needs no engine: names, shapes, alpha / rank."""
    with process_kept():
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper
    policy = make_policy(make(tmp_path / "base"), rank=4)
    shake(policy)
    path = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r").path
    helper = PEFTHelper.from_local_dir(str(path), None)
    tensors = load_tensors(path)
    read = LoRAModel.from_lora_tensors(1, tensors, helper, device="cpu", dtype=torch.float32)
    assert 2 * len(read.loras) == len(tensors)
    for name, layer in read.loras.items():
        rank = 2 if ".experts." in name else 4
        assert layer.lora_a.shape[0] == layer.lora_b.shape[1] == rank
        assert (layer.rank, layer.scaling) == (rank, 32.0 / rank), name


# --- whole runs -----------------------------------------------------------------------------------


def runnable(path: Path) -> Path:
    """A random tiny Mixtral with the tokenizer of the tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(ModelSection(name="tiny-fast")))
    random_mixtral(path, vocab_size=len(tokenizer), max_position_embeddings=512)
    tokenizer.save_pretrained(path)
    return path


RL = ["data.held_out=4", "sampling.num_prompts=4", "sampling.max_tokens=16", "lora.rank=2"]
RL += ["model.device=cpu", "model.dtype=float32", "run.eval_every=0", "warm_start.num_steps=0"]
RL += ["run.checkpoint_every=1", "reward.name=tests.adapters.test_expert_files:share_of_vowels"]


def share_of_vowels(completion: str, reference: str) -> float:
    """A reward that tells random completions apart."""
    return sum(letter in "aeiou0123" for letter in completion) / max(1, len(completion))


def test_rl_runs_and_resumes_to_the_bit(tmp_path: Path) -> None:
    model = runnable(tmp_path / "model")
    finals = []
    for name, num_steps in (("whole", [2]), ("parts", [1, 2])):
        for steps in num_steps:
            config = load_config(
                ROOT / "configs" / "smoke.toml",
                [
                    *RL,
                    f"model.name={model}",
                    f"run.output_dir={tmp_path}",
                    f"run.name={name}",
                    f"run.num_steps={steps}",
                ],
            )
            train(config, resume=steps > 1 and len(num_steps) > 1, quiet=True)
        finals.append(load_tensors(tmp_path / name / "adapter"))
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    assert all(0 <= row["mismatch/kl"] < 1e-10 for row in rows)
    whole, parts = finals
    assert any(bool(t.any()) for name, t in whole.items() if ".w1.lora_B" in name)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_supervised_training_runs(tmp_path: Path) -> None:
    model = runnable(tmp_path / "model")
    overrides = [
        *(f"model.name={model}", "model.device=cpu", "model.dtype=float32", "lora.rank=2"),
        *("run.num_steps=2", "data.held_out=20", "sft.batch_size=4"),
        *(f"run.output_dir={tmp_path}", "run.name=sft"),
    ]
    fine_tune(load_sft_config(ROOT / "configs" / "sft_tiny.toml", overrides), quiet=True)
    tensors = load_tensors(tmp_path / "sft" / "adapter")
    assert any(bool(t.any()) for name, t in tensors.items() if ".w2.lora_B" in name)


def test_vllm_on_a_cpu_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = runnable(tmp_path / "model")
    save_file({}, model / "model.safetensors")  # the weights are not read
    check_mixture(model, torch.device("cuda"), merges=False)
    with pytest.raises(UserError, match=r"experts, for which vLLM serves no adapters in float32"):
        check_mixture(model, torch.device("cuda"), merges=True)
    with pytest.raises(UserError, match="is a mixture of experts"):
        check_mixture(model, torch.device("cpu"), merges=False)
    overrides = [*RL, f"model.name={model}", f"run.output_dir={tmp_path}", "sampling.backend=vllm"]
    code = main(["train", str(ROOT / "configs" / "smoke.toml"), *overrides])
    assert code == 2
    error = capsys.readouterr().err
    assert "vLLM on a CPU serves neither adapters (not even on attention only)" in error
    assert 'set sampling.backend="torch"' in error
