"""The plain matmuls for LoRA on CPU, compared with vLLM's own CPU path."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lora.samplers.vllm.process import process_kept

RANK, INPUTS = 3, 16
OUTPUTS = (8, 4, 4)  # slices, as of q, k and v
LORA_IDS = (41, 42)  # in slots 0 and 1


@pytest.fixture(autouse=True, scope="module")
def cpu_build() -> None:
    """Skips without vLLM's CPU build. Imported here, not at collection: it takes seconds."""
    pytest.importorskip("vllm")
    with process_kept():
        from vllm.platforms import current_platform
    if not current_platform.is_cpu():
        pytest.skip("needs vLLM's CPU build")


def make_pair(lora_ids_S: Sequence[int], lengths_S: Sequence[int]) -> list[Any]:
    """vLLM's wrapper and ours for a batch of sequences with these adapters and token numbers."""
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from rl_lora.samplers.vllm.cpu_lora import MatmulPunicaWrapper

    tokens = tuple(i for i, n in zip(lora_ids_S, lengths_S, strict=True) for _ in range(n))
    wrappers = [
        cls(64, max_batches=8, device="cpu") for cls in (PunicaWrapperCPU, MatmulPunicaWrapper)
    ]
    for wrapper in wrappers:
        mapping = LoRAMapping(tokens, tuple(lora_ids_S), is_prefill=True)
        wrapper.update_metadata(mapping, list(LORA_IDS), 2, 100)
    return wrappers


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora_ids_S", [(41, 41, 41), (42, 42, 42), (0, 0, 0), (41, 42, 41)])
def test_linear_layers(lora_ids_S: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = random(9, INPUTS, dtype=dtype)
    a = tuple(random(2, 1, RANK, INPUTS, dtype=dtype) for _ in OUTPUTS)
    b = tuple(random(2, 1, width, RANK, dtype=dtype) for width in OUTPUTS)
    y = random(9, sum(OUTPUTS), dtype=dtype)
    results = []
    for wrapper in make_pair(lora_ids_S, (4, 1, 4)):
        results.append(y.clone())
        wrapper.add_lora_linear(results[-1], x, a, b, 0.5, OUTPUTS)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]  # vLLM's rounds h to bfloat16
    torch.testing.assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)
    assert torch.equal(results[1], y) == (lora_ids_S == (0, 0, 0))


def test_linear_layer_by_hand() -> None:
    _, ours = make_pair((42,), (2,))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    a = torch.tensor(
        [[[[9.0, 9.0]]], [[[1.0, -1.0]]]]
    )  # slot 1 serves adapter 42: h = x0 - x1 = -1
    b = torch.tensor([[[[9.0], [9.0]]], [[[10.0], [20.0]]]])
    y = torch.ones(2, 2)
    ours.add_lora_linear(y, x, (a,), (b,), 2.0, (2,))
    assert y.tolist() == [[-19.0, -39.0], [-19.0, -39.0]]


def test_embedding() -> None:
    torch.manual_seed(0)
    x, b, y = random(9, RANK), random(2, 1, 8, RANK), random(9, 8)
    results = []
    for wrapper in make_pair((42, 42, 42), (4, 1, 4)):
        results.append(y.clone())
        wrapper.add_lora_embedding(results[-1], x, b)
    torch.testing.assert_close(results[1], results[0])
    assert not torch.equal(results[1], y)


def test_logits() -> None:
    torch.manual_seed(0)
    x, y = random(3, INPUTS), random(3, 20)
    a, b = random(2, 1, RANK, INPUTS), random(2, 1, 18, RANK)  # y is padded to 20
    results = []
    for wrapper in make_pair((41, 41, 41), (4, 1, 4)):
        results.append(y.clone())
        wrapper.add_lora_logits(results[-1], x, a, b, 1.0)
    torch.testing.assert_close(results[1], results[0])
    assert not torch.equal(results[1], y)


def test_logits_of_the_base_stay_the_bases() -> None:
    """vLLM's own path gives them the last slot's adapter."""
    x, y = torch.ones(3, INPUTS), torch.zeros(3, 20)
    a, b = torch.ones(2, 1, RANK, INPUTS), torch.ones(2, 1, 20, RANK)
    _, ours = make_pair((0, 0, 0), (4, 1, 4))
    ours.add_lora_logits(y, x, a, b, 1.0)
    assert not y.any()


def test_logits_of_more_rows_than_sequences() -> None:
    """As prompt log-probs need them: each of the 9 rows is 16 ones times A, times B, 3 ranks."""
    a, b = torch.ones(2, 1, RANK, INPUTS), torch.ones(2, 1, 20, RANK)
    _, ours = make_pair((41, 41, 41), (4, 1, 4))
    y = torch.zeros(9, 20)
    ours.add_lora_logits(y, torch.ones(9, INPUTS), a, b, 1.0)
    assert y.unique().tolist() == [48.0]


def test_installed_is_undone() -> None:
    from vllm.platforms import current_platform

    from rl_lora.samplers.vllm import cpu_lora as vllm_cpu_lora

    before = current_platform.get_punica_wrapper()
    with vllm_cpu_lora.installed() as is_installed:
        assert is_installed
        assert current_platform.get_punica_wrapper().endswith("MatmulPunicaWrapper")
    assert current_platform.get_punica_wrapper() == before


def test_another_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    from rl_lora.samplers.vllm import cpu_lora as vllm_cpu_lora

    monkeypatch.setitem(vllm_cpu_lora._SIGNATURES, "add_lora_linear", ["self", "y"])
    with vllm_cpu_lora.installed() as is_installed:
        assert not is_installed
        assert current_platform.get_punica_wrapper().endswith("PunicaWrapperCPU")


def test_the_sampler_module_loads_without_vllm() -> None:
    code = "import rl_lora.samplers.vllm.sampler, sys; raise SystemExit('vllm' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
