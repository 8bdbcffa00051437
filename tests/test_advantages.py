"""Advantages against hand-computed numbers."""

import itertools
import math
import operator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rl_lora.advantages import (
    ADVANTAGES,
    TermRewards,
    correlations,
    gdpo,
    group_mean,
    grpo,
    maxrl,
    reinforce_pp,
    rloo,
    takes_terms,
)
from rl_lora.errors import UserError

REWARDS_N_G = [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]]


def test_group_mean_takes_the_mean_off() -> None:
    assert group_mean(REWARDS_N_G) == [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75]]


def test_grpo_divides_by_the_sample_std() -> None:
    # First group: variance 4 * 0.25 / 3 = 1/3; second: (3 * 0.0625 + 0.5625) / 3 = 0.25.
    first, second = grpo(REWARDS_N_G)
    assert first == pytest.approx([0.8660254, -0.8660254, -0.8660254, 0.8660254], rel=1e-5)
    assert second == pytest.approx([-0.5, -0.5, -0.5, 1.5], rel=1e-5)


def test_rloo_compares_with_the_others() -> None:
    # A right one of two in four: 1 - 1/3; a wrong one: 0 - 2/3.
    first, second = rloo(REWARDS_N_G)
    assert first == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3])
    assert second == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 1.0])


def test_rloo_refuses_a_group_of_one() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        rloo([[1.0]])


def test_reinforce_pp_scales_by_the_step() -> None:
    # Group-mean advantages: 4 * 0.25 + 3 * 0.0625 + 0.5625 = 1.75; / 8 = 0.21875; mean 0.
    flat = [a for group in reinforce_pp(REWARDS_N_G) for a in group]
    std = 0.21875**0.5
    expected = [0.5, -0.5, -0.5, 0.5, -0.25, -0.25, -0.25, 0.75]
    assert flat == pytest.approx([e / std for e in expected], rel=1e-4)


def test_maxrl_divides_by_the_mean() -> None:
    assert maxrl(REWARDS_N_G) == [[1.0, -1.0, -1.0, 1.0], [-1.0, -1.0, -1.0, 3.0]]


@pytest.mark.parametrize("num_samples", [2, 3, 5])
@pytest.mark.parametrize("chance", [0.1, 0.5])
def test_maxrl_follows_the_truncated_likelihood(num_samples: int, chance: float) -> None:
    """Over all outcomes of a group, whose score d log P / dp is 1 / p or -1 / (1 - p)."""
    mean = 0.0
    for rewards in itertools.product([0.0, 1.0], repeat=num_samples):
        probability = math.prod(chance if reward else 1 - chance for reward in rewards)
        scores = [1 / chance if reward else -1 / (1 - chance) for reward in rewards]
        (advantages,) = maxrl([rewards])
        mean += probability * sum(map(operator.mul, advantages, scores)) / num_samples
    assert mean == pytest.approx((1 - (1 - chance) ** (num_samples - 1)) / chance)


def test_maxrl_refuses_negative_rewards() -> None:
    with pytest.raises(UserError, match=r"a reward of -0.5 is negative; set .*'grpo'"):
        maxrl([[1.0, 0.0], [0.0, -0.5]])


def terms_of(*weights_and_rewards: tuple[float, list[list[float]]]) -> list[TermRewards]:
    return [
        TermRewards(f"term{number}", weight, rewards_N_G)
        for number, (weight, rewards_N_G) in enumerate(weights_and_rewards)
    ]


def test_gdpo_normalizes_each_reward_in_its_group_and_the_weighted_sum_over_the_step() -> None:
    # In a group of two the sample std of (x, y) is |x - y| / sqrt 2: normalized +-1 / sqrt 2. The
    # first group: (1 - 0.5) / sqrt 2, as they disagree; the second: 1 / sqrt 2, as the other ties.
    # Over the step: std = sqrt((2 * 1/8 + 2 * 1/2) / 4) = sqrt(5 / 16).
    terms_K = terms_of((1.0, [[1.0, 0.0], [1.0, 0.0]]), (0.5, [[0.0, 20.0], [5.0, 5.0]]))
    first, second = gdpo([[1.0, 10.0], [3.5, 2.5]], terms_K)
    assert first == pytest.approx([0.1**0.5 * 2, -(0.1**0.5) * 2], rel=1e-5)
    assert second == pytest.approx([0.1**0.5 * 4, -(0.1**0.5) * 4], rel=1e-5)


