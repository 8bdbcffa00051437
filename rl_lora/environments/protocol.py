"""The protocol of environments, and its records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from rl_lora.types import Prompt, Score


@dataclass(frozen=True, slots=True)
class Turn:
    """What the policy has said in one turn.

    Example: Turn(text="So \\\\boxed{8}.", score=Score(reward=0.0, correct=False, ...),
    is_truncated=False)
    """

    text: str  # without special tokens; hostile: never to be executed
    score: Score | None  # by the job's reward; None unless the environment is graded
    is_truncated: bool  # cut off by the token limit: the episode ends, whatever the step says


@dataclass(frozen=True, slots=True)
class Step:
    """An environment's reaction to a turn.

    Example: Step("That is not correct. Try again.", score=Score(reward=0.0, correct=False, ...))
    """

    observation: str | None = None  # what the policy reads before its next turn; None: it is over
    # Of the whole episode, if it ends here; None: the job's reward, of the last turn's text.
    score: Score | None = None


class Environment(Protocol):
    """One episode: a new one is made for each sample of a prompt.

    It is deterministic given the prompt, the seed and the turns, and never executes what the policy
    has written. The episode also ends where the settings' turns or tokens are used up.

    Example:
        class Echo:
            is_graded = False

            def reset(self, prompt: Prompt, seed: int) -> None:
                self.num_turns = 0

            def step(self, turn: Turn) -> Step:
                self.num_turns += 1
                return Step(turn.text) if self.num_turns < 3 else Step()
    """

    is_graded: ClassVar[bool]  # whether the job's reward scores each turn before its step

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Begins the episode; the policy has the prompt.

        Args:
            prompt: the problem; with the data set's columns only where a reward function asks for
                them.
            seed: of all that is random here, another one for each sample.
        """

    def step(self, turn: Turn) -> Step:
        """The reaction to the policy's next turn."""
