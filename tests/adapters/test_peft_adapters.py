"""PEFT's adapters as other tools save them: opened and merged, they compute what PEFT computes.

What has no place in a policy is refused by its own reason, and merged where PEFT merges it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rl_lora.adapters.files import find_adapter, load_tensors, open_adapter
from rl_lora.adapters.peft_files import lora_settings
from rl_lora.adapters.resize import common_settings, fitted
from rl_lora.errors import UserError
from rl_lora.export.merge import export_merged
from rl_lora.models.hub import adapter_path
from rl_lora.samplers.vllm.merged_weights import read_terms
from rl_lora.types import Adapter
from tests.helpers.tiny_models import VOCAB, make_policy, random_llama

IDS = torch.tensor([[7, 30, 41, 52, 63, 74, 85, 96, 17, 18]])
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-4  # nats; the adapters move log-probs by more than 1

SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank_pattern": {"rank_pattern": {"q_proj": 8, "v_proj": 2}},
    "rank_pattern_rslora": {"rank_pattern": {"q_proj": 8}, "use_rslora": True},
    "rank_pattern_of_one_layer": {"rank_pattern": {r"layers\.1\.mlp\..*_proj": 1}},
    "rank_pattern_of_all": {"rank_pattern": {".*_proj": 2}},
    "rank_pattern_dora": {"rank_pattern": {"down_proj": 2}, "use_dora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 32}},
    "alpha_pattern_of_all": {"alpha_pattern": {".*_proj": 16}},
    "both_patterns": {
        "rank_pattern": {"q_proj": 8, "0.mlp.up_proj": 3},
        "alpha_pattern": {"v_proj": 1, "model.layers.1.self_attn.q_proj": 64},
        "use_rslora": True,
    },
    "two_layers": {"layers_to_transform": [1]},
    "without_mlp_of_layer_0": {"exclude_modules": r".*layers\.0\.mlp.*"},
    "lm_head": {"target_modules": [*ALL, "lm_head"]},
    "dora": {"use_dora": True},
    "bias_of_layers_without": {"bias": "all"},
}

# Merged as PEFT means them, but refused by `rl-lora eval`; the reason it gives.
MERGED_ONLY: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"a whole tensor .*: lm_head\.weight"),
    "saved_embedding": (
        {"modules_to_save": ["embed_tokens"]},
        r"a whole tensor .*: model\.embed_tokens\.weight",
    ),
    "embedding": (
        {"target_modules": [*ALL, "embed_tokens"]},
        r"LoRA on an embedding: model\.embed_tokens",
    ),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, "lora_bias"),
    "bias": ({"bias": "all"}, r"a whole tensor of the base's \(modules_to_save, bias"),
}


def qwen2(path: Path, *, tied: bool) -> Path:
    """Two layers of Qwen 2, whose q, k and v have biases."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.2)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def logprobs(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.log_softmax(-1)


def saved_by_peft(base: Path, folder: Path, **settings: Any) -> torch.Tensor:
    """Writes an adapter with random weights; log-probs of PEFT's own model of the files."""
    (base / "tokenizer.json").write_text("{}")  # an export copies one
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"} | settings
    peft = get_peft_model(model, LoraConfig(**config))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return logprobs_of_peft(base, folder)


