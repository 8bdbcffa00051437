"""Records that the verifier hands out, and the protocol every reward implements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol, Self, get_args

Status = Literal[
    "ok",  # graded: right or wrong, see `correct`
    "bad_reference",  # the reference is empty or no text: nothing to compare with
    "no_answer",  # nothing to grade was found in the completion
    "unparsable",  # an answer was found that is neither maths nor comparable text
    "unevaluated",  # the answer is an open task (integral, sum, gcd, ...), not its value
    "contradictory",  # several different final answers, or a false statement such as 3 = 5
    "limit",  # the answer exceeds a size limit (length, nesting, digits, memory)
    "timeout",  # the deadline passed; the worker was killed
    "crashed",  # the worker died twice on this answer
]
STATUSES: tuple[str, ...] = get_args(Status)

Tier = Literal["string", "exact", "typed", "numeric", "symbolic", "none"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Outcome of comparing one answer with one gold.

    `tier` names the stage that decided. Example::

        Verdict(correct=True, status="ok", tier="exact")
    """

    correct: bool
    status: Status = "ok"
    tier: Tier = "none"


@dataclass(frozen=True, slots=True)
class Score:
    """Reward of one completion.

    `reward` is what the trainer uses: 1.0 or 0.0 for the answer, plus the format weight where
    `has_format` (a final answer in a balanced ``\\boxed{}``). Example::

        Score(reward=1.0, correct=True, status="ok", answer="42", has_format=True)
    """

    reward: float
    correct: bool
    status: Status
    answer: str | None
    has_format: bool


class RewardError(ValueError):
    """A user's reward failed, or gave what is no reward: one line that names it."""


class Reward(Protocol):
    """Scores completions against references, one Score each, order kept. A context manager."""

    def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
