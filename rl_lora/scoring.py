"""A job's reward; completions are scored against gold answers that may have alternatives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from rewards import (
    CombinedReward,
    FunctionReward,
    Reward,
    RewardError,
    Score,
    Term,
    load_reward,
)
from rl_lora.config import RunConfig
from rl_lora.data.references import alternatives
from rl_lora.errors import UserError, nearest

Row = Mapping[str, Any]  # a data set's columns, by name
T = TypeVar("T")


def make_reward(config: RunConfig) -> Reward:
    """The reward of the config. Raises UserError if its name or policy is unknown."""
    section = config.reward
    load = partial(
        load_reward,
        format_weight=section.format_weight,
        num_workers=section.num_workers,
        timeout_s=section.timeout_s,
        rules=section.policy,
        thinking_tags=section.thinking_tags,
    )
    try:
        if not section.terms:
            return load(section.name)
        return CombinedReward(
            [Term(one.key, load(one.name), one.weight, one.sources) for one in section.terms]
        )
    except ValueError as error:
        raise UserError(f"config: reward: {error}") from error


def functions_of(reward: Reward) -> list[FunctionReward]:
    """The user's own functions that a reward calls."""
    parts = (
        [term.reward for term in reward.terms] if isinstance(reward, CombinedReward) else [reward]
    )
    return [part for part in parts if isinstance(part, FunctionReward)]


def check_sources(reward: Reward, train: Collection[str], evaluation: Collection[str]) -> None:
    """Compares the sources that terms of the reward name with those of the problems.

    Raises:
        UserError: no term applies to a source, or a term names one that no set is called (unless
            there are no training sets, as when a run is evaluated on others).
    """
    if not isinstance(reward, CombinedReward):
        return
    known = sorted({*train, *evaluation})
    for source in known:
        if not any(term.applies_to(source) for term in reward.terms):
            raise UserError(
                f"reward.terms: no term applies to {source!r}; add it to the sources of one, or "
                "leave the sources of one out"
            )
    for term in reward.terms:
        unknown = [source for source in term.sources if source not in known]
        if unknown and train:
            raise UserError(
                f"reward.terms: {term.name!r} is for the source {unknown[0]!r}, which no data set "
                f"is called; {nearest(unknown[0], known)}"
            )


def score_best(
    reward: Reward,
    completions: Sequence[str],
    references: Sequence[str],
    rows: Sequence[Row] | None = None,
    sources: Sequence[str] | None = None,
) -> list[Score]:
    """The best score of each completion over its reference's alternatives; the first on a tie.

    All pairs go to the reward in one call, so that its workers run in parallel.

    Args:
        reward: the reward.
        completions: texts.
        references: one per completion.
        rows: the columns of each completion's problem, for a user's own function.
        sources: the name of each completion's data set, for a reward with terms by source.

    Raises:
        UserError: the user's own function failed.
    """
    golds_N = [alternatives(reference) for reference in references]
    counts = [len(golds) for golds in golds_N]

    def per_gold(values: Sequence[T]) -> list[T]:
        return [value for value, n in zip(values, counts, strict=True) for _ in range(n)]

    texts, golds = per_gold(completions), [gold for golds in golds_N for gold in golds]
    pair_rows = per_gold(rows or [{}] * len(golds_N))
    try:
        if isinstance(reward, CombinedReward):
            pair_sources = per_gold(sources or [""] * len(golds_N))
            scores = iter(reward.score_rows(texts, golds, pair_rows, pair_sources))
        elif isinstance(reward, FunctionReward):
            scores = iter(reward.score_rows(texts, golds, pair_rows))
        else:
            scores = iter(reward.score_batch(texts, golds))
    except RewardError as error:
        raise UserError(str(error)) from error
    return [
        max((next(scores) for _ in range(n)), key=lambda score: (score.correct, score.reward))
        for n in counts
    ]
