"""A reward of several terms with weights; a term may be of some sources only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rewards.types import Reward, Score
from rewards.user_function import FunctionReward, Row


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a reward.

    Example: Term(name="short", reward=FunctionReward(...), weight=0.2, sources=("gsm8k",))
    """

    name: str  # in metrics and transcripts
    reward: Reward
    weight: float = 1.0
    sources: tuple[str, ...] = ()  # names of the data sets that it applies to; empty: all

    def applies_to(self, source: str) -> bool:
        """Whether problems of this data set get the term."""
        return not self.sources or source in self.sources


class CombinedReward(Reward):
    """The sum of its terms' rewards times their weights.

    `Score.terms` has the terms' own rewards. Everything else in a score (correct, status, answer,
    format) is that of the first term that applies to the problem.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)

    def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]:
        """One Score per completion, of the terms for all sources."""
        rows: list[Row] = [{} for _ in completions]
        return self.score_rows(completions, references, rows, [""] * len(completions))

    def score_rows(
        self,
        completions: Sequence[str],
        references: Sequence[str],
        rows: Sequence[Row],
        sources: Sequence[str],
    ) -> list[Score]:
        """One Score per completion; rows are the columns of its problem, sources its data set.

        Raises:
            RewardError: a user's own function failed.
            ValueError: a source that no term applies to.
        """
        found: list[dict[str, Score]] = [{} for _ in completions]
        for term in self.terms:
            places = [n for n, source in enumerate(sources) if term.applies_to(source)]
            texts, golds = ([given[n] for n in places] for given in (completions, references))
            if isinstance(term.reward, FunctionReward):
                scores = term.reward.score_rows(texts, golds, [rows[n] for n in places])
            else:
                scores = term.reward.score_batch(texts, golds)
            for place, score in zip(places, scores, strict=True):
                found[place][term.name] = score
        return [self._sum(scores, source) for scores, source in zip(found, sources, strict=True)]

    def _sum(self, scores: Mapping[str, Score], source: str) -> Score:
        if not scores:
            raise ValueError(f"no term of the reward applies to {source!r}")
        values = {name: score.reward for name, score in scores.items()}
        total = sum(term.weight * values[term.name] for term in self.terms if term.name in values)
        return replace(next(iter(scores.values())), reward=total, terms=values)

    def close(self) -> None:
        """Close every term."""
        for term in self.terms:
            term.reward.close()
