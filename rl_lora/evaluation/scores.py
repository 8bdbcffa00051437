"""The results of an evaluation: one record per problem, and the scores computed from the records.

Scores depend only on the records, so an evaluation that was killed and resumed, or regraded from
its file, has exactly the numbers of an uninterrupted one. Nothing here imports torch: reports read
results without it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter

from rl_lora.errors import UserError
from rl_lora.evaluation.intervals import bootstrap_interval, clustered_interval, pass_at
from rl_lora.storage import jsonl


@dataclass(frozen=True, slots=True)
class SampleRecord:
    """One graded completion."""

    completion: str
    answer: str | None
    correct: bool
    reward: float
    status: str  # the verifier's
    has_format: bool
    num_tokens: Annotated[int, Field(alias="tokens")]  # the alias is the key in the file
    is_truncated: Annotated[bool, Field(alias="truncated")]  # stopped by the token limit
    # The values of the reward's terms, if it has any.
    terms: Annotated[dict[str, float], Field(exclude_if=lambda terms: not terms)] = field(
        default_factory=dict
    )
    # Of the policy, the environment, ..., the policy, if the job has an environment.
    turns: Annotated[tuple[str, ...], Field(exclude_if=lambda turns: not turns)] = ()


@dataclass(frozen=True, slots=True)
class ProblemRecord:
    """One problem of an evaluation and its k graded completions."""

    prompt_id: str
    source: str
    question: str
    reference: str
    samples_G: Annotated[tuple[SampleRecord, ...], Field(alias="samples")]
    seconds: float = 0.0  # sampling and grading: the chunk's time divided evenly

    @property
    def num_correct(self) -> int:
        """Correct completions, 0..k."""
        return sum(sample.correct for sample in self.samples_G)

    @property
    def share(self) -> float:
        """Share of correct completions: the problem's pass@1."""
        return self.num_correct / len(self.samples_G)

    @property
    def is_majority_correct(self) -> bool:
        """Whether the most frequent answer, as text, is correct; the earlier one wins a tie."""
        first: dict[str, bool] = {}
        votes: Counter[str] = Counter()
        for sample in self.samples_G:
            if sample.answer is not None:
                first.setdefault(sample.answer, sample.correct)
                votes[sample.answer] += 1
        if not votes:  # the reward extracts no answers: vote on correctness
            return 2 * self.num_correct > len(self.samples_G)
        return first[votes.most_common(1)[0][0]]

    def to_row(self) -> dict[str, Any]:
        """The problem's line in the evaluation's file."""
        return {**_ROWS.dump_python(self, by_alias=True), "num_correct": self.num_correct}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> ProblemRecord:
        """Reads a line of `to_row`. Raises ValueError for anything else."""
        return _ROWS.validate_python(row)


_ROWS = TypeAdapter(ProblemRecord)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class OutcomeStats:
    """Statistics of the correct, or of the wrong, completions."""

    num: int  # completions
    tokens_mean: float
    tokens_p50: float
    tokens_p90: float
    truncated_rate: float
    no_answer_rate: float
    timeout_rate: float  # the verifier ran out of time


