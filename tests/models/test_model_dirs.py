"""Model directories that are not what they seem: one line that names why, or the right model."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, T5Config

from rl_lora.adapters.files import save_adapter
from rl_lora.build import open_model
from rl_lora.config import ModelSection, load_config
from rl_lora.errors import UserError
from rl_lora.export.merge import export_merged
from rl_lora.models.resolve import check_model_dir, check_rows, load_tokenizer, resolve_model
from rl_lora.models.shapes import has_own_head, load_model_config
from rl_lora.models.tiny import RECIPES, train_tokenizer
from rl_lora.samplers.vllm.settings import EngineOptions, engine_settings
from rl_lora.train import train
from tests.helpers.tiny_models import VOCAB, make_policy, random_llama, shake

pytestmark = pytest.mark.faults

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = random_llama(tmp_path / "model", tied=True)
    (path / "tokenizer.json").write_text("{}")
    return path


def edit(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | changes))


def rewrite(model_dir: Path, change: Any) -> None:
    file = model_dir / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def refusal(model_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(ModelSection(name=str(model_dir)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- config.json ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "mxfp4"},
    ],
)
def test_quantized_models_are_refused_by_their_method(
    model_dir: Path, quantization: dict[str, Any]
) -> None:
    edit(model_dir / "config.json", quantization_config=quantization)
    message = refusal(model_dir)
    assert f"is quantized ({quantization['quant_method']}" in message
    assert "give the model that it was quantized from" in message


def test_unknown_types_and_other_kinds_of_models_are_refused(model_dir: Path) -> None:
    edit(model_dir / "config.json", model_type="qwen99", architectures=["Qwen99ForCausalLM"])
    assert "no causal language model of type 'qwen99'" in refusal(model_dir)
    T5Config().save_pretrained(model_dir)  # a type that transformers knows
    assert "no causal language model of type 't5'" in refusal(model_dir)
    for strange in (None, ["llama"], 3):
        edit(model_dir / "config.json", model_type=strange)
        assert f"of type {strange!r} (model_type in config.json)" in refusal(model_dir)


def test_a_models_own_code_is_neither_run_nor_asked_about(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    for file in ("configuration_my.py", "modeling_my.py", "tokenization_my.py"):
        (model_dir / file).write_text("raise SystemExit('its code ran')\n")
    code = {"AutoConfig": "configuration_my.C", "AutoModelForCausalLM": "modeling_my.M"}
    edit(model_dir / "config.json", auto_map=code)  # of a type that transformers knows: not needed
    resolve_model(ModelSection(name=str(model_dir)))
    make_policy(model_dir)
    edit(model_dir / "config.json", model_type="mine")
    message = refusal(model_dir)
    assert "type 'mine', and the model's own code (configuration_my.C, modeling_my.M)" in message
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_my.T", None]}}
    (model_dir / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(model_dir)


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("its code ran",)


def test_pickled_weights_are_not_read(model_dir: Path) -> None:
    torch.save({"lm_head.weight": Trap()}, model_dir / "pytorch_model.bin")
    resolve_model(ModelSection(name=str(model_dir)))
    make_policy(model_dir)  # from its safetensors
    (model_dir / "model.safetensors").unlink()
    assert "only pickled weights, which may contain code and are not read" in refusal(model_dir)
    with pytest.raises(UserError, match="not a loadable causal language model"):
        make_policy(model_dir)


def test_a_dry_run_refuses_and_asks_nothing_either(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked"))
    code = {"AutoConfig": "configuration_my.C", "AutoModelForCausalLM": "modeling_my.M"}
    edit(model_dir / "config.json", auto_map=code, model_type="mine")
    with pytest.raises(UserError, match=r"own code .* is not run here"):
        load_model_config(ModelSection(name=str(model_dir)), model_dir)


def test_a_config_that_its_own_class_refuses(model_dir: Path) -> None:
    edit(model_dir / "config.json", hidden_size="wide")
    assert "its config.json cannot be used" in refusal(model_dir)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [None, b"version https://git-lfs.github.com/spec/v1\noid 0\n"])
def test_files_that_are_cut_off_or_stand_for_others(model_dir: Path, content: bytes | None) -> None:
    file = model_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000] if content is None else content)
    with pytest.raises(UserError, match=r"model\.safetensors \(\d+ bytes\) cannot be read"):
        check_model_dir(model_dir)


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
        EMBEDDING,
        HEAD,
    ],
)
def test_a_missing_weight_is_named(
    tmp_path: Path, name: str, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = random_llama(tmp_path / "model", tied=False)
    rewrite(path, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"its files have no {name} .1 missing.; fetch") as caught:
        make_policy(path, mode=mode)
    assert ("tie_word_embeddings=true" in str(caught.value)) == (name == HEAD)
    assert "MISSING" not in capfd.readouterr().err  # only that one line, and no report


def test_weights_of_another_shape_are_named(model_dir: Path) -> None:
    edit(model_dir / "config.json", intermediate_size=80)
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight is \[64, 96\] in its files and"):
        make_policy(model_dir)
    edit(model_dir / "config.json", intermediate_size=96, vocab_size=VOCAB + 3)
    with pytest.raises(UserError, match=rf"\[{VOCAB}, 64\] in its files and \[{VOCAB + 3}, 64\]"):
        make_policy(model_dir)


def test_weights_that_no_layer_takes_are_reported(model_dir: Path) -> None:
    rewrite(model_dir, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2)}))
    with pytest.warns(UserWarning, match=r"1 tensors of its files .* model\.extra\.weight first"):
        make_policy(model_dir)


# --- tokens without a row -------------------------------------------------------------------------


def test_a_token_without_an_embedding_row(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(RECIPES["tiny-fast"])
    rows = len(tokenizer)
    path = random_llama(tmp_path / "model")
    edit(path / "config.json", vocab_size=rows)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    check_rows([(1, 2, rows - 1), ()], tokenizer, path)  # known only to the tokenizer: no fault
    with pytest.raises(UserError, match=rf"token '<think>' \({rows}\).* the embedding's {rows} ro"):
        check_rows([(1, 2), (3, rows)], tokenizer, path)
    tokenizer.pad_token = "<think>"
    with pytest.raises(UserError, match="<think>"):
        check_rows([(1, 2)], tokenizer, path)


def test_a_job_with_such_a_token_ends_before_the_weights_are_read(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(RECIPES["tiny-fast"])
    path = random_llama(tmp_path / "model")
    edit(path / "config.json", vocab_size=len(tokenizer))
    (path / "model.safetensors").write_bytes(save_of_nothing())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>"]})
    tokenizer.save_pretrained(path)
    rows = [{"question": f"<think> {i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "job.toml").write_text("[data]\nheld_out = 2\n[sampling]\nbackend = 'torch'\n")
    overrides = [f"model.name={path}", f"data={tmp_path / 'data.jsonl'}", "run.num_steps=1"]
    overrides += [f"run.output_dir={tmp_path}", "sampling.num_prompts=2", "sampling.max_tokens=4"]
    with pytest.raises(UserError, match="token '<think>'"):
        train(load_config(tmp_path / "job.toml", overrides), quiet=True)


def save_of_nothing() -> bytes:
    from safetensors.torch import save

    return save({})


# --- a config that ties, files that do not --------------------------------------------------------


@pytest.fixture
def own_head(model_dir: Path) -> Path:
    """The config ties lm_head to the embedding; the files have another one."""
    rewrite(model_dir, lambda tensors: tensors.update({HEAD: torch.randn(VOCAB, 64)}))
    return model_dir


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.log_softmax(-1)


def test_has_own_head(tmp_path: Path, model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(model_dir)
    assert not has_own_head(model_dir, config)
    copy = Path(shutil.copytree(model_dir, tmp_path / "copy"))
    rewrite(copy, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert not has_own_head(copy, config)  # a copy of the embedding is what the config says
    rewrite(copy, lambda tensors: tensors[HEAD][3].add_(1))
    assert has_own_head(copy, config)
    untied = random_llama(tmp_path / "untied", tied=False)
    assert not has_own_head(untied, AutoConfig.from_pretrained(untied))


def test_the_engine_gets_an_untied_head(own_head: Path, tmp_path: Path) -> None:
    def overrides(path: Path) -> Any:
        return engine_settings(
            path, EngineOptions(), dtype=torch.float32, device=torch.device("cpu"),
            max_model_len=64,
        ).get("hf_overrides")  # fmt: skip

    assert overrides(own_head) == {"tie_word_embeddings": False}
    assert overrides(random_llama(tmp_path / "tied", tied=True)) is None


@pytest.mark.parametrize("lora", [{}, {"lm_head": True}, {"mode": "full"}])
def test_an_untied_head_is_trained_and_exported(
    own_head: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    policy = make_policy(own_head, **lora)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(own_head, dtype=torch.float32)
        assert torch.equal(logprobs(policy.model), logprobs(plain))
    shake(policy, size=0.05)
    adapter = save_adapter(policy, tmp_path / "a", version=1, run_name="r")
    merged = export_merged(own_head, adapter.path, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert torch.allclose(logprobs(found), logprobs(policy.model), atol=1e-4)
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False


def test_files_with_only_lm_head_keep_it(model_dir: Path, tmp_path: Path) -> None:
    """A tied model may have its one tensor under the head's name."""
    rewrite(model_dir, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
    policy = make_policy(model_dir)
    shake(policy, size=0.05)
    adapter = save_adapter(policy, tmp_path / "a", version=1, run_name="r")
    merged = export_merged(model_dir, adapter.path, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert torch.allclose(logprobs(found), logprobs(policy.model), atol=1e-4)


def test_open_model_refuses_what_cannot_be_trained(model_dir: Path) -> None:
    train_tokenizer(RECIPES["tiny-fast"]).save_pretrained(model_dir)
    edit(model_dir / "config.json", final_logit_softcapping=30.0)
    section = ModelSection(name=str(model_dir))
    with pytest.raises(UserError, match=r"caps its logits \(final_logit_softcapping=30\.0\)"):
        open_model(section, lambda text: None)
