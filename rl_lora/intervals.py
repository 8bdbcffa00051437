"""Intervals of proportions: one sample a problem, or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist


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
    if not (num_total > 0 and 0 <= num_correct <= num_total and 0 < confidence < 1):
        raise ValueError(f"no interval for {num_correct} of {num_total} at confidence {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = num_correct / num_total
    spread = z * math.sqrt(p * (1 - p) / num_total + z * z / (4 * num_total * num_total))
    middle = p + z * z / (2 * num_total)
    scale = 1 + z * z / num_total
    # At 0 and at num_total the bound is exact, and rounding would leave it a hair off.
    low = 0.0 if num_correct == 0 else (middle - spread) / scale
    high = 1.0 if num_correct == num_total else (middle + spread) / scale
    return low, high


def clustered_wilson_interval(
    num_correct_N: Sequence[int], num_samples: int, confidence: float = 0.95
) -> tuple[float, float]:
    """(low, high) of the mean accuracy of N problems with k samples each, problems being drawn.

    Wilson's interval on the effective number of samples (Korn and Graubard 1998), that is the
    number of independent ones that would have the variance between problems:
    n = N p (1 - p) / mean((p_i - p)^2), kept in N..N k. Samples that agree within each problem
    count as N, independent ones as N k; for k = 1 it is Wilson's interval itself.

    Raises:
        ValueError: no problem, or a count that is not in 0..k.
    """
    num_problems = len(num_correct_N)
    if not num_problems or any(not 0 <= num <= num_samples for num in num_correct_N):
        raise ValueError(f"no interval: {num_problems} problems of {num_samples} samples each")
    accuracy = sum(num_correct_N) / (num_problems * num_samples)
    variance = sum((num / num_samples - accuracy) ** 2 for num in num_correct_N) / num_problems
    if accuracy in (0.0, 1.0):  # no variance to go by: as if samples only repeated each other
        effective = float(num_problems)
    else:
        binomial = accuracy * (1 - accuracy)
        effective = num_problems * min(num_samples, binomial / max(variance, 1e-12))
    return wilson_interval(accuracy * effective, effective, confidence)
