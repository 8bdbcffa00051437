"""A merged directory computes what base plus adapter compute; card and push tell the truth."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rl_lora.adapters.files import find_adapter, save_adapter
from rl_lora.adapters.model_card import card_text, write_card
from rl_lora.cli import main
from rl_lora.config import parse_config
from rl_lora.errors import UserError
from rl_lora.evaluation.scores import EvalResult, EvaluationScores
from rl_lora.export import merge
from rl_lora.export.merge import export_merged
from rl_lora.export.push import push_adapter
from rl_lora.policy import Policy
from tests.helpers.tiny_models import VOCAB, make_policy, random_llama, random_qwen3, shake

IDS = torch.tensor([[1, 5, 9, 33, 2, 7]])


def base_model(path: Path, **options: Any) -> Path:
    """A random tiny Llama with a tokenizer, as a user's model directory."""
    random_llama(path, **options)
    add_tokenizer(path)
    return path


def add_tokenizer(path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({f"w{k}": k for k in range(VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2").save_pretrained(path)


def adapter_of(base: Path, folder: Path, *, name: str | None = None, **lora: Any) -> Path:
    policy = shaken(base, **lora)
    if name is not None:
        policy.base_name = name
    return save_adapter(policy, folder, version=3, run_name="test").path


def shaken(base: Path, **lora: Any) -> Policy:
    policy = make_policy(base, **lora)
    shake(policy)
    return policy


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits.float()
    return logits


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("layers", ["all", "attention", "mlp"])
@pytest.mark.parametrize("rank", [1, 4])
def test_merged_model_computes_what_peft_computes(tmp_path: Path, layers: str, rank: int) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters", layers=layers, rank=rank)
    before = hashes(base)
    merged = export_merged(base, adapter, tmp_path / "out" / "merged")
    own = logits_of(load(merged))
    peft = logits_of(PeftModel.from_pretrained(load(base), str(adapter)).eval())
    assert torch.allclose(own, peft, atol=1e-5)
    assert (own - logits_of(load(base))).abs().max() > 1e-2  # the adapter matters
    assert hashes(base) == before


@pytest.mark.parametrize("variant", ["rslora", "pissa", "olora", "dora"])
def test_variants_merge_to_what_peft_computes(tmp_path: Path, variant: str) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters", rank=2, variant=variant)
    own = logits_of(load(export_merged(base, adapter, tmp_path / "merged")))
    peft = logits_of(PeftModel.from_pretrained(load(base), str(adapter)).eval())
    assert torch.allclose(own, peft, atol=1e-5)


def test_dora_without_magnitudes_is_not_merged(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters", variant="dora")
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "magnitude" not in n}, file)
    with pytest.raises(UserError, match="a magnitude for each layer"):
        export_merged(base, adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("variant", "row"),
    [
        ("dora", "| variant | DoRA; PEFT serves it, vLLM does not |"),
        ("rslora", "| variant | rsLoRA: the scaling is alpha / sqrt(rank) |"),
        ("pissa", "| variant | PiSSA: trained at rank 2, its start subtracted; served as plain"),
    ],
)
def test_the_card_says_which_variant(tmp_path: Path, variant: str, row: str) -> None:
    base = base_model(tmp_path / "base")
    text = card_text(adapter_of(base, tmp_path / "a", rank=2, variant=variant))
    assert row in text
    assert f"| rank, alpha | {'4, 64' if variant == 'pissa' else '2, 32'} |" in text


def test_one_weight_by_hand(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters", rank=2, alpha=6.0)
    merged = load_file(export_merged(base, adapter, tmp_path / "merged") / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(adapter / "adapter_model.safetensors")
    lora_A = tensors[f"base_model.model.{name}.lora_A.weight"].double()
    lora_B = tensors[f"base_model.model.{name}.lora_B.weight"].double()
    before = load_file(base / "model.safetensors")
    expected = before[f"{name}.weight"].double() + 3.0 * lora_B @ lora_A
    assert torch.allclose(merged[f"{name}.weight"].double(), expected, atol=1e-6)
    untouched = "model.layers.1.input_layernorm.weight"
    assert torch.equal(merged[untouched], before[untouched])


def test_lm_head_adapter_unties_a_tied_model(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", tied=True)
    policy = shaken(base, lm_head=True)
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="test").path
    merged = export_merged(base, adapter, tmp_path / "merged")
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(merged / "model.safetensors")
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)
    assert not torch.equal(tensors["lm_head.weight"], embedding)
    assert torch.allclose(logits_of(load(merged)), logits_of(policy.model), atol=1e-5)


def test_lm_head_adapter_on_an_untied_model(tmp_path: Path) -> None:
    base = random_qwen3(tmp_path / "base")
    add_tokenizer(base)
    policy = shaken(base, lm_head=True)
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="test").path
    merged = export_merged(base, adapter, tmp_path / "merged")
    assert torch.allclose(logits_of(load(merged)), logits_of(policy.model), atol=1e-5)


def test_full_fine_tuning_is_exported_too(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base", tied=True)
    policy = shaken(base, mode="full")
    version = save_adapter(policy, tmp_path / "adapters", version=1, run_name="test").path
    merged = export_merged(base, version, tmp_path / "merged")
    assert torch.allclose(logits_of(load(merged)), logits_of(policy.model), atol=1e-5)


def test_dtype_is_rounded_once_from_float32(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters")
    exact = load_file(export_merged(base, adapter, tmp_path / "fp32") / "model.safetensors")
    merged = export_merged(base, adapter, tmp_path / "bf16", dtype="bfloat16")
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(load(merged).parameters()).dtype == torch.bfloat16
    for name, tensor in load_file(merged / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].to(torch.bfloat16)), name


def test_a_bfloat16_base_is_merged_in_float32(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    tensors = {n: t.bfloat16() for n, t in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_of(base, tmp_path / "adapters", rank=1)
    name = "model.layers.0.self_attn.q_proj"
    lora = load_file(adapter / "adapter_model.safetensors")
    lora_A, lora_B = (lora[f"base_model.model.{name}.lora_{k}.weight"] for k in "AB")
    expected = tensors[f"{name}.weight"].float() + 32.0 * lora_B @ lora_A
    wide = load_file(
        export_merged(base, adapter, tmp_path / "fp32", dtype="float32") / "model.safetensors"
    )
    assert torch.allclose(wide[f"{name}.weight"], expected, atol=1e-6)
    kept = load_file(export_merged(base, adapter, tmp_path / "kept") / "model.safetensors")
    assert kept.keys() == wide.keys()
    for name, tensor in kept.items():  # rounded once, to the base's dtype
        assert torch.equal(tensor, wide[name].bfloat16()), name


def test_sharded_base_keeps_its_files_and_gets_a_new_index(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    whole = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {
        "model-00001-of-00002.safetensors": {},
        "model-00002-of-00002.safetensors": {},
    }
    for position, (name, tensor) in enumerate(sorted(whole.items())):
        parts[list(parts)[position % 2]][name] = tensor
    for file, tensors in parts.items():
        save_file(tensors, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, tensors in parts.items() for n in tensors}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    policy = shaken(base, lm_head=True)
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="test").path
    merged = export_merged(base, adapter, tmp_path / "merged", dtype="bfloat16")
    new = json.loads((merged / "model.safetensors.index.json").read_text())
    assert set(new["weight_map"]) == set(whole) | {"lm_head.weight"}
    assert new["metadata"]["total_size"] == 2 * (
        sum(t.numel() for t in whole.values()) + whole["model.embed_tokens.weight"].numel()
    )
    assert torch.allclose(logits_of(load(merged)), logits_of(policy.model), atol=0.1)


def test_tokenizer_comes_along(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    (base / "README.md").write_text("about the base")
    merged = export_merged(base, adapter_of(base, tmp_path / "adapters"), tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(merged)("w7 w1")["input_ids"] == [7, 1]
    assert "about the base" not in (merged / "README.md").read_text()


MARKUP = (
    "{% for message in messages %}{{ message.role }} {{ message.content }} w9 {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.mark.parametrize("has_file", [True, False])
@pytest.mark.parametrize(("template", "expected"), [("chat", [2, 9]), ("base", 2)])
def test_the_merged_model_stops_where_the_template_ends_a_turn(
    tmp_path: Path, has_file: bool, template: str, expected: object
) -> None:
    """As the policy does, whose turns ended so in training; the base's other settings are kept."""
    base = base_model(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    tokenizer.chat_template = MARKUP
    tokenizer.save_pretrained(base)
    settings: dict[str, object] = {"eos_token_id": 2, "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").unlink(missing_ok=True)
    if has_file:
        (base / "generation_config.json").write_text(json.dumps(settings))
    adapter = adapter_of(base, tmp_path / "run" / "adapters")
    config = {"data": {"train": ["gsm8k"], "template": template}}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": config}))
    merged = export_merged(base, adapter, tmp_path / "merged")
    model = load(merged)
    assert model.generation_config.eos_token_id == expected
    if has_file:
        assert model.generation_config.temperature == 0.6
    else:
        assert (merged / "generation_config.json").is_file() == (template == "chat")


# --- refusals -------------------------------------------------------------------------------------


def test_target_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters")
    target = tmp_path / "merged"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        export_merged(base, adapter, target)
    assert [file.name for file in target.iterdir()] == ["notes.txt"]
    with pytest.raises(UserError, match="not empty"):
        export_merged(base, adapter, base)
    with pytest.raises(UserError, match="base model's directory"):
        export_merged(base, adapter, base / "merged")


def test_empty_target_is_taken(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    (tmp_path / "merged").mkdir()
    merged = export_merged(base, adapter_of(base, tmp_path / "adapters"), tmp_path / "merged")
    assert (merged / "config.json").is_file()


@pytest.mark.parametrize("other", [{"hidden": 32}, {"layers": 1}])
def test_adapter_of_another_base_is_one_line_naming_both(
    tmp_path: Path, other: dict[str, int]
) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters", name="org/some-model")
    if "layers" in other:
        smaller = tmp_path / "other"
        base_model(smaller)
        raw = json.loads((smaller / "config.json").read_text()) | {"num_hidden_layers": 1}
        (smaller / "config.json").write_text(json.dumps(raw))
    else:
        smaller = base_model(tmp_path / "other", **other)
    with pytest.raises(UserError) as caught:
        export_merged(smaller, adapter, tmp_path / "merged")
    message = str(caught.value)
    assert "org/some-model" in message
    assert str(smaller) in message
    assert "\n" not in message
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_base_of_another_name_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters", name="org/first")
    with pytest.raises(UserError, match=r"org/first.*org/second"):
        export_merged(base, adapter, tmp_path / "merged", base_name="org/second")


def test_failure_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters")

    def no_room(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "save_file", no_room)
    with pytest.raises(UserError, match="No space left on device"):
        export_merged(base, adapter, tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_odd_tensors_in_an_adapter_are_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.extra.weight": torch.ones(2)}, file)
    with pytest.raises(UserError, match=r"the base has no extra\.weight"):
        export_merged(base, adapter, tmp_path / "merged")
    del tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"is damaged: .* has no B"):
        export_merged(base, adapter, tmp_path / "merged")


# --- card and push --------------------------------------------------------------------------------


def scores(correct: int) -> EvalResult:
    total = EvaluationScores(
        num_problems=200,
        num_samples=1,
        num_correct=correct,
        accuracy=correct / 200,
        accuracy_low=correct / 200 - 0.05,
        accuracy_high=correct / 200 + 0.05,
        format_rate=1.0,
        accuracy_formatted=None,
        pass_at_k=correct / 200,
        majority_accuracy=correct / 200,
        tokens_mean=9.0,
        truncated_rate=0.0,
        statuses={"ok": 200},
    )
    return EvalResult(
        total=total,
        by_source={},
        step=None,
        adapter_version=0,
        confidence=0.95,
        interval="wilson",
        temperature=0.0,
        top_p=1.0,
        max_tokens=64,
        seed=0,
        seconds=1.0,
    )


def run_folder(tmp_path: Path) -> Path:
    """A finished run on a hub model and three kinds of data sets."""
    base = base_model(tmp_path / "base")
    run = tmp_path / "runs" / "mine"
    adapter_of(base, run / "adapters", name="Qwen/Qwen3-8B-Base", rank=2)
    config = parse_config(
        {
            "run": {"name": "mine", "num_steps": 100, "seed": 11},
            "model": {"name": "Qwen/Qwen3-8B-Base"},
            "lora": {"rank": 2},
            "data": {
                "train": ["gsm8k", "generated:chain_sum", str(tmp_path / "secret" / "a.jsonl")]
            },
            "warm_start": {"num_steps": 5},
        }
    )
    (run / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    (run / "eval").mkdir()
    scores(50).save(run / "eval" / "step_000000.json")
    scores(120).save(run / "eval" / "step_000003.json")
    return run


def test_card_tells_base_rank_data_and_scores(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    text = card_text(find_adapter(run))
    body = text.split("---\n", 2)[2]
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-8B-Base"
    assert data["library_name"] == "peft"
    assert data["datasets"] == ["openai/gsm8k"]
    assert "| rank, alpha | 2, 32 |" in body
    assert "| training problems | gsm8k, generated:chain_sum, a |" in body
    assert "| steps | 3 of 16 prompts x 8 samples, up to 256 tokens |" in body  # as trained
    assert "| warm start | 5 supervised steps before |" in body
    assert "| before RL | 25.0% | 20.0% to 30.0% (95%, wilson) | 200 x 1 |" in body
    assert "| this adapter | 60.0% | 55.0% to 65.0% (95%, wilson) | 200 x 1 |" in body
    assert str(tmp_path) not in text  # no path of this machine


def test_card_is_written_without_network(tmp_path: Path) -> None:
    path = write_card(find_adapter(run_folder(tmp_path)))
    assert path.name == "README.md"
    assert 'PeftModel.from_pretrained(base, "THIS_REPOSITORY")' in path.read_text()


def test_card_of_a_bare_peft_directory(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapters")
    (adapter / "rl_lora.json").unlink()
    text = card_text(adapter)
    assert "base_model:" not in text.split("---\n")[1]  # a directory is no hub id
    assert "Held-out accuracy" not in text


class FakeApi:
    """Keeps what would have been uploaded."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.repos: list[tuple[str, bool]] = []
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.error is not None:
            raise self.error
        self.repos.append((repo_id, private))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        assert commit_message == "LoRA adapter of rank 2"
        self.files = {file.name: file.read_bytes() for file in folder_path.iterdir()}
        return f"https://hub.example/{repo_id}"


def test_push_uploads_adapter_config_and_card(tmp_path: Path) -> None:
    adapter = find_adapter(run_folder(tmp_path))
    api: Any = FakeApi()
    before = hashes(adapter)
    assert push_adapter(adapter, "me/mine", private=True, api=api) == "https://hub.example/me/mine"
    assert api.repos == [("me/mine", True)]
    assert set(api.files) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert api.files["adapter_model.safetensors"] == weights
    peft = json.loads(api.files["adapter_config.json"])
    assert peft["base_model_name_or_path"] == "Qwen/Qwen3-8B-Base"
    assert peft["r"] == 2
    assert hashes(adapter) == before


@pytest.mark.parametrize("error", [OSError("no token"), ValueError("bad\nname")])
def test_push_that_the_hub_refuses_is_one_line(tmp_path: Path, error: Exception) -> None:
    api: Any = FakeApi(error)
    with pytest.raises(UserError, match="cannot push to 'me/mine'") as caught:
        push_adapter(find_adapter(run_folder(tmp_path)), "me/mine", api=api)
    assert "\n" not in str(caught.value)


# --- the command ----------------------------------------------------------------------------------


def test_command_merges_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = base_model(tmp_path / "base")
    run = tmp_path / "run"
    adapter_of(base, run / "adapters")
    assert main(["export", str(run), "--merged", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out == f"merged model: {tmp_path / 'merged'}\n"
    assert load(tmp_path / "merged") is not None


def test_command_takes_a_copy_of_the_base_elsewhere(tmp_path: Path) -> None:
    run, merged = run_folder(tmp_path), tmp_path / "merged"
    base = str(tmp_path / "base")
    assert main(["export", str(run), "--base", base, "--merged", str(merged)]) == 0
    assert "Qwen/Qwen3-8B-Base" in (merged / "README.md").read_text()


def test_command_without_options_writes_the_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path)
    assert main(["export", str(run)]) == 0
    assert "model card" in capsys.readouterr().out
    assert (run / "adapters" / "v000003" / "README.md").is_file()


def test_source_without_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        find_adapter(base_model(tmp_path / "base"))
    with pytest.raises(UserError, match="holds no adapter"):
        find_adapter(tmp_path / "nowhere")


def test_final_adapter_comes_before_older_versions(tmp_path: Path) -> None:
    for name in ("adapters/v000001", "adapters/v000002", "adapter"):
        (tmp_path / name).mkdir(parents=True)
        save_file({"x": torch.ones(1)}, tmp_path / name / "adapter_model.safetensors")
    assert find_adapter(tmp_path) == tmp_path / "adapter"
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    assert find_adapter(tmp_path) == tmp_path / "adapters" / "v000002"
