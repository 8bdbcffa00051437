"""The verifier's records, and the protocol that every reward implements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, Self, get_args

Status = Literal[
    "ok",  # graded; `correct` says whether it is right
    "bad_reference",  # the reference is empty or not a string: nothing to compare with
    "no_answer",  # the completion contains nothing to grade
    "unparsable",  # an answer was found, but it is neither maths nor comparable text
    "unevaluated",  # the answer is a task (an integral, a sum, a gcd), not its value
    "contradictory",  # several different final answers, or a false statement such as 3 = 5
    "limit",  # the answer exceeds a size limit (length, nesting, digits, memory)
    "timeout",  # the deadline passed and the worker was killed
    "crashed",  # the worker died twice on this answer
]
STATUSES: tuple[str, ...] = get_args(Status)

Tier = Literal["string", "exact", "typed", "numeric", "symbolic", "none"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of comparing one answer with one gold answer.

    `tier` names the stage that decided. Example::

        Verdict(correct=True, status="ok", tier="exact")
    """

    correct: bool
    status: Status = "ok"
    tier: Tier = "none"


@dataclass(frozen=True, slots=True)
class Score:
    """Reward of one completion.

    `reward` is what the trainer uses: 1.0 for a correct answer, else 0.0, plus the format weight if
    `has_format` (the final answer is in a balanced, non-empty ``\\boxed{}``). `terms` are, by name,
    the values of a `CombinedReward`'s terms before their weights; others have none. Example::

        Score(reward=1.0, correct=True, status="ok", answer="42", has_format=True)
    """

    reward: float
    correct: bool
    status: Status
    answer: str | None
    has_format: bool
    terms: Mapping[str, float] = field(default_factory=dict, hash=False)

    def to_row(self) -> dict[str, Any]:
        """The fields as JSON has them; without `terms` if there are none."""
        row = asdict(self)
        if not self.terms:
            del row["terms"]
        return row


class RewardError(ValueError):
    """A user's reward function failed or returned something unusable; a one-line message."""


class Reward(Protocol):
    """Scores completions; a context manager. Subclasses inherit `__enter__` and `__exit__`."""

    def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]:
        """One Score per completion, in order."""
        ...

    def close(self) -> None:
        """Release processes and event loops."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
