"""A calculator that the policy may use before it answers (ToRA, arXiv 2309.17452, without code)."""

from __future__ import annotations

from typing import ClassVar

from rl_lora.environments.arithmetic import MAX_CHARS, as_text, evaluate
from rl_lora.environments.protocol import Step, Turn
from rl_lora.types import Prompt

_OPENING, _CLOSING = "<calc>", "</calc>"


class Calculator:
    """Answers a turn that ends with a call, <calc>12*37</calc>, with <result>444</result>.

    A turn without a call, or with a \\boxed{} after it, is the answer, which the job's reward
    scores. What cannot be computed is answered with <result>error: REASON</result>.
    """

    is_graded: ClassVar[bool] = False

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Nothing differs between episodes."""

    def step(self, turn: Turn) -> Step:
        """The value of the last call."""
        _, found, call = turn.text.rpartition(_OPENING)
        if not found or "\\boxed" in call:
            return Step()
        asked = call[: MAX_CHARS + 1 + len(_CLOSING)].partition(_CLOSING)[0]
        try:
            result = as_text(evaluate(asked))
        except ValueError as error:
            result = f"error: {error}"
        return Step(f"<result>{result}</result>")
