"""A curriculum: running pass rates of the training prompts, and how often each is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl_lora.types import RolloutGroup

# Prompts that are always or never solved are drawn in one epoch of ten.
FLOOR = 0.1


def draw_weight(rate: float | None) -> float:
    """The share of epochs in which a prompt of this pass rate is drawn; None: not seen yet.

    FLOOR + (1 - FLOOR) * 4p(1 - p): 4p(1 - p) is the variance of a 0/1 reward as a share of the
    largest one, the 'learnability' of Foster et al. (arXiv 2502.12272).
    """
    return 1.0 if rate is None else FLOOR + (1 - FLOOR) * 4 * rate * (1 - rate)


class PassRates:
    """The running pass rate of each prompt that has been sampled.

    A prompt's rate is the share of correct completions in its first group, and after each later
    group the mean of that group's share and the rate before it.

    Where sampling runs ahead of the learner, it depends on timing which results are there when
    prompts are drawn. The draw of step k therefore uses those of steps up to k - 1 - `delay`, also
    where later ones are there.

    Args:
        delay: the largest number of steps that sampling is ahead (`sampling.max_staleness`).
        rates: from a file, by prompt id; each counts as the prompt's first group.
    """

    def __init__(self, delay: int = 0, rates: Mapping[str, float] | None = None) -> None:
        self._delay = delay
        self._rates = dict(rates or {})
        self._num_draws = 0  # steps whose prompts are drawn
        self._num_used = 0  # steps whose results are in the rates
        # By step, prompt id -> shares of correct completions; of the steps that a draw may need.
        self._results: dict[int, dict[str, list[float]]] = {}
        self._num_results = 0  # steps whose results are known

    def weight(self, prompt_id: str) -> float:
        """`draw_weight` of a prompt."""
        return draw_weight(self._rates.get(prompt_id))

    def begin_draw(self) -> None:
        """Brings the rates to where the next step's draw has them."""
        self._num_draws += 1
        while self._num_used < self._num_draws - 1 - self._delay:
            self._num_used += 1
            for prompt_id, shares in self._results[self._num_used].items():
                for share in shares:
                    old = self._rates.get(prompt_id, share)
                    self._rates[prompt_id] = (old + share) / 2

    def add(self, groups_N: Sequence[RolloutGroup]) -> None:
        """The results of the next step that the learner has taken."""
        shares: dict[str, list[float]] = {}
        for group in groups_N:
            correct_G = [rollout.score.correct for rollout in group.rollouts_G]
            shares.setdefault(group.prompt.prompt_id, []).append(sum(correct_G) / len(correct_G))
        self._num_results += 1
        self._results[self._num_results] = shares
        self._results.pop(self._num_results - self._delay - 1, None)

    def results(self) -> list[tuple[int, dict[str, list[float]]]]:
        """(step, its results) of the last steps: those that later draws are to use."""
        return sorted(self._results.items())

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; `results` of a later time may replace those of the draw's."""
        return {
            "draws": self._num_draws,
            "used": self._num_used,
            "rates": dict(self._rates),
            "results": self.results(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the draw that `state_dict` was taken at."""
        self._rates = dict(state["rates"])
        self._num_draws, self._num_used = state["draws"], state["used"]
        self._results = {step: dict(shares) for step, shares in state["results"]}
        self._num_results = max(self._results, default=0)
