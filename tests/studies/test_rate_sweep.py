"""Best rate, plateau and refinement on sweeps worked out by hand."""

from __future__ import annotations

import math

import pytest

from rl_lora.studies.rate_sweep import mean_interval, plateau, refined_rates, sweep

NAN = float("nan")


def test_mean_and_students_interval_by_hand() -> None:
    # Mean 2, standard deviation 1, error 1 / sqrt 3; t for 2 degrees of freedom is 4.302653.
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert low == pytest.approx(2 - (high - 2))
    assert mean_interval([5.0]) == (5.0, -math.inf, math.inf)


def test_the_best_rate_is_that_of_the_least_mean() -> None:
    values = {1e-3: {0: 2.0, 1: 2.2}, 1e-2: {0: 1.0, 1: 1.2}, 1e-1: {0: 3.0, 1: 3.2}}
    result = sweep(values, tolerance=0.1)
    assert result is not None
    assert result.best_rate == 1e-2
    assert result.best_value == pytest.approx(1.1)
    # Seeds differ by the same at every rate, so that no resample doubts the rate.
    assert (result.rate_low, result.rate_high) == (1e-2, 1e-2)
    assert not result.is_at_edge
    assert result.num_seeds == 2


def test_a_reward_is_maximised_and_its_interval_keeps_its_order() -> None:
    values = {1e-3: {0: 0.2, 1: 0.4}, 1e-2: {0: 0.6, 1: 0.8}}
    result = sweep(values, "max", tolerance=0.05)
    assert result is not None
    assert result.best_rate == 1e-2
    assert result.best_value == pytest.approx(0.7)
    assert result.value_low < 0.7 < result.value_high
    assert result.is_at_edge


def test_a_rate_with_a_failed_seed_is_never_the_best() -> None:
    values = {1e-3: {0: 2.0, 1: 2.0}, 1e-2: {0: 0.5, 1: NAN}}
    result = sweep(values, tolerance=0.1)
    assert result is not None
    assert result.best_rate == 1e-3
    # The larger rate was tried and failed: the best is not known to be beyond it.
    assert result.is_at_edge  # but the smaller end is open
    assert sweep({1e-2: {0: NAN}}, tolerance=0.1) is None


def test_seeds_that_disagree_widen_the_best_rate() -> None:
    values = {1e-3: {0: 0.0, 1: 1.0, 2: 0.4}, 1e-2: {0: 1.0, 1: 0.0, 2: 0.5}}
    result = sweep(values, tolerance=0.01)
    assert result is not None
    assert (result.rate_low, result.rate_high) == (1e-3, 1e-2)


def test_plateau_is_interpolated_in_log_rate() -> None:
    # Losses 2, 1, 3 at 1e-3, 1e-2, 1e-1; tolerance 0.5: half way down to the left (10^-2.5), a
    # quarter of the way to the right (10^-1.75).
    low, high = plateau([1e-3, 1e-2, 1e-1], [2.0, 1.0, 3.0], 0.5)
    assert low == pytest.approx(10**-2.5)
    assert high == pytest.approx(10**-1.75)
    assert plateau([1e-3, 1e-2], [1.0, 1.1], 0.5) == (1e-3, 1e-2)


def test_plateau_width_in_decades() -> None:
    values = {rate: {0: loss} for rate, loss in ((1e-3, 2.0), (1e-2, 1.0), (1e-1, 3.0))}
    result = sweep(values, tolerance=0.5)
    assert result is not None
    assert result.plateau_decades == pytest.approx(0.75)


def test_refinement_goes_halfway_and_beyond_an_end() -> None:
    assert refined_rates([1e-3, 1e-2, 1e-1], 1e-2) == [3.16e-3, 3.16e-2]
    # The best is the largest: halfway down, and one more ratio up.
    assert refined_rates([1e-3, 1e-2], 1e-2) == [3.16e-3, 1e-1]
    assert refined_rates([1e-3, 1e-2], 1e-3) == [1e-4, 3.16e-3]
    assert refined_rates([1e-3], 1e-3) == []
    with pytest.raises(ValueError, match="not in list"):
        refined_rates([1e-3], 1e-2)
