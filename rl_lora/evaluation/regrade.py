"""Regrades evaluations from their files, without sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewards import Score, load_reward
from rl_lora.errors import UserError
from rl_lora.evaluation.files import find_evaluation, read_evaluation
from rl_lora.evaluation.scores import (
    EvaluationScores,
    ProblemRecord,
    SampleRecord,
    evaluation_scores,
)
from rl_lora.scoring import score_best


@dataclass(frozen=True, slots=True)
class Change:
    """A completion whose verdict has changed.

    Example: Change(prompt_id="math500/7", sample=1, reference="1/2", answer="0.5", was=False,
    now=True, status="ok")
    """

    prompt_id: str
    sample: int  # 1..k
    reference: str
    answer: str | None  # as extracted now
    was: bool
    now: bool
    status: str  # the verifier's status now


@dataclass(frozen=True, slots=True)
class Regrade:
    """An evaluation with its old and its new verdicts.

    Example: Regrade(evaluation="runs/q/eval/eval.jsonl.gz", reward="math", policy="default",
    old=EvaluationScores(...), new=EvaluationScores(...), confidence=0.95, changes=(Change(...),))
    """

    evaluation: str
    reward: str
    policy: str
    old: EvaluationScores
    new: EvaluationScores
    confidence: float  # of the intervals
    changes: tuple[Change, ...]


def regrade(
    path: Path,
    *,
    reward: str | None = None,
    policy: str | None = None,
    num_workers: int = 1,
    timeout_s: float = 5.0,
    confidence: float = 0.95,
) -> Regrade:
    """Grades every completion of an evaluation again.

    Args:
        path: RUN/eval/NAME.jsonl.gz, or the NAME.json next to it.
        reward: a name or "module:function"; None: the evaluation's reward, or "math".
        policy: grading rules; None: the evaluation's, or "default".
        num_workers: verifier processes.
        timeout_s: seconds for a hard answer.
        confidence: of the intervals.

    Raises:
        UserError: there is no such evaluation, it has no problems yet, or its reward is a module's
            and `reward` is not given.
        ValueError: unknown reward or policy.
    """
    path = find_evaluation(path)
    settings, problems_N = read_evaluation(path)
    if not problems_N:
        raise UserError(f"{path} has no problems yet; wait for rl-lora eval to finish")
    name, rules = reward_and_rules(path, settings, reward, policy)
    weight = float(settings.get("format_weight", 0.0))
    tags = tuple((opening, closing) for opening, closing in settings.get("thinking_tags", ()))
    samples = [sample for problem in problems_N for sample in problem.samples_G]
    references = [problem.reference for problem in problems_N for _ in problem.samples_G]
    with load_reward(
        name,
        rules=rules,
        format_weight=weight,
        num_workers=num_workers,
        timeout_s=timeout_s,
        thinking_tags=tags,
    ) as scorer:
        scores = score_best(scorer, [sample.completion for sample in samples], references)
    graded_N = _with_scores(problems_N, scores)
    return Regrade(
        evaluation=str(path),
        reward=name,
        policy=rules,
        old=evaluation_scores(problems_N, confidence),
        new=evaluation_scores(graded_N, confidence),
        confidence=confidence,
        changes=_changes(problems_N, graded_N),
    )


def reward_and_rules(
    path: Path, settings: Mapping[str, Any], reward: str | None, policy: str | None
) -> tuple[str, str]:
    """(reward, grading rules): those given, else those the evaluation was graded with.

    Raises:
        UserError: the evaluation names a module: a file must not decide which code is imported.
    """
    name = reward or str(settings.get("reward", "math"))
    if reward is None and ":" in name:
        raise UserError(
            f"{path} was graded by {name[:80]!r}; to import that code, pass it as --reward"
        )
    return name, policy or str(settings.get("reward_policy", "default"))


def _with_scores(
    problems_N: Sequence[ProblemRecord], scores: Sequence[Score]
) -> list[ProblemRecord]:
    left = iter(scores)
    return [
        replace(
            problem,
            samples_G=tuple(_graded(sample, next(left)) for sample in problem.samples_G),
        )
        for problem in problems_N
    ]


def _graded(sample: SampleRecord, score: Score) -> SampleRecord:
    return replace(
        sample,
        answer=score.answer,
        correct=score.correct,
        reward=score.reward,
        status=str(score.status),
        has_format=score.has_format,
    )


def _changes(old_N: Sequence[ProblemRecord], new_N: Sequence[ProblemRecord]) -> tuple[Change, ...]:
    return tuple(
        Change(
            prompt_id=old.prompt_id,
            sample=index,
            reference=old.reference,
            answer=after.answer,
            was=before.correct,
            now=after.correct,
            status=after.status,
        )
        for old, new in zip(old_N, new_N, strict=True)
        for index, (before, after) in enumerate(
            zip(old.samples_G, new.samples_G, strict=True), start=1
        )
        if before.correct != after.correct
    )
