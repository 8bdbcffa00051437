"""Attention by blocks of short segments, against SDPA by the same layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rl_lora.batches import pack_samples
from rl_lora.nn import attention, block_attention
from rl_lora.nn.segments import AttentionLayout, Segment, make_layout
from rl_lora.types import TrainSample
from tests.helpers.tiny_models import make_policy, random_llama, shake


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_families(max_wasted_pairs: int = 0) -> AttentionLayout:
    """A prompt of 3 with completions of 2 and 4, then a prompt of 1 with one of 3."""
    segments = [
        *(Segment(0, 3), Segment(3, 2, 0, 3), Segment(5, 4, 0, 3)),
        *(Segment(9, 1), Segment(10, 3, 9, 1)),
    ]
    return make_layout(segments, max_wasted_pairs)


def outputs_and_gradients(
    function: Any, layout: AttentionLayout, heads: tuple[int, int]
) -> list[Tensor]:
    num_tokens = len(layout.output_T)
    shapes = [(num_tokens, count, 8) for count in (heads[0], heads[1], heads[1])]
    inputs = [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    out_THD = function(*inputs, layout, 0.3)
    weights_THD = random(*out_THD.shape, seed=7)
    return [out_THD.detach(), *torch.autograd.grad((out_THD * weights_THD).sum(), inputs)]


@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("max_wasted_pairs", [0, 10, 1000])  # 1,000: one bucket, padded
@pytest.mark.parametrize("block_elements", [1, 2**19])  # 1: a block for each segment
def test_values_and_gradients_are_sdpas(
    heads: tuple[int, int],
    max_wasted_pairs: int,
    block_elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(block_attention, "BLOCK_ELEMENTS", block_elements)
    layout = two_families(max_wasted_pairs)
    blocks = block_attention.make_blocks(layout, heads[1], heads[0] // heads[1])
    assert blocks is not None
    assert len(blocks.blocks) == (5 if block_elements == 1 else len(layout.buckets))
    found = outputs_and_gradients(attention._Attend.apply, layout, heads)
    expected = outputs_and_gradients(attention.attend, layout, heads)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)


def test_a_prompt_of_two_tokens_by_hand() -> None:
    """Logits of the second token are 0 and ln 3: it sees a quarter of the first value."""
    blocks = block_attention.make_blocks(make_layout([Segment(0, 2)]), 1, 1)
    assert blocks is not None
    query_THD = torch.tensor([[[1.0]], [[1.0]]])
    key_THD = torch.tensor([[[0.0]], [[float(torch.tensor(3.0).log())]]])
    value_THD = torch.tensor([[[4.0]], [[8.0]]])
    out_THD = block_attention.attend(query_THD, key_THD, value_THD, blocks, 1.0)
    assert out_THD.flatten().tolist() == pytest.approx([4.0, 7.0])
    gradients = block_attention.attend_backward(
        query_THD, key_THD, value_THD, torch.ones(2, 1, 1), blocks, 1.0
    )
    ln_3 = float(torch.tensor(3.0).log())
    expected = [
        [0.0, 0.75 * 0.25 * 4 * ln_3],  # p1 p2 (v2 - v1) (k2 - k1)
        [-0.75 * 0.25 * 4, 0.75 * 0.25 * 4],
        [1.25, 0.75],
    ]
    for gradient, numbers in zip(gradients, expected, strict=True):
        assert gradient.flatten().tolist() == pytest.approx(numbers, abs=1e-6)


def test_long_segments_and_narrow_dtypes_go_through_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = two_families()
    query_THD, key_TJD = random(13, 4, 8), random(13, 2, 8)
    assert attention._blocks(query_THD, key_TJD, layout) is not None
    assert attention._blocks(query_THD.bfloat16(), key_TJD.bfloat16(), layout) is None
    monkeypatch.setattr(block_attention, "SEGMENT_ELEMENTS", 4 * 4 * 7 - 1)  # the longest needs it
    assert attention._blocks(query_THD, key_TJD, two_families()) is None
    monkeypatch.setattr(block_attention, "SEGMENT_ELEMENTS", 4 * 4 * 7)
    assert attention._blocks(query_THD, key_TJD, two_families()) is not None


def test_the_policy_takes_them_and_makes_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy, seed=3)
    samples = [
        TrainSample((5, 6, 7), tuple(range(30, 30 + n)), (-1.0,) * n, 1.0, 0) for n in (2, 4, 4)
    ]
    ((batch,),) = pack_samples(samples, microbatch_tokens=99, share_prompts=True)
    calls: list[str] = []

    def spied(name: str) -> Any:
        original = getattr(block_attention, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return call

    for name in ("make_blocks", "attend", "attend_backward"):
        monkeypatch.setattr(block_attention, name, spied(name))
    gradients = []
    for has_blocks in (True, False):
        if not has_blocks:
            monkeypatch.setattr(attention, "_blocks", lambda *arguments: None)
        logprobs_C, _ = policy.token_logprobs(batch, 1.0)
        gradients.append(
            torch.autograd.grad((logprobs_C * random(10)).sum(), list(policy.trainable().values()))
        )
    assert calls == ["make_blocks", "attend", "attend", "attend_backward", "attend_backward"]
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).norm() < 1e-5 * expected.norm()
