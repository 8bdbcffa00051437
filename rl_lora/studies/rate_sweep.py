"""Analysis of a learning-rate sweep: best rate, plateau, refinement, with intervals over seeds.

Pure functions of numbers. `values` are results by rate and seed, NaN if the run failed; a rate with
a failed seed is never the best. Losses are minimized; for a reward pass goal="max".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import sem
from scipy.stats import t as student

Goal = Literal["min", "max"]
_NUM_RESAMPLES = 2000  # of the bootstrap


@dataclass(frozen=True, slots=True)
class Sweep:
    """One condition's sweep."""

    best_rate: float
    best_value: float  # mean over seeds at the best rate
    value_low: float  # 95 % interval of that mean (Student's t); infinite for one seed
    value_high: float
    rate_low: float  # 95 % of the best rates of bootstrap samples of the seeds
    rate_high: float
    plateau_low: float  # rates between which the mean is within the tolerance of the best
    plateau_high: float
    is_at_edge: bool  # the best rate is the grid's smallest or largest; the optimum may be beyond
    num_seeds: int

    @property
    def plateau_decades(self) -> float:
        """Width of the plateau in powers of ten."""
        return math.log10(self.plateau_high / self.plateau_low)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % by Student's t; the bounds are infinite for one value."""
    mean, num = float(np.mean(values)), len(values)
    half_width = float(student.ppf(0.975, num - 1) * sem(values)) if num > 1 else math.inf
    return mean, mean - half_width, mean + half_width


def sweep(
    values: Mapping[float, Mapping[int, float]],
    goal: Goal = "min",
    *,
    tolerance: float = 0.0,
) -> Sweep | None:
    """A condition's best rate with its intervals; None if every rate has a failed seed.

    The bootstrap resamples seeds jointly for all rates, so that a seed's effect common to all rates
    cancels. Only seeds that ran at every usable rate are resampled.

    `values` are rate -> seed -> result (loss or reward), NaN if it failed; the plateau's tolerance
    is in the result's unit.
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
    rate_low, rate_high = _bootstrap_rates(usable)
    plateau_low, plateau_high = plateau(rates, means, tolerance)
    value_low, value_high = sorted((sign * low, sign * high))
    return Sweep(
        best_rate=rates[best],
        best_value=sign * mean,
        value_low=value_low,
        value_high=value_high,
        rate_low=rate_low,
        rate_high=rate_high,
        plateau_low=plateau_low,
        plateau_high=plateau_high,
        is_at_edge=rates[best] in (min(values), max(values)),
        num_seeds=len(usable[rates[best]]),
    )


def _bootstrap_rates(usable: Mapping[float, Mapping[int, float]]) -> tuple[float, float]:
    """95 % percentile interval of the best rate (lower is better)."""
    rates = np.array(list(usable))
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in usable.values())))
    if not seeds:
        return float(rates[0]), float(rates[-1])
    table_RS = np.array([[usable[rate][s] for s in seeds] for rate in usable])
    draws = np.random.default_rng(0).integers(len(seeds), size=(_NUM_RESAMPLES, len(seeds)))
    best = rates[table_RS[:, draws].mean(axis=2).argmin(axis=0)]
    low, high = np.quantile(best, (0.025, 0.975), method="nearest")
    return float(low), float(high)


def plateau(
    rates: Sequence[float], losses: Sequence[float], tolerance: float
) -> tuple[float, float]:
    """The range of rates around the best one in which the loss is within `tolerance` of the lowest.

    Losses are interpolated linearly in log rate; the plateau ends at the grid's ends at the latest.
    """
    best = int(np.argmin(losses))
    limit = losses[best] + tolerance

    def edge(step: int) -> float:
        place = best
        while 0 <= place + step < len(rates) and losses[place + step] <= limit:
            place += step
        beyond = place + step
        if not 0 <= beyond < len(rates):
            return rates[place]
        share = (limit - losses[place]) / (losses[beyond] - losses[place])
        return rates[place] * (rates[beyond] / rates[place]) ** share

    return edge(-1), edge(+1)


def refined_rates(rates: Sequence[float], best: float) -> list[float]:
    """Rates for the next round: the geometric means of the best rate and its neighbors.

    If the best is at the grid's end, the rate beyond it at the last ratio is added.

    Raises:
        ValueError: `best` is not among the rates.
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
