"""How long completions get: a log-normal distribution, cut at a limit.

Fitted to recorded completions (MathCoder-L-7B's answers in github.com/mathllm/MathCoder, in
SmolLM2's tokens): sigma is 0.62 on GSM8K's test set (1,319 answers, mean 686, longest 15,195)
and 0.68 on SVAMP (1,000). Answers of a model that was fine-tuned on GSM8K's own short solutions
spread less: 0.43 (github.com/openai/grade-school-math, 1,319 answers, mean 129).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import stats

MEASURED_SIGMA = 0.65
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a completion: exp of a normal variable, at most `limit`.

    Example: Lengths(mu=7.9, sigma=0.65, limit=8192)
    """

    mu: float
    sigma: float
    limit: int

    @property
    def mean(self) -> float:
        """Of what is left after cutting."""
        if self.sigma == 0:
            return min(math.exp(self.mu), self.limit)
        at = (math.log(self.limit) - self.mu) / self.sigma
        uncut = math.exp(self.mu + self.sigma**2 / 2) * _NORMAL.cdf(at - self.sigma)
        return uncut + self.limit * (1 - _NORMAL.cdf(at))

    def draw(self, seed: Sequence[int], num: int) -> NDArray[np.int64]:
        """num lengths; the same for the same seed."""
        tokens = np.random.default_rng(seed).lognormal(self.mu, self.sigma, num)
        return np.clip(np.rint(tokens), 1, self.limit).astype(np.int64)


def with_mean(mean: float, sigma: float, limit: int) -> Lengths:
    """The distribution whose mean after cutting is given. Raises ValueError if there is none."""
    if not 0 < mean < limit:
        raise ValueError(f"a mean of {mean:g} tokens needs a limit above it, not {limit}")
    low, high = math.log(mean) - sigma**2, math.log(limit) + 10 * sigma + 1
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if Lengths(middle, sigma, limit).mean < mean else (low, middle)
    return Lengths(low, sigma, limit)


def fit(tokens: Sequence[int], limit: int) -> Lengths:
    """The most likely distribution of recorded lengths, of which those at the limit were cut.

    Raises:
        ValueError: fewer than two different lengths are below the limit.
    """
    whole = [n for n in tokens if 0 < n < limit]
    if len(set(whole)) < 2:
        raise ValueError(f"{len(whole)} lengths below {limit} tokens are too few to fit")
    data = stats.CensoredData(uncensored=whole, right=[n for n in tokens if n >= limit])
    sigma, _, scale = stats.lognorm.fit(data, floc=0)
    return Lengths(math.log(scale), float(sigma), limit)


def recorded(transcripts: Path) -> tuple[list[int], int]:
    """(tokens of each completion in a run's transcripts.jsonl, the limit at which they were cut).

    The limit is one more than the longest where none was cut.
    """
    with transcripts.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    tokens = [row["tokens"] for row in rows]
    cut = [row["tokens"] for row in rows if row["truncated"]]
    return tokens, min(cut) if cut else max(tokens) + 1
