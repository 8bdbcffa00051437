"""The seeded, resumable stream of prompts that training takes from."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rl_lora.data.curriculum import PassRates
from rl_lora.errors import UserError
from rl_lora.seeds import mix_seed
from rl_lora.types import Prompt, RolloutGroup


class PromptStream:
    """Endless prompts, reshuffled every epoch by seed; one take never repeats a prompt.

    (A take of more prompts than there are must repeat; then each full round is distinct.)

    With weights every source has its own epochs, and turns go round by smooth weighted round robin:
    at each turn a source earns its weight, and the one with the most credit is drawn from and pays
    the sum of the weights. No chance is involved, and the counts are at any time as close to the
    weights as whole prompts allow. Only a source of fewer prompts than its turns in a take repeats
    any.

    With a curriculum an epoch passes over prompts by chance: each is drawn with the probability
    that `PassRates.weight` gives it.

    Args:
        prompts: of all sources.
        seed: of the order.
        weights: by `Prompt.source`, of all sources; none: the prompts are one shuffled set.
        curriculum: running pass rates; none: every prompt is drawn in every epoch.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int,
        weights: Mapping[str, float] | None = None,
        curriculum: PassRates | None = None,
    ) -> None:
        if not prompts:
            raise UserError("there are no training prompts; set data.train")
        self._prompts = list(prompts)
        self._seed = seed
        self._weights = dict(weights or {})
        self._curriculum = curriculum
        self._all = _Epochs(self._prompts, seed, curriculum)
        self._sources = {
            source: _Epochs(
                [prompt for prompt in prompts if prompt.source == source],
                mix_seed("source", seed, source),
                curriculum,
            )
            for source in self._weights
        }
        if empty := self._weights.keys() - {prompt.source for prompt in prompts}:
            raise UserError(
                f"no training prompt of {min(empty)!r} is left: the evaluation, the other sets or "
                "data.pass_rates leave none; remove the set from data.train"
            )
        self._credit = dict.fromkeys(self._weights, 0.0)

    @property
    def prompts_N(self) -> list[Prompt]:
        """All prompts, in the data set's order."""
        return list(self._prompts)

    @property
    def epoch(self) -> int:
        """Number of full passes over the prompts so far; with weights, over every source."""
        return min(one.epoch for one in (self._sources.values() or [self._all]))

    def take(self, num_prompts: int, *, is_same_step: bool = False) -> list[Prompt]:
        """The next step's prompts, across the end of an epoch if necessary.

        is_same_step: they are further ones for the step before. A curriculum draws them by the same
        rates; they may repeat some of the step's where an epoch ends.
        """
        if self._curriculum is not None and not is_same_step:
            self._curriculum.begin_draw()
        if not self._weights:
            return self._all.take(num_prompts)
        turns = [self._next_source() for _ in range(num_prompts)]
        taken = {
            source: iter(self._sources[source].take(count))
            for source, count in Counter(turns).items()
        }
        return [next(taken[source]) for source in turns]

    def _next_source(self) -> str:
        for source, weight in self._weights.items():
            self._credit[source] += weight
        chosen = max(self._credit, key=self._credit.__getitem__)
        self._credit[chosen] -= sum(self._weights.values())
        return chosen

    def observe(
        self, groups_N: Sequence[RolloutGroup], position: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Takes in the results of the next step, for the curriculum.

        Args:
            groups_N: the step's groups.
            position: `state_dict` after the step's prompts were drawn.

        Returns:
            The state that a checkpoint after this step needs.
        """
        if self._curriculum is None:
            return dict(position)
        self._curriculum.add(groups_N)
        curriculum = {**position["curriculum"], "results": self._curriculum.results()}
        return {**position, "curriculum": curriculum}

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, for a checkpoint."""
        if self._weights:
            state = {
                "num_prompts": len(self._prompts),
                "credit": dict(self._credit),
                "sources": {source: one.state_dict() for source, one in self._sources.items()},
            }
        else:
            state = self._all.state_dict()
        if self._curriculum is not None:
            state["curriculum"] = self._curriculum.state_dict()
        return {**state, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any], *, has_other_rows: bool = False) -> None:
        """Continues exactly where `state_dict` was taken.

        Args:
            state: what it returned.
            has_other_rows: the user has accepted other rows; where their number differs, a new
                epoch begins with them.

        Raises:
            UserError: the checkpoint is of another seed or another number of prompts.
        """
        now = {"seed": self._seed}
        if not has_other_rows:
            now["num_prompts"] = len(self._prompts)
        for key, value in now.items():
            if state[key] != value:
                raise UserError(
                    f"the checkpoint's prompt stream has {key}={state[key]}, this job {value}; "
                    "resume with the run's original data and seed settings"
                )
        if self._curriculum is not None:
            self._curriculum.load_state_dict(state["curriculum"])
        if not self._weights:
            self._all.load_state_dict(state)
            return
        self._credit = dict(state["credit"])
        for source, one in self._sources.items():
            one.load_state_dict(state["sources"][source])


class _Epochs:
    """The prompts of one set, shuffled again for every epoch."""

    def __init__(
        self, prompts: Sequence[Prompt], seed: int, curriculum: PassRates | None = None
    ) -> None:
        self._prompts = prompts
        self._seed = seed
        self._curriculum = curriculum
        self.epoch = 0
        self._position = 0  # in the epoch's order
        # Rows of this epoch skipped by a take across its start, which already had them.
        self._owed: list[int] = []
        self._order = self._shuffled()

    def take(self, num_prompts: int) -> list[Prompt]:
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
        return {
            "epoch": self.epoch,
            "position": self._position,
            "owed": list(self._owed),
            "num_prompts": len(self._prompts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch, self._position, self._owed = state["epoch"], state["position"], state["owed"]
        if state["num_prompts"] != len(self._prompts):
            self.epoch, self._position, self._owed = self.epoch + 1, 0, []
        self._owed = list(self._owed)
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(mix_seed("epoch", self._seed, self.epoch)).shuffle(order)
        return order

    def _next(self, seen: set[int]) -> int:
        for place, index in enumerate(self._owed):
            if index not in seen:
                return self._owed.pop(place)
        while True:
            if self._position == len(self._order):
                self.epoch, self._position = self.epoch + 1, 0
                self._order = self._shuffled()
            index = self._order[self._position]
            self._position += 1
            if self._is_passed_over(index):
                continue
            if index not in seen:
                return index
            # A curriculum may give prompts more turns than takes of distinct ones can have.
            if self._curriculum is None or index not in self._owed:
                self._owed.append(index)

    def _is_passed_over(self, index: int) -> bool:
        """Whether the curriculum leaves the prompt out of this epoch."""
        if self._curriculum is None:
            return False
        prompt_id = self._prompts[index].prompt_id
        chance = mix_seed("curriculum", self._seed, self.epoch, prompt_id) / 2**63
        return chance >= self._curriculum.weight(prompt_id)
