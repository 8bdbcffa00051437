"""Attention by blocks of short segments, against SDPA by the same layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rl_lora.nn import attention, block_attention
from rl_lora.nn.segments import Bucket, Buckets, make_buckets, make_layout


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_families() -> Buckets:
    """A prompt of 3 with completions of 2 and 4, a prompt of 1 with one of 3."""
    return make_buckets(*make_layout([3, 1], [[2, 4], [3]])[:2])


@pytest.mark.parametrize("block_elements", [1, 2**19])  # 1: a block for each segment
def test_segments_are_computed_together_up_to_a_blocks_size(
    block_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "BLOCK_ELEMENTS", block_elements)
    buckets = two_families()
    blocks = block_attention.make_blocks(buckets, 2, 2)
    assert blocks is not None
    assert len(blocks.blocks) == (5 if block_elements == 1 else len(buckets.buckets))
    inputs = random(13, 4, 8), random(13, 2, 8, seed=1), random(13, 2, 8, seed=2)
    found = block_attention.attend(*inputs, blocks, 0.3)
    expected = attention.attend_in_buckets(*inputs, buckets, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_of_two_tokens_by_hand() -> None:
    """Logits of the second token are 0 and ln 3: it sees a quarter of the first value."""
    prompt = Bucket(  # of a row that is nothing else
        query_SQ=torch.tensor([[0, 1]]),
        key_SK=torch.tensor([[0, 1]]),
        mask_S1QK=torch.tensor([[[[True, False], [True, True]]]]),
    )
    blocks = block_attention.make_blocks(Buckets((prompt,), torch.arange(2)), 1, 1)
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


def test_long_segments_and_float64_go_through_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    def has_blocks(dtype: torch.dtype = torch.float32) -> bool:
        starts_S, families_N, _ = make_layout([3, 1], [[2, 4], [3]])
        query_THD, key_TJD = random(13, 4, 8).to(dtype), random(13, 2, 8).to(dtype)
        return attention._blocks(query_THD, key_TJD, starts_S, families_N) is not None

    assert has_blocks()
    assert has_blocks(torch.bfloat16)
    assert not has_blocks(torch.float64)
    monkeypatch.setattr(block_attention, "SEGMENT_ELEMENTS", 4 * 4 * 7 - 1)  # the longest needs it
    assert not has_blocks()
    monkeypatch.setattr(block_attention, "SEGMENT_ELEMENTS", 4 * 4 * 7)
    assert has_blocks()
