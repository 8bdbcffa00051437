"""vLLM's CPU kernels for RMSNorm, against its own formula."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
if torch.cuda.is_available():
    pytest.skip("these are kernels of vLLM's CPU build", allow_module_level=True)

from vllm.ir import ops

from rl_lora.samplers.vllm import cpu_norm as vllm_cpu_norm


@pytest.fixture(autouse=True)
def _registered() -> None:
    assert vllm_cpu_norm.priorities() == {
        "rms_norm": ["rl_lora_cpu", "native"],
        "fused_add_rms_norm": ["rl_lora_cpu", "native"],
    }


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_row_by_hand() -> None:
    """(3, 4) has mean square 12.5, however often it is repeated."""
    x, weight = torch.tensor([[3.0, 4.0]]).repeat(1, 32), torch.tensor([1.0, 2.0]).repeat(32)
    expected = [3 / 12.5**0.5, 8 / 12.5**0.5] * 32
    assert vllm_cpu_norm.rms_norm(x, weight, 0.0).tolist()[0] == pytest.approx(expected)
    found, total = vllm_cpu_norm.fused_add_rms_norm(0.25 * x, 0.75 * x, weight, 0.0)
    assert found.tolist()[0] == pytest.approx(expected)
    assert total.tolist() == x.tolist()


@pytest.mark.parametrize("num_rows", [1, 5, 128])
def test_numbers_are_those_of_vllms_formula(num_rows: int) -> None:
    x, residual, weight = random(num_rows, 576), random(num_rows, 576, seed=1), random(576, seed=2)
    expected = ops.rms_norm.impls["native"].impl_fn(x, weight, 1e-5)
    torch.testing.assert_close(vllm_cpu_norm.rms_norm(x, weight, 1e-5), expected)
    expected_sums = ops.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, 1e-5)
    found = vllm_cpu_norm.fused_add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    for value, other in zip(found, expected_sums, strict=True):
        torch.testing.assert_close(value, other)


def test_what_the_kernels_do_not_compute_is_left_to_vllm() -> None:
    x, weight = random(4, 64), random(64)
    with ops.rms_norm.set_priority(["rl_lora_cpu", "native"]):
        chosen = {
            name: ops.rms_norm.dispatch(*arguments).provider
            for name, arguments in {
                "plain": (x, weight, 1e-5),
                "part of the width": (x, weight, 1e-5, 32),
                "gaps": (random(4, 128)[:, :64], weight, 1e-5),
                "no whole vectors": (random(4, 6), random(6), 1e-5),
                "no weight": (x, None, 1e-5),
            }.items()
        }
    assert chosen == {
        "plain": "rl_lora_cpu",
        "part of the width": "native",
        "gaps": "native",
        "no whole vectors": "native",
        "no weight": "native",
    }
