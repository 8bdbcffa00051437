"""LoRA's variants: hand-worked numbers, PEFT's own starts and logits, gradients, round trips."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from rl_lora.adapters.files import open_adapter, save_adapter
from rl_lora.adapters.peft_files import lora_settings
from rl_lora.batches import pack_samples
from rl_lora.cli import _parse
from rl_lora.commands.eval import evaluation
from rl_lora.config import (
    VARIANT_NAMES,
    LoraSection,
    RunConfig,
    parse_config,
)
from rl_lora.errors import UserError
from rl_lora.learner import Learner
from rl_lora.models.shapes import build_on_meta
from rl_lora.nn.lora import LoraLinear, target_names
from rl_lora.nn.variants import (
    _subspace,
    initial_factors,
    merged_dora,
    row_norms,
    scaling_of,
    served_alpha,
    served_rank,
    squared_norms,
    top_singular,
)
from rl_lora.planning.capacity import Capacity, rank_that_holds
from rl_lora.planning.counts import matmul_counts, parameter_counts
from rl_lora.policy import Policy
from rl_lora.runs.checkpoint import load_checkpoint, save_checkpoint
from rl_lora.samplers.vllm import settings as vllm_settings
from rl_lora.schedule import parameter_groups
from rl_lora.types import Microbatch, TrainSample
from tests.helpers.tiny_models import make_policy, random_llama, shake

VARIANTS = ("lora", "rslora", "pissa", "olora", "dora")
PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
}
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch() -> list[Microbatch]:
    samples = [
        TrainSample((5, 6, 7), (8, 9, 2), (0.0,) * 3, 1.0, 0),
        TrainSample((11, 12), (13, 14, 2), (0.0,) * 3, 1.0, 0),
    ]
    (batches,) = pack_samples(samples, microbatch_tokens=1000)
    return batches


def make_learner(policy: Policy, **optim: Any) -> Learner:
    return Learner(policy, **optim)


@torch.no_grad()
def logits_of(policy: Policy) -> Tensor:
    return policy.model(input_ids=IDS).logits


# --- numbers by hand ------------------------------------------------------------------------------


def test_scalings_by_hand() -> None:
    assert scaling_of("lora", 32.0, 16) == 2.0
    assert scaling_of("rslora", 32.0, 16) == 8.0  # alpha / sqrt 16
    assert scaling_of("rslora", 32.0, 1) == scaling_of("lora", 32.0, 1)
    section = LoraSection(variant="pissa", rank=4, alpha=16.0)
    assert (served_rank(section), served_alpha(section)) == (8, 32.0)  # 32 / 8 = 16 / 4


def test_pissa_of_a_diagonal_weight_by_hand() -> None:
    weight = torch.tensor([[8.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    a_RI, b_OR = initial_factors("pissa", weight, rank=1, scaling=2.0)
    # The largest singular value is 8; sqrt(8 / 2) = 2 goes to each factor.
    assert torch.allclose(a_RI, torch.tensor([[2.0, 0.0]]))
    assert torch.allclose(b_OR, torch.tensor([[2.0], [0.0], [0.0]]))


def test_olora_by_hand() -> None:
    weight = torch.tensor([[3.0, 1.0], [4.0, 7.0]])
    a_RI, b_OR = initial_factors("olora", weight, rank=1, scaling=2.0)
    # The first column has length 5; Householder's sign makes Q's column -(3, 4) / 5.
    assert torch.allclose(b_OR, torch.tensor([[-0.6], [-0.8]]))
    assert torch.allclose(a_RI, torch.tensor([[-5.0, -6.2]]))  # -(3 + 28) / 5 = -6.2


def test_row_norms_are_those_of_the_moved_weight() -> None:
    weight, a_RI, b_OR = random(7, 5), random(2, 5, seed=1), random(7, 2, seed=2)
    norms_O = row_norms(squared_norms(weight), weight, a_RI, b_OR, scaling=3.0)
    assert torch.allclose(norms_O, (weight + 3.0 * b_OR @ a_RI).norm(dim=1), rtol=1e-5)


def test_dora_by_hand() -> None:
    moved = merged_dora(
        torch.tensor([[3.0, 0.0]]), torch.tensor([10.0]), torch.tensor([[0.0, 2.0]]),
        torch.tensor([[1.0]]), scaling=2.0,
    )  # fmt: skip
    assert torch.allclose(moved, torch.tensor([[6.0, 8.0]]))  # (3, 4) has length 5


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (30, 30)])
def test_singular_vectors_are_those_of_an_svd_by_either_way(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for found in (top_singular(weight, 3), _subspace(weight, 3)):
        assert torch.allclose(found[1].float(), values[:3], rtol=1e-4)
        product = (found[0] * found[1] @ found[2]).float()
        assert torch.allclose(product, left[:, :3] * values[:3] @ right[:3], atol=1e-2)
    assert all(
        torch.equal(*pair)
        for pair in zip(top_singular(weight, 3), top_singular(weight, 3), strict=True)
    )


def test_a_rank_beyond_the_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora\.rank=9.*pissa.*no more than 6 directions"):
        initial_factors("pissa", random(6, 20), rank=9, scaling=1.0)


# --- against PEFT ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["pissa", "olora"])
def test_starts_are_pefts_up_to_sign(variant: str, tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model", tied=False)
    policy = make_policy(path, rank=2, alpha=16.0, variant=variant)
    config = LoraConfig(r=2, lora_alpha=16, target_modules="all-linear", **PEFT_SETTINGS[variant])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    for name, parameter in theirs.named_parameters():
        if not parameter.requires_grad:
            continue
        ours = policy.state_tensors()[name.replace(".default", "")]
        other = parameter.detach()
        axis = 1 if "lora_A" in name else 0
        signs = (ours * other).sum(dim=axis, keepdim=True).sign()
        assert torch.allclose(ours, other * signs, atol=1e-4), name


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_start_is_the_base_to_the_bit_and_the_base_is_not_written_to(
    variant: str, tmp_path: Path
) -> None:
    path = random_llama(tmp_path / "model", tied=False)
    policy = make_policy(path, rank=2, variant=variant, lm_head=True)
    base = AutoModelForCausalLM.from_pretrained(path)
    with policy.adapter_off():
        off = logits_of(policy)
    assert torch.allclose(base(input_ids=IDS).logits, off, atol=1e-6)
    assert torch.allclose(logits_of(policy), off, atol=2e-6)
    for name, parameter in base.named_parameters():
        own = policy.model.get_parameter(
            name.replace(".weight", ".base.weight") if "proj" in name or "lm_head" in name else name
        )
        assert torch.equal(own, parameter), name


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_peft_serves_what_is_published(variant: str, tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model", tied=False)
    policy = make_policy(path, rank=2, variant=variant)
    before = logits_of(policy)
    shake(policy)
    adapter = save_adapter(policy, tmp_path / "adapters", version=1, run_name="r")
    base = AutoModelForCausalLM.from_pretrained(path)
    loaded = PeftModel.from_pretrained(base, adapter.path)
    assert torch.allclose(loaded(input_ids=IDS).logits, logits_of(policy), atol=1e-5)
    assert (logits_of(policy) - before).abs().max() > 0.01
    assert adapter.rank == (4 if variant in ("pissa", "olora") else 2)


@torch.no_grad()
def test_we_load_pefts_dora(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    config = LoraConfig(
        r=2, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, use_dora=True
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(path), config)
    theirs.save_pretrained(tmp_path / "peft")
    assert lora_settings(tmp_path / "peft") == {"rank": 2, "alpha": 32.0, "variant": "dora"}
    policy = make_policy(path, rank=2, variant="dora")
    open_adapter(tmp_path / "peft", policy)
    assert torch.allclose(theirs(input_ids=IDS).logits, logits_of(policy), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_pefts(variant: str, tmp_path: Path) -> None:
    """One layer, moved from its start alike on both sides."""
    base = nn.Linear(12, 8).requires_grad_(False)
    plain = nn.Linear(12, 8)
    plain.load_state_dict(base.state_dict())
    layer = LoraLinear(base, 2, 16.0, seed=3, variant=variant)
    settings = PEFT_SETTINGS[variant]
    config = LoraConfig(r=2, lora_alpha=16, target_modules=["0"], **settings)
    peft_model = get_peft_model(nn.Sequential(plain), config)  # type: ignore[arg-type]
    theirs = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    own = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    a0, b0 = (t for n, t in layer.state().items() if "0" in n) if layer.is_shifted else (None, None)
    with torch.no_grad():
        for parameter, other in zip(own.values(), theirs.values(), strict=True):
            if variant in ("pissa", "olora"):  # PEFT's base goes with PEFT's start and its signs
                parameter.copy_(other)
            parameter.add_(random(*parameter.shape, seed=4) * 0.1)
            other.copy_(parameter)
        if a0 is not None and b0 is not None:
            a0.copy_(start_of(peft_model, "A", random(2, 12, seed=4) * 0.1))
            b0.copy_(start_of(peft_model, "B", random(8, 2, seed=4) * 0.1))
    x, weights = random(3, 5, 12).requires_grad_(), random(3, 5, 8, seed=9)
    out, expected = layer(x), peft_model(x)
    assert torch.allclose(out, expected, atol=1e-5)
    ours = torch.autograd.grad((out * weights).sum(), [x, *own.values()])
    wanted = torch.autograd.grad((expected * weights).sum(), [x, *theirs.values()])
    for mine, wanted_one in zip(ours, wanted, strict=True):
        assert torch.allclose(mine, wanted_one, rtol=1e-4, atol=1e-4)


def start_of(peft_model: nn.Module, side: str, moved_by: Tensor) -> Tensor:
    now = next(p for n, p in peft_model.named_parameters() if f"lora_{side}" in n)
    return now.detach() - moved_by


@pytest.mark.parametrize("variant", ["pissa", "olora", "dora"])
def test_the_fast_path_has_the_gradients_of_the_plain_formula(variant: str) -> None:
    """Against W + s (B A - B0 A0) written out."""
    layers = [LoraLinear(nn.Linear(12, n), 2, 8.0, seed=n, variant=variant) for n in (8, 6)]
    for layer in layers:
        layer.base.requires_grad_(False)
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.data.add_(random(*parameter.shape, seed=5) * 0.1)
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    x = random(5, 12).requires_grad_()
    fast = [layer(x) for layer in layers]
    plain = []
    for layer in layers:
        weight = layer.base.weight.detach() + layer.scaling * layer.lora_B @ layer.lora_A
        if layer.is_shifted:
            weight = weight - layer.scaling * layer.get_buffer("lora_B0") @ layer.get_buffer(
                "lora_A0"
            )
        if layer.magnitude is not None:
            weight = weight * (layer.magnitude.value / weight.detach().norm(dim=1))[:, None]
        plain.append(x @ weight.T + layer.base.bias.detach())
    for one, other in zip(fast, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    grads = [
        torch.autograd.grad(sum(out.square().sum() for out in outs), [x, *parameters])  # type: ignore[arg-type]
        for outs in (fast, plain)
    ]
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


# --- training, checkpoints, LoRA+ -----------------------------------------------------------------


def test_lora_plus_moves_b_by_its_own_rate(tmp_path: Path) -> None:
    """Adam's first step is lr times the gradient's sign, so that the rates can be read off."""
    policy = make_policy(random_llama(tmp_path / "model"), variant="dora")
    shake(policy)
    before = {n: p.detach().clone() for n, p in policy.trainable().items()}
    make_learner(policy, lora_plus_ratio=16.0, eps=0.0).fit(batch(), lr=1e-3)
    for name, parameter in policy.trainable().items():
        rate = 1e-3 if name.endswith("lora_A") else 16e-3
        assert float((parameter.detach() - before[name]).abs().max()) == pytest.approx(
            rate, rel=1e-2
        ), name


def test_only_lora_plus_has_two_groups(tmp_path: Path) -> None:
    tensors = make_policy(random_llama(tmp_path / "model")).optimized.tensors
    (group,) = parameter_groups(tensors, 1.0)
    assert [id(p) for p in group["params"]] == [id(p) for p in tensors.values()]
    of_a, of_b = parameter_groups(tensors, 2.0)
    assert of_a["params"] == [tensors["lora_A"]]
    assert of_b["params"] == [tensors["lora_B"]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_in_the_same_bits(variant: str, tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    ratio = 4.0 if variant in ("lora", "dora") else 1.0
    config = parse_config(
        {
            "run": {"output_dir": str(tmp_path), "name": "r"},
            "sampling": {"backend": "torch"},
            "lora": {"rank": 2, "variant": variant},
            "optim": {"lora_plus_ratio": ratio},
        }
    )
    whole = make_learner(make_policy(path, rank=2, variant=variant), lora_plus_ratio=ratio)
    whole.fit(batch(), lr=1e-3)
    save_checkpoint(1, whole, config)
    whole.fit(batch(), lr=1e-3)
    policy = make_policy(path, seed=7, rank=2, variant=variant)
    for name, tensor in policy.state_tensors().items():
        tensor.mul_(1.5 if "0" in name else 1.0)  # a start found again on another machine
    other = make_learner(policy, lora_plus_ratio=ratio)
    load_checkpoint(tmp_path / "r" / "checkpoints" / "step_000001", other)
    other.fit(batch(), lr=1e-3)
    expected = whole.policy.state_tensors()
    assert other.policy.state_tensors().keys() == expected.keys()
    for name, tensor in other.policy.state_tensors().items():
        assert torch.equal(tensor, expected[name]), name
    assert other.optimizer.param_groups[-1]["lr"] == pytest.approx(ratio * 1e-3)


def test_the_checkpoint_of_a_plain_run_has_no_new_names(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    assert policy.state_tensors().keys() == policy.published_tensors().keys()
    assert {name.rsplit(".", 2)[-2] for name in policy.state_tensors()} == {"lora_A", "lora_B"}


# --- accounts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_those_of_the_policy(variant: str, tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    policy = make_policy(path, rank=2, variant=variant)
    model = AutoModelForCausalLM.from_pretrained(path)
    counts = parameter_counts(model, policy.lora)
    assert counts.trainable == sum(p.numel() for p in policy.trainable().values())
    lengths = [n for n in policy.trainable() if n.endswith("magnitude.value")]
    assert counts.fixed == sum(policy.trainable()[n].numel() for n in lengths)
    # Of a square layer 2 N^2 + 6 N R, with R the rank that is computed.
    plain = matmul_counts(model, LoraSection(rank=2))
    served = matmul_counts(model, LoraSection(rank=served_rank(policy.lora)))
    assert matmul_counts(model, policy.lora) == served
    assert (served.lora > plain.lora) is (variant in ("pissa", "olora"))


def test_the_rank_that_holds_counts_magnitudes_once() -> None:
    # Rank 2 with 40 numbers a rank and 20 magnitudes: 100 parameters, 200 bits. 500 bits take 250
    # parameters, of which 230 are by rank: 5.75.
    capacity = Capacity("episodes", 500, num_parameters=100, num_fixed=20)
    assert rank_that_holds(capacity, rank=2) == 6
    assert rank_that_holds(Capacity("episodes", 500, num_parameters=100), rank=2) == 5


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora": {"mode": "full", "variant": "dora"}}, r"lora\.variant='dora' needs an adapter"),
        ({"lora": {"mode": "full"}, "optim": {"lora_plus_ratio": 2}}, r"lora_plus_ratio=2 sets"),
        ({"lora": {"variant": "dora"}}, r'vLLM serves no DoRA.*sampling\.backend="torch"'),
        ({"lora": {"variant": "pissa", "rank": 300}}, r"twice its rank.*rank=300 to 256"),
        ({"lora": {"variant": "rs-lora"}}, r"lora\.variant"),
        ({"optim": {"lora_plus_ratio": 0}}, r"optim\.lora_plus_ratio"),
    ],
)  # fmt: skip
def test_combinations_that_do_not_exist_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_config(settings)
    assert "\n" not in str(caught.value)


def test_every_variant_has_a_name() -> None:
    assert set(VARIANT_NAMES) == set(VARIANTS) - {"lora"}
    assert set(get_args(LoraSection.model_fields["variant"].annotation)) == set(VARIANTS)


def test_dora_with_the_torch_sampler_is_a_job() -> None:
    raw = {"lora": {"variant": "dora"}, "sampling": {"backend": "torch"}}
    assert parse_config(raw).lora.variant == "dora"
    assert RunConfig().lora.variant == "lora"


def test_an_evaluation_of_dora_in_vllm_is_refused_before_any_work(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    adapter = save_adapter(
        make_policy(path, variant="dora"), tmp_path / "a", version=1, run_name="r"
    )
    config = tmp_path / "evaluation.toml"
    config.write_text(f'[model]\nname = "{path}"\n')
    with pytest.raises(UserError, match=r'v000001: .*vLLM serves no DoRA.*backend="torch"'):
        evaluation(
            _parse(
                ["eval", str(config), f"run.output_dir={tmp_path}", "--adapter", str(adapter.path)]
            )
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["rslora", "pissa", "olora", "dora"])
def test_experts_have_only_plain_lora(variant: str) -> None:
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = build_on_meta(config)
    section = LoraSection(rank=2, variant=variant)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"lora\.variant='{variant}': the experts of Mixtral"):
        target_names(model, section)
    attention = section.model_copy(update={"layers": "attention"})
    assert len(target_names(model, attention)) == 4


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora"])
def test_pefts_adapters_of_a_changed_base_are_refused(start: str, tmp_path: Path) -> None:
    raw = {"peft_type": "LORA", "r": 1, "lora_alpha": 32, "init_lora_weights": start}
    (tmp_path / "adapter_config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="a base that PEFT has changed"):
        lora_settings(tmp_path)


def test_an_adapter_of_another_variant_does_not_open(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    adapter = save_adapter(
        make_policy(path, variant="rslora", rank=4), tmp_path / "a", version=1, run_name="r"
    )
    with pytest.raises(UserError, match=r"has variant rslora; set lora\.variant=rslora"):
        open_adapter(adapter.path, make_policy(path, rank=4))
    settings = lora_settings(adapter.path)
    own = settings["alpha"] / math.sqrt(settings["rank"])
    assert own == scaling_of("rslora", 32.0, 4) == 16.0


def test_the_engine_gets_a_slot_for_the_served_rank(tmp_path: Path) -> None:
    slots = {}
    for variant in ("lora", "pissa"):
        lora = LoraSection(rank=8, variant=variant)  # type: ignore[arg-type]
        settings = vllm_settings.lora_settings(lora, torch.float32)
        slots[variant] = settings["max_lora_rank"]
    assert slots == {"lora": 8, "pissa": 16}
