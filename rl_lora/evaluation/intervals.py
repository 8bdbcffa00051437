"""Intervals of proportions and means: one sample a problem, or several; exact, and by bootstrap.

Problems are what is drawn; the samples of one problem are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from scipy.special import betaincinv

NUM_RESAMPLES = 10_000  # of a bootstrap
_BLOCK = 1 << 22  # numbers drawn at once


def wilson_interval(
    num_correct: float, num_total: float, confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) of a binomial proportion (Wilson 1927, 'Probable Inference').

    With p = num_correct / num_total, n = num_total and z the normal quantile:
    (p + z^2/2n -+ z sqrt(p (1 - p) / n + z^2/4n^2)) / (1 + z^2/n). Counts need not be whole.

    Raises:
        ValueError: num_total is not positive, num_correct not in 0..num_total, or the confidence
            not between 0 and 1.
    """
    _check(num_correct, num_total, confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = num_correct / num_total
    spread = z * math.sqrt(p * (1 - p) / num_total + z * z / (4 * num_total * num_total))
    middle = p + z * z / (2 * num_total)
    scale = 1 + z * z / num_total
    # At 0 and at num_total the bound is exact, and rounding would leave it a hair off.
    low = 0.0 if num_correct == 0 else (middle - spread) / scale
    high = 1.0 if num_correct == num_total else (middle + spread) / scale
    return low, high


def exact_interval(
    num_correct: float, num_total: float, confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) of a binomial proportion (Clopper and Pearson 1934), by quantiles of the beta.

    It covers the truth with at least the confidence, whatever the proportion. Counts need not be
    whole (an effective number of samples is not).

    Raises:
        ValueError: as `wilson_interval`.
    """
    _check(num_correct, num_total, confidence)
    tail = (1 - confidence) / 2
    num_wrong = num_total - num_correct
    low = 0.0 if num_correct == 0 else float(betaincinv(num_correct, num_wrong + 1, tail))
    high = 1.0 if num_wrong == 0 else float(betaincinv(num_correct + 1, num_wrong, 1 - tail))
    return low, high


def clustered_interval(
    shares_N: Sequence[float], num_samples: int, confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mean of N problems' shares, each estimated from k samples.

    The exact interval at the effective number of samples (Korn and Graubard 1998, 'Confidence
    intervals for proportions with small expected number of positive counts'); for k = 1, or where
    samples of a problem always agree, Clopper and Pearson's of N. Shares that do not vary (all 0,
    as on an evaluation that is too hard) still have an interval, where a bootstrap has none.

    Raises:
        ValueError: no problem, or a share that is not in 0..1.
    """
    effective = effective_samples(shares_N, num_samples)
    mean = math.fsum(shares_N) / len(shares_N)
    return exact_interval(min(mean * effective, effective), effective, confidence)


def effective_samples(shares_N: Sequence[float], num_samples: int) -> float:
    """The number of independent samples that would have the variance between problems.

    n = N p (1 - p) / mean((p_i - p)^2), kept in N..N k. Samples that agree within each problem
    count as N, independent ones as N k.

    Raises:
        ValueError: no problem, or a share that is not in 0..1.
    """
    num_problems = len(shares_N)
    if not num_problems or any(not 0 <= share <= 1 for share in shares_N):
        raise ValueError(f"no interval: {num_problems} problems of {num_samples} samples each")
    mean = math.fsum(shares_N) / num_problems
    if mean in (0.0, 1.0):  # no variance to go by: as if samples only repeated each other
        return float(num_problems)
    variance = math.fsum((share - mean) ** 2 for share in shares_N) / num_problems
    ratio = mean * (1 - mean) / max(variance, 1e-12)
    return num_problems * min(float(num_samples), max(1.0, ratio))


def bootstrap_interval(
    values_N: Sequence[float],
    confidence: float = 0.95,
    *,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """(low, high) of the mean over problems: percentiles of the means of resampled problems.

    (Efron and Tibshirani 1993, 'An Introduction to the Bootstrap', chapter 13.) A problem is drawn
    with all of its samples. Values that are all the same give an interval without width.

    Raises:
        ValueError: no value, or a confidence that is not between 0 and 1.
    """
    if not len(values_N) or not 0 < confidence < 1:
        raise ValueError(f"no interval for {len(values_N)} values at confidence {confidence}")
    values = np.asarray(values_N, dtype=np.float64)
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // len(values))
    means = [
        values[generator.integers(len(values), size=(num, len(values)))].mean(axis=1)
        for start in range(0, num_resamples, rows)
        for num in [min(rows, num_resamples - start)]
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def pass_at(num_correct: int, num_samples: int, k: int) -> float:
    """Unbiased estimate that at least one of k samples is correct, from n samples, c correct.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, 'Evaluating Large Language Models Trained on Code',
    equation 1).

    Raises:
        ValueError: not 1 <= k <= n, or c not in 0..n.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(f"no pass@{k} from {num_correct} of {num_samples} samples")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def _check(num_correct: float, num_total: float, confidence: float) -> None:
    if not (num_total > 0 and 0 <= num_correct <= num_total and 0 < confidence < 1):
        raise ValueError(f"no interval for {num_correct} of {num_total} at confidence {confidence}")
