"""Score completions against gold answers that may have alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rewards import FunctionReward, Reward, RewardError, Score
from rl_lora.data.references import alternatives
from rl_lora.errors import UserError

Row = Mapping[str, Any]  # a data set's columns, by name


def score_best(
    reward: Reward,
    completions: Sequence[str],
    references: Sequence[str],
    rows: Sequence[Row] | None = None,
) -> list[Score]:
    """The best score of each completion over its reference's alternatives; the first on a tie.

    All pairs go to the reward in one call, so that its workers run in parallel.

    Args:
        reward: the reward.
        completions: texts.
        references: one per completion.
        rows: the columns of each completion's problem, for a user's own function.

    Raises:
        UserError: the user's own function failed.
    """
    golds_N = [alternatives(reference) for reference in references]
    all_rows: Sequence[Row] = [{}] * len(golds_N) if rows is None else rows
    counts = [len(golds) for golds in golds_N]
    texts = [text for text, n in zip(completions, counts, strict=True) for _ in range(n)]
    pair_rows = [row for row, n in zip(all_rows, counts, strict=True) for _ in range(n)]
    golds = [gold for golds in golds_N for gold in golds]
    try:
        if isinstance(reward, FunctionReward):
            scores = iter(reward.score_rows(texts, golds, pair_rows))
        else:
            scores = iter(reward.score_batch(texts, golds))
    except RewardError as error:
        raise UserError(str(error)) from error
    return [
        max((next(scores) for _ in range(n)), key=lambda score: (score.correct, score.reward))
        for n in counts
    ]
