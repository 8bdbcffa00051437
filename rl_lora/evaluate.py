"""The held-out exam: accuracy with an interval, format, lengths; by source; one row a problem.

Accuracy is the mean over problems of the share of correct samples (pass@1). Its interval is
Wilson's; with k > 1 samples a problem, samples of one problem are not independent, and the interval
is Wilson's on the effective number of samples (`intervals.clustered_wilson_interval`).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from rewards import Reward, Score
from rl_lora import jsonl
from rl_lora.config import EvalSection
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.intervals import clustered_wilson_interval
from rl_lora.metrics import key_part
from rl_lora.rollouts import score_groups
from rl_lora.sampler import Sampler
from rl_lora.types import Prompt, RolloutGroup, SampleParams

Progress = Callable[[int, int], None]  # (problems done, problems in all)


@dataclass(frozen=True, slots=True)
class ExamScores:
    """Results over a set of problems, the whole exam or one source.

    Example: ExamScores(num_problems=200, num_samples=1, num_correct=50, accuracy=0.25,
    accuracy_low=0.195, accuracy_high=0.314, format_rate=0.9, accuracy_formatted=0.27, ...)
    """

    num_problems: int
    num_samples: int  # k, completions a problem
    num_correct: int  # of num_problems * num_samples completions
    accuracy: float  # mean over problems of the share of correct samples: pass@1
    accuracy_low: float
    accuracy_high: float
    format_rate: float  # share of completions with a final answer in the asked format
    accuracy_formatted: float | None  # share correct among those; None: there are none
    pass_at_k: float  # share of problems with at least one correct sample
    majority_accuracy: float  # share of problems whose most frequent answer is correct: maj@k
    tokens_mean: float  # completion length
    truncated_rate: float
    statuses: dict[str, int]  # verifier's status -> completions


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One exam.

    Example: EvalResult(total=ExamScores(...), by_source={"gsm8k": ExamScores(...)}, step=0,
    adapter_version=-1, confidence=0.95, interval="wilson", temperature=0.0, ...)
    """

    total: ExamScores
    by_source: dict[str, ExamScores]
    step: int | None  # training steps done; None: outside a run
    adapter_version: int  # -1: the base model without adapter
    confidence: float  # of the intervals
    interval: str  # wilson, or clustered_wilson for more than one sample a problem
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    seconds: float

    @property
    def accuracy(self) -> float:
        """pass@1 over all problems."""
        return self.total.accuracy

    def metrics(self) -> dict[str, float]:
        """Flat numbers for metrics.jsonl: eval/accuracy, eval/accuracy_low, ...

        By source as well (eval/accuracy/SOURCE, ...) where there is more than one.
        """
        metrics = _flat(self.total, "")
        if len(self.by_source) > 1:
            for source, scores in self.by_source.items():
                metrics |= _flat(scores, "/" + key_part(source))
        return metrics

    def save(self, path: Path) -> None:
        """Writes the result as JSON, atomically."""
        jsonl.write_text_atomically(path, json.dumps(jsonl.storable(asdict(self)), indent=2) + "\n")


