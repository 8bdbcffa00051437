"""Rewards to advantages: one pure function each, over the N groups of G rewards of a step.

Every function takes rewards_N_G (a list of groups; groups may differ in size) and returns
advantages_N_G of the same shape. A group whose rewards are all equal gets zeros from each of them
(reinforce_pp aside, where the step's mean may shift it): it carries no signal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

Groups = Sequence[Sequence[float]]
_STD_EPS = 1e-6  # keeps a division finite; far below any std of 0/1 rewards


def group_mean(rewards_N_G: Groups) -> list[list[float]]:
    """reward - group mean, no std: the article's choice ('LoRA Without Regret', RL set-up)."""
    return [[reward - statistics.fmean(group) for reward in group] for group in rewards_N_G]


def dr_grpo(rewards_N_G: Groups) -> list[list[float]]:
    """Dr. GRPO (arXiv 2503.20783, section 3.2): the group mean again; what sets it apart is the
    constant denominator, `algorithm.denominator = "max_tokens"`."""
    return group_mean(rewards_N_G)


def grpo(rewards_N_G: Groups) -> list[list[float]]:
    """(reward - mean) / std within the group (GRPO, arXiv 2402.03300, section 4.1.2).

    The std is the sample std (n - 1); a tie gives zeros.
    """
    advantages_N_G = []
    for group in rewards_N_G:
        mean, std = statistics.fmean(group), statistics.stdev(group) if len(group) > 1 else 0.0
        advantages_N_G.append([(reward - mean) / (std + _STD_EPS) for reward in group])
    return advantages_N_G


def rloo(rewards_N_G: Groups) -> list[list[float]]:
    """reward - mean of the group's other rewards (RLOO, arXiv 2402.14740, equation 6).

    Equals G/(G-1) times `group_mean`.
    """
    advantages_N_G = []
    for group in rewards_N_G:
        if len(group) < 2:
            raise ValueError("rloo needs at least 2 samples a prompt; got 1")
        total = sum(group)
        advantages_N_G.append([r - (total - r) / (len(group) - 1) for r in group])
    return advantages_N_G


def reinforce_pp(rewards_N_G: Groups) -> list[list[float]]:
    """REINFORCE++-baseline (arXiv 2501.03262): group mean taken off, then scaled by the mean and
    the population std of the whole step's advantages."""
    centred_N_G = group_mean(rewards_N_G)
    flat = [advantage for group in centred_N_G for advantage in group]
    mean, std = statistics.fmean(flat), statistics.pstdev(flat)
    return [[(advantage - mean) / (std + _STD_EPS) for advantage in group] for group in centred_N_G]


ADVANTAGES: dict[str, Callable[[Groups], list[list[float]]]] = {
    "group_mean": group_mean,
    "dr_grpo": dr_grpo,
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
}
