"""Confidence intervals of proportions and means, exact or by bootstrap.

The sampling unit is the problem: several samples of one problem are not independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import betaincinv

CONFIDENCE = 0.95  # of all intervals of evaluations
NUM_RESAMPLES = 10_000  # of the bootstrap
_BLOCK = 1 << 22  # numbers drawn at once, which bounds the memory


def exact_interval(
    num_correct: float, num_total: float, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """(low, high) of a binomial proportion (Clopper and Pearson 1934), by quantiles of the beta.

    The coverage is at least the confidence, whatever the proportion. Counts may be fractional,
    as an effective number of samples is; scipy's `binomtest` takes integers only.

    Raises:
        ValueError: num_total is not positive, num_correct is not in 0..num_total, or the
            confidence is not between 0 and 1.
    """
    if not (num_total > 0 and 0 <= num_correct <= num_total and 0 < confidence < 1):
        raise ValueError(f"no interval for {num_correct} of {num_total} at confidence {confidence}")
    tail = (1 - confidence) / 2
    num_wrong = num_total - num_correct
    low = 0.0 if num_correct == 0 else float(betaincinv(num_correct, num_wrong + 1, tail))
    high = 1.0 if num_wrong == 0 else float(betaincinv(num_correct + 1, num_wrong, 1 - tail))
    return low, high


def clustered_interval(shares_N: Sequence[float], num_samples: int) -> tuple[float, float]:
    """(low, high) of the mean of N problems' shares, each estimated from k samples.

    The exact interval at the effective number of samples (Korn and Graubard 1998, 'Confidence
    intervals for proportions with small expected number of positive counts'), the number of
    independent samples with the same variance as the mean over problems:
    n = N p (1 - p) / mean((p_i - p)^2), clipped to N..N k: N if the samples of each problem agree,
    N k if all samples are independent. For k = 1 that is Clopper and Pearson's for N. Shares
    without variance (all 0 on problems that are too hard) get an interval too, unlike by bootstrap.

    Raises:
        ValueError: there is no problem, or a share is not in 0..1.
    """
    num = len(shares_N)
    if not num or any(not 0 <= share <= 1 for share in shares_N):
        raise ValueError(f"no interval: {num} problems of {num_samples} samples each")
    mean = math.fsum(shares_N) / num
    variance = math.fsum((share - mean) ** 2 for share in shares_N) / num
    ratio = mean * (1 - mean) / max(variance, 1e-12)  # 0 if all shares are 0, or all 1
    effective = num * min(float(num_samples), max(1.0, ratio))
    return exact_interval(min(mean * effective, effective), effective)


def bootstrap_interval(values_N: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """(low, high) of the mean over problems: percentiles of the means of resampled problems.

    (Efron and Tibshirani 1993, 'An Introduction to the Bootstrap', chapter 13.) A problem is drawn
    with all of its samples. Identical values give an interval of zero width.

    Raises:
        ValueError: there is no value.
    """
    if not values_N:
        raise ValueError("no interval without values")
    if len(values_N) == 1:
        return float(values_N[0]), float(values_N[0])
    from scipy import stats  # slow to import, and most readers of results need no bootstrap

    interval = stats.bootstrap(
        (np.asarray(values_N, dtype=np.float64),),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, _BLOCK // len(values_N)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def pass_at(num_correct: int, num_samples: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct.

    From n samples, c of them correct: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, 'Evaluating
    Large Language Models Trained on Code', equation 1).

    Raises:
        ValueError: not 1 <= k <= n, or c not in 0..n.
    """
    if not (1 <= k <= num_samples and 0 <= num_correct <= num_samples):
        raise ValueError(f"no pass@{k} from {num_correct} of {num_samples} samples")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)