def load_result(path: Path) -> EvalResult:
    """Reads what `EvalResult.save` wrote. Raises UserError where that is not to be had."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        total = ExamScores(**raw.pop("total"))
        by_source = {name: ExamScores(**scores) for name, scores in raw.pop("by_source").items()}
        return EvalResult(total=total, by_source=by_source, **raw)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not an evaluation result ({error}); run rl-lora eval"
        ) from error


def remove_results_after(folder: Path, step: int) -> list[Path]:
    """Deletes step_N.json and step_N.jsonl of later steps; returns what was deleted.

    For a run that goes on from `step`: the exams of steps that it runs again are of another policy.
    """
    removed = []
    for path in sorted(folder.glob("step_*.json*")):
        match = re.fullmatch(r"step_(\d+)\.jsonl?", path.name)
        if match is not None and int(match[1]) > step:
            path.unlink()
            removed.append(path)
    return removed


def evaluate(
    sampler: Sampler,
    prompts_N: Sequence[Prompt],
    reward: Reward,
    section: EvalSection,
    *,
    max_tokens: int,
    seed: int,
    stop: tuple[str, ...] = (),
    step: int | None = None,
    folder: Path | None = None,
    name: str = "eval",
    chunk_samples: int = 128,
    confidence: float = 0.95,
    on_progress: Progress | None = None,
) -> EvalResult:
    """Samples and scores every problem under the adapter in use.

    Args:
        sampler: anything that keeps the Sampler protocol.
        prompts_N: the problems; their sources may differ.
        reward: scores completions against references.
        section: samples a problem, temperature, top_p, cap.
        max_tokens: cap of a completion where section.max_tokens is None.
        seed: of the exam; the same seed gives the same samples whatever chunk_samples is, as far
            as the sampler seeds each sample by `sample_seed`.
        stop: strings that end a completion.
        step: training steps done, for the record.
        name: of the files.
        folder: where NAME.jsonl (a row a problem, written chunk by chunk) and NAME.json (the
            result, written at the end) go; None: nowhere.
        chunk_samples: completions asked of the sampler in one call; progress shows after each.
        confidence: of the intervals.
        on_progress: called with (problems done, problems in all), first with 0.

    Raises:
        UserError: no problem, or a folder that cannot be written.
        StaleAdapterError: completions of more than one adapter version.
    """
    _check(prompts_N)
    start = time.perf_counter()
    params = SampleParams(
        num_samples=section.num_samples,
        max_tokens=section.max_tokens or max_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        stop=stop,
        seed=seed,
    )
    chunk = max(1, chunk_samples // section.num_samples)
    groups_N: list[RolloutGroup] = []
    report = on_progress or (lambda done, total: None)
    report(0, len(prompts_N))
    with _rows_file(folder, name) as rows:
        for first in range(0, len(prompts_N), chunk):
            prompts = prompts_N[first : first + chunk]
            groups = score_groups(prompts, sampler.sample(prompts, params), reward)
            if rows is not None:
                rows.writelines(jsonl.to_line(_row(group)) for group in groups)
                rows.flush()
            groups_N += groups
            report(len(groups_N), len(prompts_N))
    result = _result(groups_N, section, params, confidence, step, time.perf_counter() - start)
    if folder is not None:
        result.save(folder / f"{name}.json")
    return result


def exam_scores(groups_N: Sequence[RolloutGroup], confidence: float = 0.95) -> ExamScores:
    """Scores of N problems with k rollouts each; a pure function.

    Raises:
        ValueError: no problem, or problems with different numbers of rollouts.
    """
    num_samples = len(groups_N[0].rollouts_G) if groups_N else 0
    if num_samples == 0 or any(len(group.rollouts_G) != num_samples for group in groups_N):
        raise ValueError("exam_scores needs problems with the same number of rollouts, at least 1")
    rollouts = [rollout for group in groups_N for rollout in group.rollouts_G]
    num_correct_N = [sum(r.score.correct for r in group.rollouts_G) for group in groups_N]
    low, high = clustered_wilson_interval(num_correct_N, num_samples, confidence)
    formatted = [rollout.score.correct for rollout in rollouts if rollout.score.has_format]
    num_rollouts = len(rollouts)
    return ExamScores(
        num_problems=len(groups_N),
        num_samples=num_samples,
        num_correct=sum(num_correct_N),
        accuracy=sum(num_correct_N) / num_rollouts,
        accuracy_low=low,
        accuracy_high=high,
        format_rate=len(formatted) / num_rollouts,
        accuracy_formatted=sum(formatted) / len(formatted) if formatted else None,
        pass_at_k=sum(num_correct > 0 for num_correct in num_correct_N) / len(groups_N),
        majority_accuracy=sum(_majority_correct(group) for group in groups_N) / len(groups_N),
        tokens_mean=sum(len(r.completion.token_ids) for r in rollouts) / num_rollouts,
        truncated_rate=sum(r.completion.is_truncated for r in rollouts) / num_rollouts,
        statuses=dict(sorted(Counter(str(r.score.status) for r in rollouts).items())),
    )


# --- before and after ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two exams of the same problems.

    Example: Comparison(difference=0.25, difference_low=0.16, difference_high=0.33, ratio=2.0,
    are_disjoint=True)
    """

    difference: float  # after - before, in accuracy
    difference_low: float
    difference_high: float
    ratio: float | None  # after / before; None: before is 0
    are_disjoint: bool  # the two intervals do not overlap