def logprobs_of_peft(base: Path, folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logprobs(model)
    found = logprobs(PeftModel.from_pretrained(model, folder))
    assert (found - before).abs().max() > 1  # a control: the adapter matters
    return found


def logprobs_evaluated(base: Path, folder: Path, scratch: Path) -> torch.Tensor:
    """As `rl-lora eval --adapter` computes."""
    policy = make_policy(base, **common_settings([folder]))
    path = fitted(folder, policy, scratch)
    open_adapter(path, policy)
    if policy.lora.variant != "dora":
        check_engine_terms(base, path, scratch.with_name("weights"), policy)
    return logprobs(policy.model)


def check_engine_terms(base: Path, adapter: Path, out: Path, policy: Any) -> None:
    """What vLLM's weights gain is what the policy's layers add."""
    handle = open_adapter(adapter, policy)
    terms = read_terms(
        Adapter(handle.version, handle.name, adapter, handle.fingerprint, handle.rank)
    )
    for name, layer in policy._lora_layers:
        own = layer.scaling * layer.lora_B @ layer.lora_A
        assert torch.allclose(
            terms[name].scaling * terms[name].b_OR @ terms[name].a_RI, own, atol=1e-6
        )


def logprobs_merged(base: Path, folder: Path, out: Path) -> torch.Tensor:
    export_merged(base, folder, out)
    return logprobs(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32))


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (found - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "tied"), [*((kind, True) for kind in SERVED), ("plain", False), ("lm_head", False)]
)
def test_adapters_are_evaluated_and_merged_as_peft_computes(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    base = random_llama(tmp_path / "base", tied=tied)
    wanted = saved_by_peft(base, tmp_path / "adapter", **SERVED[kind])
    assert_same(logprobs_evaluated(base, tmp_path / "adapter", tmp_path / "scratch"), wanted)
    assert_same(logprobs_merged(base, tmp_path / "adapter", tmp_path / "merged"), wanted)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", MERGED_ONLY)
def test_whole_tensors_biases_and_embeddings_are_merged_and_refused_elsewhere(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    settings, reason = MERGED_ONLY[kind]
    base = qwen2(tmp_path / "base", tied=tied)
    adapter = tmp_path / "adapter"
    wanted = saved_by_peft(base, adapter, **settings)
    with pytest.raises(UserError, match=f"{reason}.*`rl-lora export {adapter} --merged DIR`"):
        common_settings([adapter])
    assert_same(logprobs_merged(base, adapter, tmp_path / "merged"), wanted)
    # The advice: the merged model is one that is taken as a base.
    assert_same(logprobs(make_policy(tmp_path / "merged").model), wanted)


def test_a_bias_of_b_needs_one_in_the_base(tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base")
    saved_by_peft(base, tmp_path / "adapter", lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(
        UserError, match=r"the base has no model\.layers\.0\.self_attn\.q_proj\.bia"
    ):
        export_merged(base, tmp_path / "adapter", tmp_path / "merged")


def test_kept_ties_are_left_to_peft(tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base", tied=True)
    saved_by_peft(
        base, tmp_path / "adapter", modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    with pytest.raises(UserError, match="ensure_weight_tying"):
        export_merged(base, tmp_path / "adapter", tmp_path / "merged")


def test_half_precision_and_pefts_older_file_are_taken(tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base")
    half, old = tmp_path / "half", tmp_path / "old"
    saved_by_peft(base, half)
    file = half / "adapter_model.safetensors"
    save_file({n: t.half() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    wanted = saved_by_peft(base, old)
    torch.save(load_file(old / "adapter_model.safetensors"), old / "adapter_model.bin")
    (old / "adapter_model.safetensors").unlink()
    assert find_adapter(old) == old
    for index, (folder, expected) in enumerate(
        ((half, logprobs_of_peft(base, half)), (old, wanted))
    ):
        scratch = tmp_path / f"scratch{index}"
        assert_same(logprobs_evaluated(base, folder, scratch), expected)
        assert_same(logprobs_merged(base, folder, tmp_path / f"merged{index}"), expected)


def test_an_older_file_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("sprung").write_text, ("",))

    torch.save({"x": Trap()}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [5, 6]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("trainable_token_indices", [3]),
        ("use_qalora", True),
        ("megatron_config", {"a": 1}),
        ("use_something_new", True),
        ("something_config", {"a": 1}),
    ],
)
def test_settings_that_change_the_layers_are_refused_by_name(
    tmp_path: Path, key: str, value: object
) -> None:
    raw = {"peft_type": "LORA", "r": 1, "lora_alpha": 32, "qalora_group_size": 32, "new_size": 4}
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(raw))
    assert lora_settings(tmp_path)["rank"] == 1
    file.write_text(json.dumps(raw | {key: value}))
    with pytest.raises(UserError, match=f"{key}=.* is not supported"):
        lora_settings(tmp_path)


def test_a_policy_does_not_take_an_alpha_pattern_unfitted(tmp_path: Path) -> None:
    base = random_llama(tmp_path / "base")
    saved_by_peft(base, tmp_path / "adapter", alpha_pattern={"q_proj": 32})
    with pytest.raises(UserError, match=r"different alphas .*q_proj first"):
        open_adapter(tmp_path / "adapter", make_policy(base, rank=4, alpha=8.0))


def test_adapters_have_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_llama(tmp_path / "base")
    saved_by_peft(base, tmp_path / "cached")
    asked = []

    def download(name: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path / "cached")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_adapter(Path("owner/an-adapter.v2")) == tmp_path / "cached"
    assert asked[0][0] == "owner/an-adapter.v2"
    assert "adapter_model.safetensors" in asked[0][1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "mine").mkdir(parents=True)
    assert adapter_path("owner/mine") == Path("owner/mine")  # what is here is not looked up
    assert adapter_path("../owner/mine") == Path("../owner/mine")
    assert len(asked) == 1


def test_an_adapter_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"adapter hub id 'owner/none'.* give a local directory"):
        adapter_path("owner/none")
