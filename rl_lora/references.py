"""Gold answers with alternatives: several texts in one reference, any of which counts.

A list of answers in a data set is read by `layouts`; what comes of it travels as one text,
``1/2 ||| 0.5``, through prompts, records and files, and is taken apart where it is graded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewards import Reward, Score

SEPARATOR = " ||| "


def join_alternatives(golds: Sequence[str]) -> str:
    """One reference. Example: ["1/2", "0.5"] -> "1/2 ||| 0.5"."""
    return SEPARATOR.join(golds)


def alternatives(reference: str) -> list[str]:
    """The texts of a reference, at least one. Example: "1/2 ||| 0.5" -> ["1/2", "0.5"]."""
    return reference.split(SEPARATOR)


def score_best(
    reward: Reward, completions: Sequence[str], references: Sequence[str]
) -> list[Score]:
    """One score a completion, against whichever alternative it does best by; ties: the first.

    All pairs go to the reward in one call, so that its workers are used together.
    """
    golds_N = [alternatives(reference) for reference in references]
    texts = [text for text, golds in zip(completions, golds_N, strict=True) for _ in golds]
    scores = iter(reward.score_batch(texts, [gold for golds in golds_N for gold in golds]))
    return [
        max((next(scores) for _ in golds), key=lambda score: (score.correct, score.reward))
        for golds in golds_N
    ]