@dataclass(frozen=True, slots=True)
class EvaluationScores:
    """Scores of a set of problems: the whole evaluation, or one source."""

    num_problems: int
    num_samples: int  # k, completions per problem
    num_correct: int  # of num_problems * num_samples completions
    accuracy: float  # mean over problems of the share of correct samples: avg@k, the mean pass@1
    accuracy_low: float
    accuracy_high: float
    format_rate: float  # share of completions with a final answer in the requested format
    accuracy_formatted: float | None  # share correct among these; None: there are none
    pass_at_k: float  # share of problems with at least one correct sample
    majority_accuracy: float  # share of problems whose most frequent answer is correct: maj@k
    tokens_mean: float  # completion length
    truncated_rate: float
    statuses: dict[str, int]  # verifier's status -> completions
    # Results of earlier versions have these defaults.
    majority_low: float | None = None
    majority_high: float | None = None
    tokens_low: float | None = None  # of the mean length, by bootstrap over problems
    tokens_high: float | None = None
    no_answer_rate: float | None = None
    timeout_rate: float | None = None
    pass_at: dict[str, Estimate] | None = None  # "1", "2", "4", ..., "k": unbiased pass@k
    correct: OutcomeStats | None = None  # None: no completion was correct
    wrong: OutcomeStats | None = None  # None: no completion was wrong
    terms: dict[str, float] | None = None  # of the reward -> mean; None: it has no terms


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One evaluation."""

    total: EvaluationScores
    by_source: dict[str, EvaluationScores]
    step: int | None  # training steps done; None: outside a run
    adapter_version: int  # -1: the base model without an adapter
    confidence: float  # of the intervals
    interval: str  # exact, or clustered_exact if there are several samples per problem
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    seconds: float  # of sampling and grading, a resumed evaluation's calls included
    policy: str = ""  # the adapter's fingerprint, or "base"
    notes: tuple[str, ...] = ()  # e.g. which AIME years precede the base model

    @property
    def accuracy(self) -> float:
        """Mean pass@1 over all problems."""
        return self.total.accuracy

    @property
    def num_tokens(self) -> float:
        """Tokens sampled."""
        return self.total.tokens_mean * self.total.num_problems * self.total.num_samples

    def metrics(self) -> dict[str, float]:
        """Flat numbers for metrics.jsonl: eval/accuracy, eval/accuracy_low, ...

        Also by source (eval/accuracy/SOURCE, ...) if there is more than one.
        """
        metrics = _flat(self.total, "")
        if len(self.by_source) > 1:
            for source, scores in self.by_source.items():
                metrics |= _flat(scores, "/" + key_part(source))
        return metrics

    def save(self, path: Path) -> None:
        """Writes the result as JSON, atomically."""
        jsonl.write_json(path, asdict(self))


def load_result(path: Path) -> EvalResult:
    """Reads a file of `EvalResult.save`. Raises UserError if it is missing or damaged."""
    try:
        return TypeAdapter(EvalResult).validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not an evaluation result ({reason}); run rl-lora eval"
        ) from error


def key_part(name: str) -> str:
    """A data set's name as part of a metric's key; characters unsafe in loggers become '_'."""
    return re.sub(r"[^A-Za-z0-9_.:-]+", "_", name).strip("_.") or "unnamed"


# --- scores ---------------------------------------------------------------------------------------


def evaluation_scores(problems_N: Sequence[ProblemRecord]) -> EvaluationScores:
    """Scores of N problems with k samples each.

    Intervals of proportions are exact at the effective number of samples
    (`intervals.clustered_interval`); that of the mean length is a bootstrap over problems.

    Raises:
        ValueError: there is no problem, or the numbers of samples differ.
    """
    k = len(problems_N[0].samples_G) if problems_N else 0
    if k == 0 or any(len(problem.samples_G) != k for problem in problems_N):
        raise ValueError("scores need problems with the same number of samples, at least 1")
    samples = [sample for problem in problems_N for sample in problem.samples_G]
    shares_N = [problem.share for problem in problems_N]
    majority_N = [float(problem.is_majority_correct) for problem in problems_N]
    lengths_N = [_mean([s.num_tokens for s in problem.samples_G]) for problem in problems_N]
    low, high = clustered_interval(shares_N, k)
    majority_low, majority_high = clustered_interval(majority_N, 1)
    tokens_low, tokens_high = bootstrap_interval(lengths_N)
    formatted = [sample.correct for sample in samples if sample.has_format]
    everything = _outcome_stats(samples)
    assert everything is not None
    return EvaluationScores(
        num_problems=len(problems_N),
        num_samples=k,
        num_correct=sum(problem.num_correct for problem in problems_N),
        accuracy=sum(problem.num_correct for problem in problems_N) / len(samples),
        accuracy_low=low,
        accuracy_high=high,
        format_rate=len(formatted) / len(samples),
        accuracy_formatted=_mean(formatted) if formatted else None,
        pass_at_k=_mean([problem.num_correct > 0 for problem in problems_N]),
        majority_accuracy=_mean(majority_N),
        tokens_mean=everything.tokens_mean,
        truncated_rate=everything.truncated_rate,
        statuses=dict(sorted(Counter(sample.status for sample in samples).items())),
        majority_low=majority_low,
        majority_high=majority_high,
        tokens_low=tokens_low,
        tokens_high=tokens_high,
        no_answer_rate=everything.no_answer_rate,
        timeout_rate=everything.timeout_rate,
        pass_at=_pass_curve(problems_N, k),
        correct=_outcome_stats([sample for sample in samples if sample.correct]),
        wrong=_outcome_stats([sample for sample in samples if not sample.correct]),
        terms=_term_means(samples) or None,
    )


def scores_by_source(problems_N: Sequence[ProblemRecord]) -> dict[str, EvaluationScores]:
    """Scores of each data set, sorted by name."""
    return {
        name: evaluation_scores([one for one in problems_N if one.source == name])
        for name in sorted({problem.source for problem in problems_N})
    }


def _pass_curve(problems_N: Sequence[ProblemRecord], num_samples: int) -> dict[str, Estimate]:
    """pass@1, 2, 4, ... and k, each with its interval by the effective number of samples."""
    sizes = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples]
    curve = {}
    for size in [*sizes, num_samples]:
        estimates_N = [pass_at(problem.num_correct, num_samples, size) for problem in problems_N]
        low, high = clustered_interval(estimates_N, num_samples // size)
        curve[str(size)] = Estimate(math.fsum(estimates_N) / len(estimates_N), low, high)
    return curve


def _term_means(samples: Sequence[SampleRecord]) -> dict[str, float]:
    """The mean of each term of the reward, over the completions that it applies to."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for sample in samples:
        for term, value in sample.terms.items():
            values[term].append(value)
    return {term: _mean(found) for term, found in values.items()}


