"""Penalties of length on rewards, and completions that are cut off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rewards import Score
from rl_lora.advantages import gdpo
from rl_lora.batches import make_samples, pack
from rl_lora.config import RunConfig, load_config
from rl_lora.config.algorithm import load_algorithm
from rl_lora.errors import UserError
from rl_lora.penalties import (
    loss_terms,
    overlong_penalty,
    penalised_rewards,
    step_advantages,
    term_rewards,
)
from rl_lora.train import train
from rl_lora.types import Completion, Episode, Prompt, Rollout, RolloutGroup
from tests.test_train import metrics_of, smoke

RIGHT = Score(reward=1.0, correct=True, status="ok", answer="1", has_format=True)
NO_LEARNER: Any = SimpleNamespace()


def group_of(lengths: list[int], max_tokens: int = 20) -> RolloutGroup:
    """A prompt whose right completions have these lengths; one of max_tokens is cut off."""
    return RolloutGroup(
        Prompt("p", "s", "q", "1", (1, 2)),
        tuple(
            Rollout(
                Completion(tuple(range(n)), "", (-1.0,) * n, is_truncated=n == max_tokens,
                           adapter_version=0),
                RIGHT,
            )
            for n in lengths
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("length", "expected"), [(0, 0.0), (12, 0.0), (13, 0.125), (16, 0.5), (19, 0.875), (20, 1.0)]
)
def test_the_penalty_rises_linearly_over_the_last_tokens(length: int, expected: float) -> None:
    assert overlong_penalty(length, max_tokens=20, within=8) == expected


def test_rewards_lose_the_penalty_and_the_groups_keep_theirs() -> None:
    overrides = ["sampling.max_tokens=20", "reward.overlong_tokens=8", "reward.overlong_weight=0.5"]
    groups = [group_of([4, 16, 20]), group_of([20])]
    rewards_N_G, metrics = penalised_rewards(load_config(None, overrides), NO_LEARNER, groups)
    assert rewards_N_G == [[1.0, 0.75, 0.5], [0.5]]
    assert metrics == {"reward/overlong_penalty": pytest.approx((0.25 + 0.5 + 0.5) / 4)}
    assert groups[0].rewards_G == [1.0, 1.0, 1.0]


def test_gdpo_gets_the_penalty_as_a_reward_with_its_weight() -> None:
    overrides = ["sampling.max_tokens=20", "reward.overlong_tokens=8", "reward.overlong_weight=0.5"]
    config = load_config(None, [*overrides, "algorithm.advantage=gdpo"])
    groups = [group_of([4, 16, 20])]
    terms = {term.name: (term.weight, term.rewards_N_G) for term in term_rewards(config, groups)}
    assert terms == {"reward": (1.0, [[1.0, 1.0, 1.0]]), "overlong": (0.5, [[0.0, -0.5, -1.0]])}
    # Only the length varies: (0, -0.5, -1) normalized, whatever the weight.
    (advantages,), metrics = step_advantages(gdpo, config, NO_LEARNER, groups)
    assert advantages == pytest.approx([1.5**0.5, 0.0, -(1.5**0.5)], abs=1e-5)
    assert metrics["advantage/correlation/overlong"] == pytest.approx(1)
    assert "advantage/correlation/reward" not in metrics


def test_a_term_that_does_not_apply_to_a_group_is_zero_there() -> None:
    config = load_config(None, ['reward.terms=["math", "format"]'])
    with_both = Score(1.5, True, "ok", "1", has_format=True, terms={"math": 1.0, "format": 1.0})
    only_math = Score(0.0, False, "ok", "1", has_format=True, terms={"math": 0.0})
    completion = Completion((7,), "", (-1.0,), is_truncated=False, adapter_version=0)
    groups = [
        RolloutGroup(Prompt("p", "s", "q", "1", (1, 2)), (Rollout(completion, score),) * 2)
        for score in (with_both, only_math)
    ]
    found = {term.name: term.rewards_N_G for term in term_rewards(config, groups)}
    assert found == {"math": [[1.0, 1.0], [0.0, 0.0]], "format": [[1.0, 1.0], [0.0, 0.0]]}


def test_without_a_penalty_there_is_no_metric_of_one() -> None:
    rewards_N_G, metrics = penalised_rewards(load_config(None), NO_LEARNER, [group_of([4, 20])])
    assert (rewards_N_G, metrics) == ([[1.0, 1.0]], {})


def test_a_completion_that_is_cut_off_is_in_neither_the_samples_nor_the_denominator() -> None:
    groups, advantages = [group_of([4, 20, 6])], [[1.0, -1.0, 0.5]]
    assert [s.advantage for s in make_samples(groups, advantages, skip_truncated=True)] == [1, 0.5]
    ((batch,),) = pack(groups, advantages, skip_truncated=True)
    assert batch.weights_C.tolist() == pytest.approx([1 / 10] * 10)
    assert pack([group_of([20])], [[1.0]], skip_truncated=True) == [[]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampling.max_tokens=20", "reward.overlong_tokens=21"], "is more than sampling.max_tok"),
        (["reward.overlong_tokens=8", "algorithm.advantage=maxrl"], "reward.overlong_tokens makes"),
        (
            ["algorithm.kl=reward", "algorithm.kl_weight=1", "algorithm.advantage=maxrl"],
            "and algorithm.kl='reward' makes them negative; remove it, or set .*='grpo'",
        ),
        (["algorithm.advantage=gdpo"], "only one; list them in reward.terms, or set .*='grpo'"),
        (
            [
                "algorithm.advantage=gdpo",
                'reward.terms=["math", "format"]',
                "algorithm.kl=reward",
                "algorithm.kl_weight=1",
            ],
            "'reward' would lose its scale; set algorithm.kl='loss'",
        ),
        (["algorithm.entropy_floor=0.3"], "has no effect with entropy_weight=0; set algorithm.ent"),
    ],
)
def test_penalties_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)


def test_the_entropy_is_raised_only_where_the_samples_have_less_than_the_floor() -> None:
    def config(*more: str) -> RunConfig:
        return load_config(None, ["algorithm.entropy_weight=0.1", *more])

    groups = [sampled_at([-0.5, -1.0]), sampled_at([], [-0.3])]  # mean 0.6 nats
    rollout, turns = groups[0].rollouts_G[0], Episode(("", "", ""), (True, False, True), None)
    answer = replace(rollout.completion, token_ids=(0, 1, 2), episode=turns)
    answer = replace(answer, sampler_logprobs_T=(-0.5, 0.0, -1.0))  # 0: an environment's token
    groups[0] = replace(groups[0], rollouts_G=(replace(rollout, completion=answer),))
    terms = load_algorithm(config().algorithm).terms
    assert loss_terms(config(), terms, groups) == (terms, {})
    for floor, weight in ((0.61, 0.1), (0.59, 0.0)):
        found, metrics = loss_terms(config(f"algorithm.entropy_floor={floor}"), terms, groups)
        assert found == {**terms, "entropy_weight": weight}
        assert metrics == {"entropy/sampled": pytest.approx(0.6), "entropy/weight": weight}
    assert terms["entropy_weight"] == 0.1


def sampled_at(*logprobs_G: list[float]) -> RolloutGroup:
    """A group of completions whose tokens the sampler gave these log-probs."""
    rollouts_G = [
        Rollout(Completion(tuple(range(len(one))), "", tuple(one), False, 0), RIGHT)
        for one in logprobs_G
    ]
    return RolloutGroup(Prompt("p", "s", "q", "1", (1, 2)), tuple(rollouts_G))


@pytest.mark.slow
def test_a_step_above_the_floor_is_one_without_the_bonus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)
    floor = ["algorithm.entropy_weight=0.5", "algorithm.entropy_floor=1e-6"]
    for name, more in (("without", []), ("above", floor)):
        train(smoke(tmp_path, f"run.name={name}", "data.held_out=2", *more), quiet=True)
    rows = metrics_of(tmp_path / "above")
    for row in rows:
        assert row.pop("entropy/sampled") == pytest.approx(row["entropy/mean"], rel=0.5)
        assert row.pop("entropy/weight") == 0
    assert rows == metrics_of(tmp_path / "without")
