"""Each fast path of the learner against its slow reference: values and gradients, float32, 1e-5."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rl_lora.nn import lora_matmul
from rl_lora.nn import token_logprobs as logprobs
from rl_lora.nn.context import adapters_off
from rl_lora.nn.cpu_workers import map_on_cores
from rl_lora.nn.lora import LoraLinear


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("tokens", "block"), [(1, 1), (5, 4), (13, 11), (99, 1024)])
def test_log_probs_without_logits_agree_with_the_definition(
    temperature: float, tokens: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", tokens * 11)
    monkeypatch.setattr(logprobs, "CHUNK_TOKENS", tokens)
    monkeypatch.setattr(logprobs, "CPU_BLOCK", block)
    head = nn.Linear(6, 11, bias=False).requires_grad_(False)
    head.weight.copy_(random(11, 6))
    target_ids_C = torch.arange(13) % 11
    weights_C = random(13, seed=2)
    results = []
    for score in (logprobs.plain, logprobs.score_hidden, logprobs.chunked):
        hidden_CD = (5 * random(13, 6, seed=1)).requires_grad_()
        logprobs_C, entropy_C = score(hidden_CD, head, target_ids_C, temperature)
        (gradient,) = torch.autograd.grad((weights_C * logprobs_C.exp()).sum(), hidden_CD)
        results.append((logprobs_C.detach(), entropy_C, gradient))
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            assert torch.allclose(value, expected, atol=1e-5)


def test_log_probs_of_two_tokens_by_hand() -> None:
    head = nn.Linear(1, 2, bias=False).requires_grad_(False)
    head.weight.copy_(torch.tensor([[0.0], [1.0]]))
    hidden_CD = torch.tensor([[float(torch.tensor(3.0).log())]])  # odds 1 : 3
    logprobs_C, entropy_C = logprobs.score_hidden(hidden_CD, head, torch.tensor([1]), 1.0)
    assert logprobs_C.exp().tolist() == pytest.approx([0.75])
    assert entropy_C.tolist() == pytest.approx([0.5623351])  # -(.25 ln .25 + .75 ln .75)


def test_an_lm_head_in_training_gets_its_gradient() -> None:
    head = nn.Linear(6, 11, bias=False)
    hidden_CD, target_ids_C = random(4, 6), torch.tensor([1, 0, 10, 3])
    gradients = []
    for score in (logprobs.plain, logprobs.score_hidden):
        logprobs_C, _ = score(hidden_CD, head, target_ids_C, 1.0)
        gradients.append(torch.autograd.grad(logprobs_C.sum(), head.weight)[0])
    assert gradients[0].abs().sum() > 0
    expected, found = gradients
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_lora_layer_agrees_with_the_formula(has_bias: bool, rank: int) -> None:
    base = nn.Linear(6, 5, bias=has_bias, dtype=torch.float64).requires_grad_(False)
    layer = LoraLinear(base, rank, 32.0, seed=0).double()
    layer.lora_B.data = random(5, rank).double()
    x = random(2, 7, 6, seed=9).double().requires_grad_()
    inputs = [x, layer.lora_A, layer.lora_B]
    out = base(x) + layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)
    expected = [out, *torch.autograd.grad((out * out).sum(), inputs)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for compute in (layer, compiled):
        found = compute(x)
        gradients = torch.autograd.grad((found * found).sum(), inputs)
        for one, other in zip([found, *gradients], expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_sums", [1, 8])
def test_compiled_rank_one_agrees_with_the_formula(
    num_sums: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, as on a CPU and as on a GPU."""
    monkeypatch.setitem(lora_matmul._NUM_SUMS, "cpu", num_sums)
    generator = torch.Generator().manual_seed(0)
    x_TI, y_TO, a_1I, b_O1, weights_TO = (
        torch.randn(*shape, generator=generator, requires_grad=True)
        for shape in ((7, 5), (7, 3), (1, 5), (3, 1), (7, 3))
    )
    inputs = (x_TI, y_TO, a_1I, b_O1)
    found = lora_matmul.RankOne.apply(*inputs, 0.7)
    expected = y_TO + 0.7 * x_TI @ a_1I.T @ b_O1.T
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((out * weights_TO).sum(), inputs) for out in (found, expected)]
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other)


def test_adapters_are_off_for_one_thread_only() -> None:
    layer = LoraLinear(nn.Linear(4, 3), 1, 32.0, seed=0)
    layer.lora_B.data.fill_(1.0)
    x = random(1, 4)
    base = layer.base(x)

    def compute(is_off: bool) -> Tensor:
        if is_off:
            with adapters_off():
                return layer(x)
        return layer(x)

    for is_off, out in zip(
        (True, False) * 4, map_on_cores(compute, (True, False) * 4), strict=True
    ):
        assert torch.allclose(out, base) is is_off


def test_work_on_cores_comes_in_order_and_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    assert list(map_on_cores(lambda i: i * i, list(range(7)))) == [0, 1, 4, 9, 16, 25, 36]
    assert torch.get_num_threads() == before


def test_an_error_on_a_core_is_raised_here_and_the_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        list(map_on_cores(lambda i: 1 // i, [1, 0, 1]))
    assert torch.get_num_threads() == before
