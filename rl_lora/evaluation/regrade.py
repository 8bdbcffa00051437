"""Regrades evaluations from their files, without sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from rewards import load_reward
from rl_lora.errors import UserError
from rl_lora.evaluation.files import find_evaluation, read_evaluation
from rl_lora.evaluation.intervals import CONFIDENCE
from rl_lora.evaluation.scores import EvaluationScores, evaluation_scores
from rl_lora.scoring import score_best


@dataclass(frozen=True, slots=True)
class Change:
    """A completion whose verdict has changed."""

    prompt_id: str
    sample: int  # 1..k
    reference: str
    answer: str | None  # as extracted now
    was: bool
    now: bool
    status: str  # the verifier's status now


@dataclass(frozen=True, slots=True)
class Regrade:
    """An evaluation with its old and its new verdicts."""

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
) -> Regrade:
    """Grades every completion of an evaluation again.

    Args:
        path: RUN/eval/NAME.jsonl.gz, or the NAME.json next to it.
        reward: a name or "module:function"; None: the evaluation's reward, or "math".
        policy: grading rules; None: the evaluation's, or "default".
        num_workers: verifier processes.
        timeout_s: seconds for a hard answer.

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
    samples = [sample for problem in problems_N for sample in problem.samples_G]
    references = [problem.reference for problem in problems_N for _ in problem.samples_G]
    with load_reward(
        name,
        rules=rules,
        format_weight=float(settings.get("format_weight", 0.0)),
        num_workers=num_workers,
        timeout_s=timeout_s,
        thinking_tags=tuple((start, end) for start, end in settings.get("thinking_tags", ())),
    ) as scorer:
        scores = iter(score_best(scorer, [sample.completion for sample in samples], references))
    graded_N = [
        replace(
            problem,
            samples_G=tuple(replace(one, **asdict(next(scores))) for one in problem.samples_G),
        )
        for problem in problems_N
    ]
    changes = [
        Change(new.prompt_id, n, new.reference, now.answer, was.correct, now.correct, now.status)
        for old, new in zip(problems_N, graded_N, strict=True)
        for n, was, now in zip(count(1), old.samples_G, new.samples_G, strict=False)
        if was.correct != now.correct
    ]
    return Regrade(
        evaluation=str(path),
        reward=name,
        policy=rules,
        old=evaluation_scores(problems_N),
        new=evaluation_scores(graded_N),
        confidence=CONFIDENCE,
        changes=tuple(changes),
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
