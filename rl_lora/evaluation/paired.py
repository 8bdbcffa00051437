"""Paired comparison of two evaluations of the same problems.

The difference is the mean over problems of d = share correct (second) - share correct (first). Its
interval is a seeded bootstrap over problems. The p-value is that of the sign-flip test on d: under
the null hypothesis the two policies are exchangeable within each problem. With one sample per
problem that is McNemar's exact test. With several, McNemar's test needs one verdict per problem and
takes the majority's; it is reported next to the sign-flip test, which uses every sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rl_lora.errors import UserError
from rl_lora.evaluation.files import (
    SAMPLING_KEYS,
    find_evaluation,
    read_evaluation,
    settings_difference,
)
from rl_lora.evaluation.intervals import CONFIDENCE, bootstrap_interval, exact_interval
from rl_lora.evaluation.scores import ProblemRecord
from rl_lora.storage import jsonl


@dataclass(frozen=True, slots=True)
class McNemar:
    """McNemar's exact test."""

    verdict: str  # whose verdict counts for a problem: the only sample's, or the majority's
    only_first: int  # problems that only the first policy solves
    only_second: int
    p_value: float  # two-sided, binomial


@dataclass(frozen=True, slots=True)
class PairedScores:
    """Two policies on the same problems."""

    num_problems: int
    num_samples: int  # k, of each policy
    first: float  # accuracy, avg@k
    second: float
    difference: float  # second - first
    low: float
    high: float
    interval: str  # "bootstrap", or "exact" if d is the same for all problems
    num_won: int  # problems on which the second policy has more correct samples
    num_lost: int
    num_tied: int
    p_value: float  # two-sided, sign-flip test over problems
    mcnemar: McNemar