def test_gdpo_does_not_depend_on_the_scale_of_a_reward() -> None:
    sums = [[0.0] * 3] * 2
    one, other = [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[3.0, 2.0, 4.0], [1.0, 1.0, 0.0]]
    larger = [[1000 * reward for reward in group] for group in other]
    found = gdpo(sums, terms_of((1.0, one), (0.3, other)))
    for group, again in zip(found, gdpo(sums, terms_of((1.0, one), (0.3, larger))), strict=True):
        assert again == pytest.approx(group, rel=1e-5)


def test_gdpo_tells_apart_what_the_sum_does_not() -> None:
    """The paper's example: of two 0/1 rewards, one or both are met by the better of two samples."""
    sums = [[0.0, 1.0], [0.0, 2.0]]
    assert grpo(sums)[0] == pytest.approx(grpo(sums)[1], rel=1e-5)
    one, both = gdpo(
        sums, terms_of((1.0, [[0.0, 1.0], [0.0, 1.0]]), (1.0, [[0.0] * 2, [0.0, 1.0]]))
    )
    assert both == pytest.approx([2 * advantage for advantage in one])


def test_correlations_say_which_reward_is_followed() -> None:
    one, other = [[1.0, 0.0, 0.0, 1.0]], [[1.0, 1.0, 0.0, 0.0]]
    terms_K = terms_of((1.0, one), (0.0, other), (1.0, [[2.0] * 4]))
    assert correlations(group_mean(one), terms_K) == {"term0": pytest.approx(1), "term1": 0.0}
    # (1, 0.5, 0, 0.5) less 0.5 with (0.5, -0.5, -0.5, 0.5): 0.5 / sqrt(0.5 * 1).
    half = correlations([[0.5, 0.0, -0.5, 0.0]], terms_K)
    assert half == {"term0": pytest.approx(0.5**0.5), "term1": pytest.approx(0.5**0.5)}
    assert correlations([[0.0] * 4], terms_K) == {}


def by_name(name: str, rewards_N_G: list[list[float]]) -> list[list[float]]:
    advantage = ADVANTAGES[name]
    if takes_terms(advantage):
        return advantage(rewards_N_G, terms_of((1.0, rewards_N_G)))
    return advantage(rewards_N_G)


REWARDS = st.floats(-1e6, 1e6)
GROUPS = st.lists(REWARDS, min_size=2, max_size=9)
TIES = st.tuples(REWARDS, st.integers(2, 64)).map(lambda pair: [pair[0]] * pair[1])


@given(TIES, st.lists(GROUPS, max_size=4))
@example([0.1] * 8, [])
@example([0.1] * 3, [[0.0, 1.0]])
@example([1 / 3] * 7, [[0.1, 0.3, 0.2]])
def test_ties_are_exactly_zero_whatever_the_other_groups_are(
    tie: list[float], others: list[list[float]]
) -> None:
    rewards_N_G = [*others, tie]
    for name in ADVANTAGES:
        if name == "maxrl":
            rewards_N_G = [[abs(reward) for reward in group] for group in rewards_N_G]
        found_N_G = by_name(name, rewards_N_G)
        for group, found_G in zip(rewards_N_G, found_N_G, strict=True):
            spread = max(group) - min(group)
            if spread == 0:
                assert found_G == [0.0] * len(group), name
            elif spread > 1e-3:
                assert len(found_G) == len(group)
                assert min(found_G) < 0 < max(found_G), name


@pytest.mark.parametrize("name", sorted(ADVANTAGES))
def test_a_tie_gives_no_signal_and_rewards_are_untouched(name: str) -> None:
    rewards_N_G = [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    assert by_name(name, rewards_N_G) == [[0.0] * 3] * 2
    assert rewards_N_G == [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