def compare(before: EvalResult, after: EvalResult) -> Comparison:
    """What changed from one exam to the other.

    The difference's interval is Newcombe's from the two Wilson intervals (Newcombe 1998, 'Interval
    estimation for the difference', method 10); it takes the exams as independent, which is on the
    safe side for two exams of the same problems.

    Raises:
        ValueError: the exams have different confidence levels.
    """
    if before.confidence != after.confidence:
        raise ValueError(
            f"intervals of confidence {before.confidence} and {after.confidence} do not compare"
        )
    b, a = before.total, after.total
    difference = a.accuracy - b.accuracy
    return Comparison(
        difference=difference,
        difference_low=difference
        - math.hypot(a.accuracy - a.accuracy_low, b.accuracy_high - b.accuracy),
        difference_high=difference
        + math.hypot(a.accuracy_high - a.accuracy, b.accuracy - b.accuracy_low),
        ratio=a.accuracy / b.accuracy if b.accuracy > 0 else None,
        are_disjoint=a.accuracy_low > b.accuracy_high or b.accuracy_low > a.accuracy_high,
    )


# --- parts ----------------------------------------------------------------------------------------


def _check(prompts_N: Sequence[Prompt]) -> None:
    if not prompts_N:
        raise UserError("evaluation: there is no problem to evaluate on; check data.eval")


def _result(
    groups_N: Sequence[RolloutGroup],
    section: EvalSection,
    params: SampleParams,
    confidence: float,
    step: int | None,
    seconds: float,
) -> EvalResult:
    by_source: defaultdict[str, list[RolloutGroup]] = defaultdict(list)
    for group in groups_N:
        by_source[group.prompt.source].append(group)
    return EvalResult(
        total=exam_scores(groups_N, confidence),
        by_source={name: exam_scores(by_source[name], confidence) for name in sorted(by_source)},
        step=step,
        adapter_version=_version(groups_N),
        confidence=confidence,
        interval="wilson" if section.num_samples == 1 else "clustered_wilson",
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=params.max_tokens,
        seed=params.seed,
        seconds=seconds,
    )


def _version(groups_N: Sequence[RolloutGroup]) -> int:
    """The one adapter version that all completions came from."""
    versions = {r.completion.adapter_version for group in groups_N for r in group.rollouts_G}
    if len(versions) > 1:
        raise StaleAdapterError(
            f"the sampler changed its adapter during an evaluation: versions {sorted(versions)}"
        )
    return versions.pop()


def _majority_correct(group: RolloutGroup) -> bool:
    """Whether the most frequent answer, as text, is correct; a tie goes to the earlier one."""
    first_scores: dict[str, Score] = {}
    votes: Counter[str] = Counter()
    for rollout in group.rollouts_G:
        if rollout.score.answer is not None:
            first_scores.setdefault(rollout.score.answer, rollout.score)
            votes[rollout.score.answer] += 1
    if not votes:  # a reward that names no answers leaves nothing to vote on but correctness
        return 2 * sum(rollout.score.correct for rollout in group.rollouts_G) > len(
            group.rollouts_G
        )
    return first_scores[votes.most_common(1)[0][0]].correct


def _row(group: RolloutGroup) -> dict[str, Any]:
    return {
        "prompt_id": group.prompt.prompt_id,
        "source": group.prompt.source,
        "question": group.prompt.question,
        "reference": group.prompt.reference,
        "num_correct": sum(rollout.score.correct for rollout in group.rollouts_G),
        "samples": [
            {
                "completion": rollout.completion.text,
                "answer": rollout.score.answer,
                "correct": rollout.score.correct,
                "reward": rollout.score.reward,
                "status": rollout.score.status,
                "has_format": rollout.score.has_format,
                "tokens": len(rollout.completion.token_ids),
                "truncated": rollout.completion.is_truncated,
            }
            for rollout in group.rollouts_G
        ],
    }


@contextmanager
def _rows_file(folder: Path | None, name: str) -> Iterator[IO[str] | None]:
    if folder is None:
        yield None
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = (folder / f"{name}.jsonl").open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"evaluation: {folder} cannot be written ({error.strerror}); choose another folder"
        ) from error
    with rows:
        yield rows


def _flat(scores: ExamScores, suffix: str) -> dict[str, float]:
    numbers = {
        "accuracy": scores.accuracy,
        "accuracy_low": scores.accuracy_low,
        "accuracy_high": scores.accuracy_high,
        "format_rate": scores.format_rate,
        "tokens_mean": scores.tokens_mean,
        "truncated_rate": scores.truncated_rate,
        "num_problems": scores.num_problems,
    }
    if scores.accuracy_formatted is not None:
        numbers["accuracy_formatted"] = scores.accuracy_formatted
    if scores.num_samples > 1:
        numbers["pass_at_k"] = scores.pass_at_k
        numbers["majority_accuracy"] = scores.majority_accuracy
    return {f"eval/{name}{suffix}": number for name, number in numbers.items()}
