"""Completions scored by a reward, against gold answers that may have alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards import FunctionReward, Reward, RewardError, Score
from rl_lora.errors import UserError
from rl_lora.references import alternatives

Row = Mapping[str, Any]  # a data set's columns, by name


def score_best(
    reward: Reward,
    completions: Sequence[str],
    references: Sequence[str],
    rows: Sequence[Row] | None = None,
) -> list[Score]:
    """One score a completion, against whichever alternative it does best by; ties: the first.

    All pairs go to the reward in one call, so that its workers are used together.

    Args:
        reward: any.
        completions: texts.
        references: one for each of these.
        rows: the columns of each completion's problem, for a user's own function.

    Raises:
        UserError: a user's own function failed.
    """
    golds_N = [alternatives(reference) for reference in references]
    rows = [{}] * len(golds_N) if rows is None else rows
    pairs = [
        (text, gold, row)
        for text, golds, row in zip(completions, golds_N, rows, strict=True)
        for gold in golds
    ]
    texts, golds, rows = ([pair[place] for pair in pairs] for place in range(3))
    try:
        if isinstance(reward, FunctionReward):
            scores = iter(reward.score_rows(texts, golds, rows))
        else:
            scores = iter(reward.score_batch(texts, golds))
    except RewardError as error:
        raise UserError(str(error)) from error
    return [
        max((next(scores) for _ in golds), key=lambda score: (score.correct, score.reward))
        for golds in golds_N
    ]
