"""The seeded, resumable stream of prompts that training takes from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from rl_lora.errors import UserError
from rl_lora.seeds import mix_seed
from rl_lora.types import Prompt


class PromptStream:
    """Endless prompts, reshuffled every epoch by seed; one take never repeats a prompt.

    (A take of more prompts than there are must repeat; then each full round is distinct.)
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise UserError("there are no training prompts; set data.train")
        self._prompts = list(prompts)
        self._seed = seed
        self._epoch = 0
        self._position = 0  # in the epoch's order
        # Rows of this epoch skipped by a take across its start, which already had them.
        self._owed: list[int] = []
        self._order = self._shuffled()

    @property
    def prompts_N(self) -> list[Prompt]:
        """All prompts, in the data set's order."""
        return list(self._prompts)

    @property
    def epoch(self) -> int:
        """Number of full passes over the prompts so far."""
        return self._epoch

    def take(self, num_prompts: int) -> list[Prompt]:
        """The next prompts, across the end of an epoch if necessary."""
        taken: list[Prompt] = []
        seen: set[int] = set()
        while len(taken) < num_prompts:
            if len(seen) == len(self._prompts):
                seen = set()
            index = self._next(seen)
            seen.add(index)
            taken.append(self._prompts[index])
        return taken

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, for a checkpoint."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "owed": list(self._owed),
            "seed": self._seed,
            "num_prompts": len(self._prompts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly where `state_dict` was taken.

        Raises:
            UserError: the checkpoint is of another seed or another number of prompts.
        """
        for key, now in (("seed", self._seed), ("num_prompts", len(self._prompts))):
            if state[key] != now:
                raise UserError(
                    f"the checkpoint's prompt stream has {key}={state[key]}, this job {now}; "
                    "resume with the run's original data and seed settings"
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._owed = list(state["owed"])
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(mix_seed("epoch", self._seed, self._epoch)).shuffle(order)
        return order

    def _next(self, seen: set[int]) -> int:
        for place, index in enumerate(self._owed):
            if index not in seen:
                return self._owed.pop(place)
        while True:
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._shuffled()
            index = self._order[self._position]
            self._position += 1
            if index not in seen:
                return index
            self._owed.append(index)
