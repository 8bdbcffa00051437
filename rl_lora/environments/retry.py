"""Another try after a wrong answer (SCoRe, arXiv 2409.12917, but with the verdict in between)."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from rl_lora.environments.protocol import Step, Turn
from rl_lora.types import Prompt

_WRONG = "That is not correct. Try again."
_MISSING = "There is no answer in a \\boxed{}. Try again."


class Retry:
    """Says that an answer is wrong, never what is right; the last answer's score counts.

    Args:
        discount: the reward is multiplied by it once for each turn after the first.
    """

    is_graded: ClassVar[bool] = True

    def __init__(self, *, discount: float = 1.0) -> None:
        if not 0 < discount <= 1:
            raise ValueError(f"discount={discount:g} must be above 0 and at most 1")
        self._discount, self._factor = discount, 1.0

    def reset(self, prompt: Prompt, seed: int) -> None:
        """The first try counts in full."""
        self._factor = 1.0

    def step(self, turn: Turn) -> Step:
        """The verdict, if the answer is wrong."""
        assert turn.score is not None
        score = replace(
            turn.score,
            reward=turn.score.reward * self._factor,
            terms={name: value * self._factor for name, value in turn.score.terms.items()},
        )
        self._factor *= self._discount
        if score.correct:
            return Step(None, score)
        return Step(_MISSING if score.status == "no_answer" else _WRONG, score)
