"""Capacity in bits, on numbers worked out by hand."""

from __future__ import annotations

import pytest

from rl_lora.planning.capacity import Capacity, capacity_line, capacity_warning, rank_that_holds


def test_the_articles_example() -> None:
    # 'LoRA Without Regret': MATH, 10,000 problems x 32 samples; rank 1 of Llama-3.1-8B.
    capacity = Capacity("episodes", 320_000, 2_621_440)
    assert capacity.held_bits == 5_242_880
    assert capacity.offered_bits == 320_000
    assert not capacity.is_too_small
    assert capacity_warning(capacity, 1) is None
    assert "320,000 episodes): 16.4 times less" in capacity_line(capacity)


def test_a_rank_that_is_too_small_is_named_with_one_that_is_not() -> None:
    # Rank 2 has 1,000 parameters, 2,000 bits; 5,001 tokens offer 5,001 bits: rank 5.001, so 6.
    capacity = Capacity("tokens", 5_001, 1_000)
    assert capacity.is_too_small
    assert rank_that_holds(capacity, 2) == 6
    warning = capacity_warning(capacity, 2)
    assert warning is not None
    assert "rank 2 holds about 2 k bits, less than the 5 k bits that 5,001 tokens" in warning
    assert warning.endswith("lora.rank=6 or more would hold them")


def test_all_weights_may_be_too_few_as_well() -> None:
    warning = capacity_warning(Capacity("tokens", 10_000_000, 100), None)
    assert warning is not None
    assert warning.startswith("all weights together hold about 200 bits")
    assert "lora.rank" not in warning


@pytest.mark.parametrize(
    ("num_units", "expected"),
    [(0, "nothing"), (100, "2 times less"), (200, "1 times less"), (300, "1.5 times more")],
)
def test_the_line_says_how_they_compare(num_units: int, expected: str) -> None:
    assert capacity_line(Capacity("tokens", num_units, 100)).endswith(expected)


def test_a_mixtures_rank_is_a_multiple_of_its_active_experts() -> None:
    capacity = Capacity("tokens", 5_001, 1_000)  # 5.001 for rank 2, as above
    assert rank_that_holds(capacity, 2, multiple_of=4) == 8
    warning = capacity_warning(capacity, 2, multiple_of=4)
    assert warning is not None
    assert warning.endswith("lora.rank=8 or more would hold them")
