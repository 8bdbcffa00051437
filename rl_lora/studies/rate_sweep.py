"""The science of a learning-rate sweep: best rate, plateau, refinement, with intervals over seeds.

Pure functions of numbers. `values` are results by rate and seed; a seed without a number (NaN: the
run failed) counts against its rate: a rate with a failed seed is never the best. What is minimised
is a loss; for a reward pass goal="max".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import t as student

Goal = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Sweep:
    """One condition's sweep.

    Example: Sweep(best_rate=1e-3, best_value=1.62, value_low=1.60, value_high=1.64, rate_low=1e-3,
    rate_high=3e-3, plateau_low=4e-4, plateau_high=2e-3, is_at_edge=False, num_seeds=5)
    """

    best_rate: float
    best_value: float  # mean over seeds at the best rate
    value_low: float  # 95 % interval of that mean (Student's t); infinite for one seed
    value_high: float
    rate_low: float  # 95 % of the best rates of bootstrap samples of the seeds
    rate_high: float
    plateau_low: float  # rates between which the mean is within the tolerance of the best
    plateau_high: float
    is_at_edge: bool  # the best rate is the grid's smallest or largest: the optimum may lie beyond
    num_seeds: int

    @property
    def plateau_decades(self) -> float:
        """Width of the plateau in powers of ten."""
        return math.log10(self.plateau_high / self.plateau_low)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) by Student's t; the bounds are infinite for one value.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("there is no value to take the mean of")
    mean = float(np.mean(values))
    if len(values) == 1:
        return mean, -math.inf, math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    reach = float(student.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return mean, mean - reach, mean + reach


def sweep(
    values: Mapping[float, Mapping[int, float]],
    goal: Goal = "min",
    *,
    tolerance: float,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Sweep | None:
    """Best rate of a condition with its intervals; None where every rate has a failed seed.

    Seeds are resampled together for all rates (the same seeds ran at each), so that what a seed
    has in common over rates cancels. Only seeds that ran at every usable rate are resampled.

    Args:
        values: rate -> seed -> result (loss or reward); NaN: failed.
        goal: what is better.
        tolerance: of the plateau, in the result's unit.
        num_resamples: bootstrap samples.
        seed: of the bootstrap.
    """
    sign = 1.0 if goal == "min" else -1.0
    usable = {
        rate: {s: sign * v for s, v in by_seed.items()}
        for rate, by_seed in sorted(values.items())
        if by_seed and all(math.isfinite(v) for v in by_seed.values())
    }
    if not usable:
        return None
    rates = list(usable)
    means = [float(np.mean(list(usable[rate].values()))) for rate in rates]
    best = int(np.argmin(means))
    mean, low, high = mean_interval(list(usable[rates[best]].values()))
    rate_low, rate_high = _bootstrap_rates(usable, num_resamples, seed)
    plateau_low, plateau_high = plateau(rates, means, tolerance)
    bounds = sorted((sign * low, sign * high))
    swept = sorted(values)
    return Sweep(
        best_rate=rates[best],
        best_value=sign * mean,
        value_low=bounds[0],
        value_high=bounds[1],
        rate_low=rate_low,
        rate_high=rate_high,
        plateau_low=plateau_low,
        plateau_high=plateau_high,
        is_at_edge=rates[best] in (swept[0], swept[-1]),
        num_seeds=len(usable[rates[best]]),
    )


def _bootstrap_rates(
    usable: Mapping[float, Mapping[int, float]], num_resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of the best rate (losses: less is better)."""
    rates = list(usable)
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in usable.values())))
    if not seeds:
        return rates[0], rates[-1]
    table_RS = np.array([[usable[rate][s] for s in seeds] for rate in rates])
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(seeds), size=(num_resamples, len(seeds)))
    best = np.log([rates[i] for i in table_RS[:, draws].mean(axis=2).argmin(axis=0)])
    low, high = np.quantile(best, (0.025, 0.975), method="nearest")
    return min(rates, key=lambda r: abs(math.log(r) - low)), min(
        rates, key=lambda r: abs(math.log(r) - high)
    )


def plateau(
    rates: Sequence[float], losses: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """The rates round the best one between which the loss is within `tolerance` of the least.

    Losses are interpolated linearly in log rate; where the grid ends inside the plateau, so does
    the plateau.
    """
    best = int(np.argmin(losses))
    limit = losses[best] + tolerance

    def reach(step: int) -> float:
        place = best
        while 0 <= place + step < len(rates) and losses[place + step] <= limit:
            place += step
        beyond = place + step
        if not 0 <= beyond < len(rates):
            return rates[place]
        share = (limit - losses[place]) / (losses[beyond] - losses[place])
        return math.exp(
            math.log(rates[place]) + share * (math.log(rates[beyond]) - math.log(rates[place]))
        )

    return reach(-1), reach(+1)


def log_grid(low: float, high: float, num: int) -> list[float]:
    """num rates from low to high at equal ratios, rounded to 3 digits.

    Raises:
        ValueError: not 0 < low <= high, or fewer than 1 rate.
    """
    if not (0 < low <= high and num >= 1):
        raise ValueError(f"no grid of {num} rates from {low} to {high}")
    if num == 1:
        return [low]
    ratio = (high / low) ** (1 / (num - 1))
    return [float(f"{low * ratio**power:.3g}") for power in range(num)]


def refined_rates(rates: Sequence[float], best: float) -> list[float]:
    """Further rates for the next round: halfway (by ratio) to the best one's neighbours.

    Where the best is the grid's end, the rate beyond it at the last ratio is taken as well.

    Raises:
        ValueError: the best is not among the rates.
    """
    swept = sorted(rates)
    place = swept.index(best)
    wanted = []
    for other in (place - 1, place + 1):
        if 0 <= other < len(swept):
            wanted.append(math.sqrt(best * swept[other]))
        elif len(swept) > 1:
            inner = swept[place + (1 if other < 0 else -1)]
            wanted.append(best * best / inner)
    rounded = [float(f"{rate:.3g}") for rate in wanted]
    return [rate for rate in rounded if rate not in swept]
