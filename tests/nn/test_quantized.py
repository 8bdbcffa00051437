"""A quantized base computes what its dequantized weights do, and holds only the quantized ones."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from rl_lora.adapters.files import save_adapter
from rl_lora.batches import whole_sequence
from rl_lora.config import LoraSection, ModelSection
from rl_lora.errors import UserError
from rl_lora.models.dequantized import dequantized_dir
from rl_lora.nn import quantized as quantizing
from rl_lora.nn.lora import LoraLinear
from rl_lora.nn.lora_matmul import lora_product
from rl_lora.nn.quantized import QuantizedWeight, quantized_weight
from rl_lora.policy import Policy, open_policy
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.types import SampleParams
from tests.export.test_export import add_tokenizer, base_model
from tests.helpers.tiny_models import (
    make_policy,
    random_gpt2,
    random_llama,
    random_mixtral,
    random_qwen3,
    shake,
)
from tests.samplers.test_torch_sampler import PROMPTS, TOKENIZER

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
each_kind = pytest.mark.parametrize("kind", ["int8", "nf4"])
IDS = tuple(range(3, 40))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RL_LORA_CACHE", str(tmp_path / "cache"))


def frozen(weight_OI: Tensor, kind: str) -> Any:
    """A linear layer without bias whose weight is quantized."""
    layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, dtype=weight_OI.dtype)
    weight = quantized_weight(layer, weight_OI, kind)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def quantized_policy(path: Path, kind: str, *, dtype: str = "float32", **lora: Any) -> Policy:
    model = ModelSection(name=str(path), device="cpu", dtype=dtype, quantize=kind)
    return open_policy(path, model, LoraSection(**lora), seed=0)


# --- one weight -----------------------------------------------------------------------------------


@installed
def test_int8_by_hand() -> None:
    # The rows' largest are 1 and 0.25, so that a step is 1/127 and 0.25/127; 63.5 rounds to even.
    layer = frozen(torch.tensor([[1.0, -0.5], [0.25, 0.0]]), "int8")
    weight = layer.weight
    assert isinstance(weight, QuantizedWeight)
    values, largest_O = weight.parts
    assert values.tolist() == [[127, -64], [127, 0]]
    assert largest_O.tolist() == [1.0, 0.25]
    x = torch.tensor([2.0, 1.0], requires_grad=True)
    y = layer(x)
    assert y.tolist() == pytest.approx([2 - 64 / 127, 0.5])
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([1.25, -64 / 127])  # the columns' sums


@installed
def test_nf4_by_hand() -> None:
    # One block of 64 with scale 2. Of NormalFloat's values 0.4407 and 0.5626 are next to 1 / 2.
    weight_OI = torch.zeros(1, 64)
    weight_OI[0, :4] = torch.tensor([2.0, -2.0, 1.0, 0.1])
    layer = frozen(weight_OI, "nf4")
    expected = [2.0, -2.0, 2 * 0.44070982933044434, 2 * 0.07958029955625534]
    assert layer.weight.dequantized()[0, :4].tolist() == pytest.approx(expected, rel=1e-6)
    assert not layer.weight.dequantized()[0, 4:].any()
    x = torch.arange(64.0, requires_grad=True)
    y = layer(x)
    assert y.item() == pytest.approx(-2 + 2 * expected[2] + 3 * expected[3])
    y.backward(torch.tensor([3.0]))
    assert x.grad is not None
    assert x.grad[:4].tolist() == pytest.approx([3 * value for value in expected])


@installed
@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantized_weight(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight_OI = torch.randn(70, 100).to(dtype)
    layer = frozen(weight_OI, kind)
    plain_OI = layer.weight.dequantized()
    assert plain_OI.dtype == dtype
    error = (plain_OI - weight_OI).float().norm() / weight_OI.float().norm()
    assert error < {"int8": 0.012, "nf4": 0.1}[kind]
    a_RI, b_OR = torch.randn(2, 100, requires_grad=True), torch.randn(70, 2, requires_grad=True)

    def results(product: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        x = torch.randn(2, 3, 100).to(dtype).requires_grad_()
        y = product(x)
        y.float().square().sum().backward()
        assert x.grad is not None
        return [y, x.grad]

    for wanted, found in (
        (lambda x: linear(x, plain_OI), layer),
        (
            lambda x: lora_product(x, plain_OI, None, a_RI, b_OR, 2.0),
            lambda x: lora_product(x, layer.weight, None, a_RI, b_OR, 2.0),
        ),
    ):
        assert all(map(torch.equal, results(found), results(wanted)))


@installed
@each_kind
def test_only_the_quantized_weight_is_kept_for_the_backward_pass(kind: str) -> None:
    layer, kept = frozen(torch.randn(70, 100), kind), list[Tensor]()
    lora = LoraLinear(frozen(torch.randn(70, 100), kind), rank=1, alpha=2.0, seed=0)

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x = torch.randn(3, 100, requires_grad=True)
        (layer(x).sum() + lora(x).sum()).backward()
    large = [tensor for tensor in kept if tensor.numel() == 7000]
    assert len(large) == 2
    assert all(isinstance(tensor, QuantizedWeight) for tensor in large)


@installed
@each_kind
def test_a_quantized_weight_moves_with_its_module_and_is_never_written_to(kind: str) -> None:
    layer = frozen(torch.randn(6, 64), kind)
    before = layer.weight.dequantized()
    with torch.no_grad(), pytest.raises(RuntimeError, match="frozen"):
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="frozen"):
        layer.weight.data.copy_(before)
    assert torch.equal(layer.to("cpu").weight.dequantized(), before)
    moved = layer.to("meta").weight
    assert isinstance(moved, nn.Parameter)
    assert isinstance(moved, QuantizedWeight)
    assert {part.device.type for part in (moved, *moved.parts)} == {"meta"}


@installed
@each_kind
def test_zero_rows_stay_zero(kind: str) -> None:
    weight_OI = torch.randn(3, 64)
    weight_OI[1] = 0
    found = frozen(weight_OI, kind).weight.dequantized()
    assert found.isfinite().all()
    assert not found[1].any()


# --- a model --------------------------------------------------------------------------------------


@installed
@pytest.mark.usefixtures("cache")
@each_kind
@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (random_llama, {"rank": 2}),
        (random_llama, {"rank": 2, "layers": "attention"}),
        (random_llama, {"rank": 2, "variant": "dora"}),
        (random_llama, {"rank": 2, "variant": "pissa"}),
        (random_gpt2, {"rank": 2}),
        (random_qwen3, {"rank": 2, "lm_head": True}),
    ],
)
def test_a_policy_is_that_of_a_model_with_the_dequantized_weights(
    tmp_path: Path, kind: str, make: Any, lora: dict[str, Any]
) -> None:
    path = make(tmp_path / "model")
    add_tokenizer(path)
    plain = dequantized_dir(path, kind, torch.float32)
    policies = quantized_policy(path, kind, **lora), make_policy(plain, **lora)
    has_quantized = [
        any(isinstance(parameter, QuantizedWeight) for parameter in policy.model.parameters())
        for policy in policies
    ]
    assert has_quantized == [True, False]
    assert policies[0].base_fingerprint() == policies[1].base_fingerprint()
    assert policies[0].base_fingerprint() != make_policy(path, **lora).base_fingerprint()
    found = []
    for policy in policies:
        shake(policy)
        logprobs_C, _ = policy.token_logprobs(whole_sequence(IDS), 1.0)
        logprobs_C.sum().backward()
        reference_C = policy.reference_logprobs(whole_sequence(IDS), 1.0)
        gradients = [parameter.grad for parameter in policy.trainable().values()]
        found.append([logprobs_C, reference_C, *gradients])
    for own, other in zip(*found, strict=True):
        assert torch.allclose(own, other, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1], atol=1e-3)


@installed
@pytest.mark.usefixtures("cache")
def test_the_dequantized_directory_is_made_once_and_leaves_all_else(tmp_path: Path) -> None:
    path = base_model(tmp_path / "model")
    made = dequantized_dir(path, "nf4", torch.float32)
    assert dequantized_dir(path, "nf4", torch.float32) == made
    assert dequantized_dir(path, "int8", torch.float32) != made
    assert dequantized_dir(path, None, torch.float32) == path
    before, after = (load_file(folder / "model.safetensors") for folder in (path, made))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}
    random_llama(path, seed=1)
    assert dequantized_dir(path, "nf4", torch.float32) != made


@installed
@each_kind
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sampler_decodes_with_the_same_weights(tmp_path: Path, kind: str, dtype: str) -> None:
    policy = quantized_policy(random_llama(tmp_path / "model"), kind, dtype=dtype, rank=2)
    shake(policy)
    sampler = TorchSampler(policy, tokenizer=TOKENIZER, end_token_ids=(2,), max_model_len=64)
    sampler.set_adapter(save_adapter(policy, tmp_path / "adapters", version=1, run_name="r"))
    groups = sampler.sample(PROMPTS, SampleParams(2, max_tokens=12, temperature=1.0, seed=3))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            ids = (*prompt.token_ids, *completion.token_ids)
            own, _ = policy.token_logprobs(whole_sequence(ids), 1.0)
            own = own[len(prompt.token_ids) - 1 :].detach()
            wanted = torch.tensor(completion.sampler_logprobs_T)
            assert torch.allclose(own, wanted, atol=1e-5 if dtype == "float32" else 0.1)


@installed
def test_transformers_quantizes_to_the_same_nf4(tmp_path: Path) -> None:
    """The model card's lines give the base that was trained on."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = random_llama(tmp_path / "model")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, device_map="cpu", quantization_config=config
    )
    policy = quantized_policy(path, "nf4", rank=1)
    for name in policy.target_names:
        weight: Any = model.get_submodule(name).weight
        own: Any = policy.model.get_submodule(name).weight
        assert torch.equal(dequantize_4bit(weight.data, weight.quant_state), own.dequantized())


# --- refusals -------------------------------------------------------------------------------------


@installed
def test_a_mixture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"experts.*remove model\.quantize"):
        quantized_policy(random_mixtral(tmp_path / "model"), "int8", rank=2)


def test_without_bitsandbytes_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantizing.importlib.util, "find_spec", lambda name: None)
    quantizing._library.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'rl-lora\[quant\]'"):
        quantized_policy(random_llama(tmp_path / "model"), "nf4", rank=1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "full"}, r"model\.quantize='int8'.*lora\.mode='lora'"),
        ({"quantize": "fp4"}, "quantize"),
    ],
)
def test_policies_that_cannot_be_quantized(settings: dict[str, str], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Policy.load("tiny-noisy", device="cpu", **{"quantize": "int8", **settings})  # type: ignore[arg-type]
