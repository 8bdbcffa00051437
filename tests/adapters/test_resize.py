"""Adapters of unlike rank, alpha and layers in one policy: the log-probs of each are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora.adapters.files import fingerprint, load_tensors, open_adapter, save_adapter
from rl_lora.adapters.peft_files import MANIFEST_FILE
from rl_lora.adapters.resize import common_settings, fitted
from rl_lora.errors import UserError
from rl_lora.policy import Policy
from tests.helpers.tiny_models import make_policy, random_llama, shake

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])

SHAPES: list[dict[str, Any]] = [
    {"rank": 1, "alpha": 32.0, "layers": "attention"},
    {"rank": 2, "alpha": 16.0, "layers": "mlp"},
    {"rank": 5, "alpha": 8.0, "layers": "all"},
    {"rank": 3, "alpha": 32.0, "layers": "all", "lm_head": True},
    {"rank": 4, "alpha": 8.0, "variant": "rslora"},
    {"rank": 2, "alpha": 16.0, "layers": "mlp", "variant": "pissa"},
    {"rank": 1, "alpha": 4.0, "variant": "olora"},
]


@torch.no_grad()
def logprobs_of(policy: Policy) -> torch.Tensor:
    return policy.model(input_ids=IDS).logits.log_softmax(-1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return random_llama(tmp_path / "model", tied=False)


def published(model: Path, folder: Path, seed: int, **lora: Any) -> tuple[Path, torch.Tensor]:
    """An adapter with random weights, and the log-probs under it."""
    policy = make_policy(model, **lora)
    shake(policy, seed=seed, size=0.05)
    adapter = save_adapter(policy, folder / f"a{seed}", version=seed, run_name="r")
    return adapter.path, logprobs_of(policy)


def test_adapters_of_every_shape_keep_their_logprobs_in_one_policy(
    tmp_path: Path, model: Path
) -> None:
    made = [published(model, tmp_path, seed, **lora) for seed, lora in enumerate(SHAPES)]
    settings = common_settings([path for path, _ in made])
    assert settings == {**SHAPES[2], "variant": "lora", "lm_head": True}
    policy = make_policy(model, **settings)
    base = logprobs_of(policy)
    for index, (path, expected) in enumerate(made):
        before = fingerprint(load_tensors(path))
        open_adapter(fitted(path, policy, tmp_path / "scratch" / str(index)), policy)
        assert torch.allclose(logprobs_of(policy), expected, atol=1e-5)
        assert (expected - base).abs().max() > 1e-2  # a control: the adapter matters
        assert fingerprint(load_tensors(path)) == before


def test_rows_are_zero_and_alpha_goes_into_b(tmp_path: Path, model: Path) -> None:
    path, _ = published(model, tmp_path, 1, rank=1, alpha=32.0)
    policy = make_policy(model, rank=2, alpha=16.0)
    old, new = load_tensors(path), load_tensors(fitted(path, policy, tmp_path / "scratch"))
    name_a = next(name for name in old if "lora_A" in name)
    name_b = name_a.replace("lora_A", "lora_B")
    assert torch.equal(new[name_a], torch.cat([old[name_a], torch.zeros_like(old[name_a])]))
    # 32 / 1 over 16 / 2.
    zeros = torch.zeros_like(old[name_b])
    assert torch.equal(new[name_b], torch.cat([4 * old[name_b], zeros], dim=1))


def test_an_adapter_that_fits_is_taken_as_it_is(tmp_path: Path, model: Path) -> None:
    path, _ = published(model, tmp_path, 1, rank=2, layers="attention")
    settings = common_settings([path])
    expected = {"rank": 2, "alpha": 32.0, "variant": "lora", "layers": "attention"}
    assert settings == {**expected, "lm_head": False}
    assert fitted(path, make_policy(model, **settings), tmp_path / "scratch") == path
    assert not (tmp_path / "scratch").exists()
    assert common_settings([]) == {}


def test_dora_is_evaluated_by_itself_and_keeps_the_lengths_of_other_layers(
    tmp_path: Path, model: Path
) -> None:
    path, expected = published(model, tmp_path, 1, rank=2, layers="attention", variant="dora")
    other, _ = published(model, tmp_path, 2, rank=2)
    with pytest.raises(UserError, match="a DoRA adapter cannot share an engine"):
        common_settings([path, other])
    settings = common_settings([path])
    assert settings["variant"] == "dora"
    policy = make_policy(model, **{**settings, "layers": "all"})
    open_adapter(fitted(path, policy, tmp_path / "scratch"), policy)
    assert torch.allclose(logprobs_of(policy), expected, atol=1e-5)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, model: Path) -> None:
    wide = random_llama(tmp_path / "wide", tied=False, hidden=128)
    scratch, policy, wide_policy = (
        tmp_path / "scratch",
        make_policy(model, rank=2),
        make_policy(wide, rank=2),
    )
    narrow_path, _ = published(model, tmp_path, 1, rank=1)
    wide_path, _ = published(wide, tmp_path, 2, rank=1)
    with pytest.raises(UserError, match=r"belongs to base model '.*wide', not '.*model'"):
        fitted(wide_path, policy, scratch)
    for path in (narrow_path, wide_path):  # as another tool writes them
        (path / MANIFEST_FILE).unlink()
    with pytest.raises(UserError, match=r"is of another base model: .* or a lower rank"):
        fitted(wide_path, policy, scratch)
    # A narrower matrix would fit into a wider one, and mean nothing there.
    with pytest.raises(UserError, match=r"is of another base model: .* or a lower rank"):
        fitted(narrow_path, wide_policy, scratch)
    path, _ = published(model, tmp_path, 3, rank=1, layers="mlp")
    with pytest.raises(UserError, match="is of another base model: it has"):
        fitted(path, make_policy(model, rank=2, layers="attention"), scratch)