def _outcome_stats(samples: Sequence[SampleRecord]) -> OutcomeStats | None:
    if not samples:
        return None
    lengths = [sample.num_tokens for sample in samples]
    p50, p90 = (float(quantile) for quantile in np.quantile(lengths, (0.5, 0.9)))
    return OutcomeStats(
        num=len(samples),
        tokens_mean=_mean(lengths),
        tokens_p50=p50,
        tokens_p90=p90,
        truncated_rate=_mean([sample.is_truncated for sample in samples]),
        no_answer_rate=_mean([sample.status == "no_answer" for sample in samples]),
        timeout_rate=_mean([sample.status == "timeout" for sample in samples]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_FLAT = (
    "accuracy accuracy_low accuracy_high accuracy_formatted format_rate tokens_mean tokens_low "
    "tokens_high truncated_rate no_answer_rate timeout_rate num_problems"
).split()
_FLAT_OF_SEVERAL = ("pass_at_k", "majority_accuracy", "majority_low", "majority_high")


def _flat(scores: EvaluationScores, suffix: str) -> dict[str, float]:
    """eval/NAME + suffix -> number, without those that are None."""
    numbers: dict[str, float | None] = {name: getattr(scores, name) for name in _FLAT}
    for name, stats in (("correct", scores.correct), ("wrong", scores.wrong)):
        if stats is not None:
            numbers[f"tokens_{name}_mean"] = stats.tokens_mean
            numbers[f"truncated_{name}_rate"] = stats.truncated_rate
            numbers[f"no_answer_{name}_rate"] = stats.no_answer_rate
            numbers[f"timeout_{name}_rate"] = stats.timeout_rate
    if scores.num_samples > 1:
        numbers |= {name: getattr(scores, name) for name in _FLAT_OF_SEVERAL}
        for k, estimate in (scores.pass_at or {}).items():
            numbers[f"pass_at_{k}"] = estimate.value
            numbers[f"pass_at_{k}_low"] = estimate.low
            numbers[f"pass_at_{k}_high"] = estimate.high
    numbers |= {f"reward/{term}": mean for term, mean in (scores.terms or {}).items()}
    return {
        f"eval/{name}{suffix}": number for name, number in numbers.items() if number is not None
    }
