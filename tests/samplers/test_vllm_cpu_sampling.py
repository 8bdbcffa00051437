"""The sampler in place of vLLM's: its distribution, on hand-made rows, and where it steps aside."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from rl_lora.samplers.vllm.cpu_sampling import BLOCK, draw


def even(count: int) -> torch.Tensor:
    """Numbers that cut [0, 1) into equal parts, each at its part's middle."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_a_row_by_hand() -> None:
    """Odds 1 : 2 : 5."""
    logits_TV = torch.tensor([1.0, 2.0, 5.0]).log().expand(4, 3)
    uniform_T = torch.tensor([0.124, 0.126, 0.374, 0.376], dtype=torch.float64)
    tokens_T, logprobs_T = draw(logits_TV.clone(), uniform_T)
    assert tokens_T.tolist() == [0, 1, 1, 2]
    assert logprobs_T.exp().tolist() == pytest.approx([1 / 8, 2 / 8, 2 / 8, 5 / 8])


@pytest.mark.parametrize("num_tokens", [2, BLOCK - 1, BLOCK, BLOCK + 1, 7 * BLOCK + 5])
def test_each_token_is_drawn_as_often_as_its_probability(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    logits_1V = 3 * torch.randn(1, num_tokens, generator=generator)
    count = 20_000
    tokens_T, logprobs_T = draw(logits_1V.repeat(count, 1), even(count))
    share_V = torch.bincount(tokens_T, minlength=num_tokens) / count
    assert torch.allclose(share_V, logits_1V.softmax(1)[0], atol=1.5 / count)
    assert torch.allclose(logprobs_T, logits_1V.log_softmax(1)[0][tokens_T], atol=1e-5)


@pytest.mark.parametrize("low", [-torch.inf, -200.0])
def test_a_token_of_probability_zero_is_never_drawn(low: float) -> None:
    """Also where the number drawn is rounded to the very end."""
    uniform_T = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    for place in (0, 5, BLOCK, 2 * BLOCK + 6):
        logits_TV = torch.full((3, 2 * BLOCK + 7), low)
        logits_TV[:, place] = 1.0
        tokens_T, logprobs_T = draw(logits_TV, uniform_T)
        assert tokens_T.tolist() == [place] * 3
        assert logprobs_T.tolist() == [0.0] * 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    logits_TV = torch.zeros(2, 5)
    logits_TV[1, 3] = bad
    with pytest.raises(FloatingPointError, match="diverged"):
        draw(logits_TV, even(2))