@dataclass(frozen=True, slots=True)
class PairedResult:
    """A comparison of two evaluations."""

    first: str
    second: str
    total: PairedScores
    by_source: dict[str, PairedScores]
    confidence: float
    has_common_seeds: bool  # both policies sampled with the same settings and random numbers
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Writes the comparison as JSON, atomically."""
        jsonl.write_json(path, asdict(self))


def compare_evaluations(
    first: Path, second: Path, names: tuple[str, str] | None = None
) -> PairedResult:
    """Compares two evaluations on disk; nothing is sampled.

    Args:
        first: NAME.jsonl.gz or NAME.json of the baseline.
        second: NAME.jsonl.gz or NAME.json of the policy compared with it.
        names: names of the two policies; None: the files' names.

    Raises:
        UserError: no such evaluation, or the two differ in problems or number of samples.
    """
    first, second = find_evaluation(first), find_evaluation(second)
    settings_1, problems_1 = read_evaluation(first)
    settings_2, problems_2 = read_evaluation(second)
    _check_same(first, problems_1, second, problems_2)
    by_id = {problem.prompt_id: problem for problem in problems_2}
    pairs = [(problem, by_id[problem.prompt_id]) for problem in problems_1]
    names = names or (first.name.partition(".")[0], second.name.partition(".")[0])
    difference = _sampling_difference(settings_1, settings_2)
    return PairedResult(
        *names,
        total=paired_scores(pairs),
        by_source={
            name: paired_scores([pair for pair in pairs if pair[0].source == name])
            for name in sorted({problem.source for problem in problems_1})
        },
        confidence=CONFIDENCE,
        has_common_seeds=difference is None,
        notes=(f"the evaluations were sampled differently: {difference}",) if difference else (),
    )


def paired_scores(pairs_N: Sequence[tuple[ProblemRecord, ProblemRecord]]) -> PairedScores:
    """Scores of N problems, each evaluated under both policies with k samples.

    Raises:
        ValueError: there is no problem, or the numbers of samples differ.
    """
    num_samples = len(pairs_N[0][0].samples_G) if pairs_N else 0
    if not num_samples or any(len(p.samples_G) != num_samples for pair in pairs_N for p in pair):
        raise ValueError("paired_scores needs problems with the same number of samples, at least 1")
    gains_N = [second.num_correct - first.num_correct for first, second in pairs_N]
    num = len(pairs_N)
    low, high, interval = difference_interval(gains_N, num_samples)
    majority = [(one.is_majority_correct, two.is_majority_correct) for one, two in pairs_N]
    only_first = sum(one and not two for one, two in majority)
    only_second = sum(two and not one for one, two in majority)
    return PairedScores(
        num_problems=num,
        num_samples=num_samples,
        first=sum(first.num_correct for first, _ in pairs_N) / (num * num_samples),
        second=sum(second.num_correct for _, second in pairs_N) / (num * num_samples),
        difference=sum(gains_N) / (num * num_samples),
        low=low,
        high=high,
        interval=interval,
        num_won=sum(gain > 0 for gain in gains_N),
        num_lost=sum(gain < 0 for gain in gains_N),
        num_tied=sum(gain == 0 for gain in gains_N),
        p_value=sign_flip_p(gains_N),
        mcnemar=McNemar(
            verdict="only sample" if num_samples == 1 else f"majority of {num_samples}",
            only_first=only_first,
            only_second=only_second,
            p_value=mcnemar_p(only_first, only_second),
        ),
    )


# --- statistics -----------------------------------------------------------------------------------


def difference_interval(gains_N: Sequence[int], num_samples: int) -> tuple[float, float, str]:
    """(low, high, method) of the mean of gains / k over problems.

    A bootstrap over problems. If all gains are equal (e.g. neither policy solves anything) it would
    have zero width. Then, with u the exact upper limit for 0 of N, a share of up to u of all
    problems may have another d, anywhere in -1..1.
    """
    shares_N = [gain / num_samples for gain in gains_N]
    if len(set(gains_N)) > 1:
        return *bootstrap_interval(shares_N), "bootstrap"
    _, u = exact_interval(0, len(gains_N))
    return (1 - u) * shares_N[0] - u, (1 - u) * shares_N[0] + u, "exact"


def sign_flip_p(gains_N: Sequence[int]) -> float:
    """Two-sided p-value of sum(gains) under random signs: exact, over all 2^N sign patterns.

    (Fisher 1935, 'The Design of Experiments', section 21.) Gains are integers, so the distribution
    of the sum follows by convolution, one problem at a time; scipy's `permutation_test` enumerates
    the patterns, which is out of reach from some 20 problems on.
    """
    sizes = [abs(gain) for gain in gains_N if gain]
    reach = sum(sizes)
    chances = np.zeros(2 * reach + 1)  # of sums -reach..reach
    chances[reach] = 1.0
    for size in sizes:
        chances = (np.roll(chances, size) + np.roll(chances, -size)) / 2
    seen = abs(sum(gains_N))
    sums = np.abs(np.arange(-reach, reach + 1))
    return min(1.0, math.fsum(chances[sums >= seen]))


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test (1947): binomial at 1/2 on the discordant pairs."""
    from scipy import stats  # slow to import, and `rl-lora status` needs no test

    num = only_first + only_second
    return float(stats.binomtest(only_first, num, 0.5).pvalue) if num else 1.0


# --- parts ----------------------------------------------------------------------------------------


def _check_same(
    first: Path,
    problems_1: Sequence[ProblemRecord],
    second: Path,
    problems_2: Sequence[ProblemRecord],
) -> None:
    sides = ((first, problems_1), (second, problems_2))
    for path, problems in sides:
        if not problems:
            raise UserError(f"{path} has no problems yet; wait for rl-lora eval to finish")
    asked = [{(p.prompt_id, p.question, p.reference) for p in problems} for _, problems in sides]
    if differing := sorted(asked[0] ^ asked[1]):
        raise UserError(
            f"{first} ({len(problems_1)} problems) and {second} ({len(problems_2)}) are not of "
            f"the same problems: {differing[0][0]} differs or is in only one of them; evaluate "
            "both policies with the same data.eval"
        )
    num_samples = {len(problem.samples_G) for problem in (*problems_1, *problems_2)}
    if len(num_samples) > 1:
        raise UserError(
            f"{first} and {second} have {' and '.join(map(str, sorted(num_samples)))} samples per "
            "problem; evaluate both with the same eval.num_samples"
        )


def _sampling_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """The first sampling setting in which the evaluations differ, in words; None: none does."""
    if not first or not second:
        return "a file of an older version does not record its settings"
    return settings_difference(
        *({key: settings.get(key) for key in SAMPLING_KEYS} for settings in (first, second))
    )
