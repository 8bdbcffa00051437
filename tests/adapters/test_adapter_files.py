"""Published adapters: PEFT's format, fingerprints, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from rl_lora.adapters.files import (
    fingerprint,
    load_tensors,
    open_adapter,
    remove_old,
    save_adapter,
    version_in,
)
from rl_lora.adapters.peft_files import lora_settings
from rl_lora.errors import UserError
from rl_lora.export.merge import export_merged
from rl_lora.policy import Policy
from tests.helpers.tiny_models import make_policy, random_gpt2, random_llama, shake

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@torch.no_grad()
def logits_of(policy: Policy) -> torch.Tensor:
    return policy.model(input_ids=IDS).logits


@pytest.mark.parametrize("lm_head", [False, True])
@torch.no_grad()
def test_peft_loads_ours_unchanged(tmp_path: Path, lm_head: bool) -> None:
    path = random_llama(tmp_path / "model", tied=False)
    policy = make_policy(path, rank=2, lm_head=lm_head)
    shake(policy)
    adapter = save_adapter(policy, tmp_path / "adapters", version=3, run_name="r")
    assert adapter.path.name == "v000003"
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), adapter.path)
    assert torch.allclose(loaded(input_ids=IDS).logits, logits_of(policy), atol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
@torch.no_grad()
def test_adapters_of_conv1d_layers_are_pefts(tmp_path: Path, variant: str) -> None:
    """GPT-2's weights are [d_in, d_out]: trained in place, read by PEFT and merged."""
    path = random_gpt2(tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")  # which a merged model has to have
    policy = make_policy(path, rank=2, variant=variant)
    base = AutoModelForCausalLM.from_pretrained(path)
    assert len(policy.target_names) == 8
    layer = policy.model.get_submodule("transformer.h.0.attn.c_attn")
    assert torch.equal(layer.weight.T, base.get_submodule("transformer.h.0.attn.c_attn").weight)
    assert layer.weight.T.is_contiguous()  # a view, no copy
    start = logits_of(policy)
    assert torch.allclose(start, base(input_ids=IDS).logits, atol=1e-5)
    shake(policy, size=0.1)
    assert (logits_of(policy) - start).abs().max() > 0.1
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r")
    peft_settings = json.loads((adapter.path / "adapter_config.json").read_text())
    assert peft_settings["fan_in_fan_out"]
    assert peft_settings["target_modules"] == sorted(peft_settings["target_modules"])
    merged = AutoModelForCausalLM.from_pretrained(
        export_merged(path, adapter.path, tmp_path / "merged")
    )
    for model in (PeftModel.from_pretrained(base, adapter.path), merged):
        assert torch.allclose(model(input_ids=IDS).logits, logits_of(policy), atol=1e-4)


def test_the_config_lists_its_layers_in_one_order(tmp_path: Path) -> None:
    """PEFT would write a set, in the order of this process's string hashes."""
    adapter = save_adapter(
        make_policy(random_llama(tmp_path / "m")), tmp_path, version=1, run_name="r"
    )
    names = json.loads((adapter.path / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 7
    assert names == sorted(names)


@torch.no_grad()
def test_we_load_pefts_unchanged(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    config = LoraConfig(r=2, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    theirs.save_pretrained(tmp_path / "peft")
    policy = make_policy(path, rank=2)
    open_adapter(tmp_path / "peft", policy)
    assert torch.allclose(theirs(input_ids=IDS).logits, logits_of(policy), atol=1e-5)
    assert lora_settings(tmp_path / "peft") == {"rank": 2, "alpha": 32.0, "variant": "lora"}


def test_round_trip_keeps_every_bit_and_the_fingerprint(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    policy = make_policy(path)
    shake(policy)
    adapter = save_adapter(policy, tmp_path / "a", version=1, run_name="r")
    other = make_policy(path, seed=5)
    again = open_adapter(adapter.path, other)
    assert again == adapter
    assert fingerprint(other.published_tensors()) == adapter.fingerprint
    assert fingerprint(load_tensors(adapter.path)) == adapter.fingerprint


def test_fingerprint_sees_a_changed_value_and_a_swapped_name() -> None:
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    first = fingerprint(tensors)
    assert fingerprint({"a": tensors["b"], "b": tensors["a"]}) != first
    assert fingerprint({"a": torch.tensor([0.0, 1e-30]), "b": tensors["b"]}) != first
    assert fingerprint(dict(reversed(tensors.items()))) == first


def test_full_version_round_trip(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    policy = make_policy(path, mode="full")
    shake(policy)
    adapter = save_adapter(policy, tmp_path / "a", version=1, run_name="r")
    assert adapter.is_full
    assert adapter.rank == 0
    other = make_policy(path, mode="full")
    open_adapter(adapter.path, other)
    assert torch.equal(logits_of(other), logits_of(policy))


def test_refusals_name_the_thing_and_the_fix(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    policy = make_policy(path, rank=2)
    adapter = save_adapter(policy, tmp_path / "a", version=1, run_name="r")
    with pytest.raises(UserError, match=r"has rank 2; set lora.rank=2"):
        open_adapter(adapter.path, make_policy(path, rank=4))
    other = random_llama(tmp_path / "other", hidden=128)
    with pytest.raises(UserError, match="belongs to base model"):
        open_adapter(adapter.path, make_policy(other, rank=2))
    (adapter.path / "rl_lora.json").unlink()  # as PEFT would have written it
    with pytest.raises(UserError, match=r"another base model or rank: .* needs"):
        open_adapter(adapter.path, make_policy(other, rank=2))
    with pytest.raises(UserError, match=r"is an adapter; set lora.mode='lora'"):
        open_adapter(adapter.path, make_policy(path, mode="full"))
    with pytest.raises(UserError, match="holds neither"):
        open_adapter(tmp_path / "nowhere", policy)
    with pytest.raises(UserError, match=r"no adapter_config.json"):
        lora_settings(tmp_path / "nowhere")
    (adapter.path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="cannot be read"):
        open_adapter(adapter.path, policy)


def test_a_changed_file_does_not_pass_for_its_version(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    policy = make_policy(path)
    adapter = save_adapter(policy, tmp_path / "a", version=1, run_name="r")
    shake(policy)
    changed = save_adapter(policy, tmp_path / "b", version=1, run_name="r")
    source = changed.path / "adapter_model.safetensors"
    (adapter.path / "adapter_model.safetensors").write_bytes(source.read_bytes())
    with pytest.raises(UserError, match="fingerprint differs"):
        open_adapter(adapter.path, policy)


@pytest.mark.parametrize(
    ("departures", "kind"),
    [({"use_dora": True, "use_rslora": True}, "dora with rslora"), ({"peft_type": "IA3"}, "IA3")],
)
def test_other_kinds_are_refused(tmp_path: Path, departures: dict[str, object], kind: str) -> None:
    raw = {"peft_type": "LORA", "r": 1, "lora_alpha": 32} | departures
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"are supported, not {kind}"):
        lora_settings(tmp_path)


def test_remove_old_keeps_what_is_asked(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    for version in range(4):
        save_adapter(policy, tmp_path / "a", version=version, run_name="r")
    remove_old(tmp_path / "a", keep={2, 3})
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["v000002", "v000003"]


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / "rl_lora.json").write_text('{"version": 3')
    with pytest.raises(UserError, match=r"rl_lora\.json is not valid JSON"):
        version_in(tmp_path)
