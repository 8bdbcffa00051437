"""Rewards to advantages: one pure function each, over the N groups of G rewards of a step.

Every function takes rewards_N_G (a list of groups; groups may differ in size) and returns
advantages_N_G of the same shape; keywords are its options, as with losses. A function with a second
argument `terms_K` also gets the K rewards that make up the sum, one by one. A group whose rewards
are all equal gets exact zeros: it carries no signal, and rounding errors must not reach the
optimizer.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl_lora.errors import UserError

Groups = Sequence[Sequence[float]]
# Of rewards_N_G, terms_K if it has such an argument, and the function's own keywords.
AdvantageFn = Callable[..., list[list[float]]]
_STD_EPS = 1e-6  # keeps a division finite; far below any std of 0/1 rewards


def group_mean(rewards_N_G: Groups) -> list[list[float]]:
    """reward - group mean, no std: the article's choice ('LoRA Without Regret', RL set-up).

    With `algorithm.denominator = "max_tokens"` this is Dr. GRPO (arXiv 2503.20783, section 3.2).
    """
    return _by_group(
        rewards_N_G, lambda group: [reward - statistics.fmean(group) for reward in group]
    )


def grpo(rewards_N_G: Groups) -> list[list[float]]:
    """(reward - mean) / std within the group (GRPO, arXiv 2402.03300, section 4.1.2).

    The std is the sample std (n - 1).
    """

    def of_group(group: Sequence[float]) -> list[float]:
        mean, std = statistics.fmean(group), statistics.stdev(group)
        return [(reward - mean) / (std + _STD_EPS) for reward in group]

    return _by_group(rewards_N_G, of_group)


def rloo(rewards_N_G: Groups) -> list[list[float]]:
    """reward - mean of the group's other rewards (RLOO, arXiv 2402.14740, equation 6).

    Equals G/(G-1) times `group_mean`. Raises ValueError for a group of one.
    """

    def of_group(group: Sequence[float]) -> list[float]:
        total = sum(group)
        return [r - (total - r) / (len(group) - 1) for r in group]

    if any(len(group) < 2 for group in rewards_N_G):
        raise ValueError("rloo needs at least 2 samples a prompt; got 1")
    return _by_group(rewards_N_G, of_group)


def reinforce_pp(rewards_N_G: Groups) -> list[list[float]]:
    """REINFORCE++-baseline (arXiv 2501.03262): reward - group mean, divided by the population std
    of the whole step's advantages (whose mean is zero, as each group's is)."""
    centred_N_G = group_mean(rewards_N_G)
    std = statistics.pstdev(advantage for group in centred_N_G for advantage in group)
    return [[advantage / (std + _STD_EPS) for advantage in group] for group in centred_N_G]


def maxrl(rewards_N_G: Groups) -> list[list[float]]:
    """(reward - mean) / mean within the group (MaxRL, arXiv 2602.02710).

    With 0/1 rewards and a pass rate p, the mean of the step is (1 - (1 - p)^(G - 1)) / p times the
    gradient of p: with many samples the gradient of log p, the likelihood of a right answer, where
    `group_mean` follows that of p. Prompts that are seldom solved count more.

    Raises UserError for a negative reward, for which the method is not defined.
    """

    def of_group(group: Sequence[float]) -> list[float]:
        mean = statistics.fmean(group)
        return [(reward - mean) / mean for reward in group]

    if (lowest := min(min(group) for group in rewards_N_G)) < 0:
        raise UserError(
            f"algorithm.advantage='maxrl' divides by the group's mean reward, and a reward of "
            f"{lowest:g} is negative; set algorithm.advantage='grpo', or remove the penalty"
        )
    return _by_group(rewards_N_G, of_group)


@dataclass(frozen=True, slots=True)
class TermRewards:
    """One of several rewards over a step's groups.

    Example: TermRewards("format", weight=0.5, rewards_N_G=[[1.0, 0.0], [0.0, 0.0]])
    """

    name: str
    weight: float  # in the sum of rewards
    rewards_N_G: Groups  # before the weight; zeros in groups that it does not apply to


def gdpo(rewards_N_G: Groups, terms_K: Sequence[TermRewards]) -> list[list[float]]:
    """GDPO (arXiv 2601.05242): each reward is normalized within its group as in `grpo`, and their
    weighted sum is divided by its population std over the whole step (its mean is zero, as each
    group's is).

    A sum of rewards is dominated by the one that varies most; here a weight says how much a reward
    counts, whatever its scale. `rewards_N_G`, the sum, gives only the shape.
    """
    summed_N_G = [[0.0] * len(group) for group in rewards_N_G]
    for term in terms_K:
        for summed_G, normalized_G in zip(summed_N_G, grpo(term.rewards_N_G), strict=True):
            for index, advantage in enumerate(normalized_G):
                summed_G[index] += term.weight * advantage
    std = statistics.pstdev(advantage for group in summed_N_G for advantage in group)
    return [[advantage / (std + _STD_EPS) for advantage in group] for group in summed_N_G]


def takes_terms(advantage: AdvantageFn) -> bool:
    """Whether the function has an argument `terms_K`."""
    return "terms_K" in inspect.signature(advantage).parameters


def correlations(advantages_N_G: Groups, terms_K: Sequence[TermRewards]) -> dict[str, float]:
    """By term, Pearson's correlation over the step of the advantages with the term's rewards less
    their group's mean: which of the rewards is followed. Without terms that do not vary."""
    found = {}
    advantages = [advantage for group in advantages_N_G for advantage in group]
    for term in terms_K:
        centred = [value for group in group_mean(term.rewards_N_G) for value in group]
        if any(centred) and any(advantages):
            found[term.name] = statistics.correlation(advantages, centred)
    return found


ADVANTAGES: dict[str, AdvantageFn] = {
    "group_mean": group_mean,
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
    "maxrl": maxrl,
    "gdpo": gdpo,
}


def _by_group(
    rewards_N_G: Groups, formula: Callable[[Sequence[float]], list[float]]
) -> list[list[float]]:
    """The formula's advantages of each group, and zeros for a tied one: in floating point, 0.1 less
    the mean of eight times 0.1 need not be 0."""
    return [
        [0.0] * len(group) if min(group) == max(group) else formula(group) for group in rewards_N_G
    ]
