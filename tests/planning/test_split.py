"""GPUs divided into samplers and learners: the estimate by hand, and where staleness pays."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from rl_lora.config import load_config, parse_config
from rl_lora.models.shapes import build_on_meta, known_config
from rl_lora.planning.cards import CARDS, Card
from rl_lora.planning.counts import ParameterCounts, parameter_counts
from rl_lora.planning.links import broadcast_s
from rl_lora.planning.speed import StepWork, step_time, step_work
from rl_lora.planning.split import best_split, split_time
from tests.helpers.tiny_models import small_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MEAN, TOKEN_S = 400 * (1 - math.exp(-2.5)), 3.548e-3
CACHE = 2**30


def by_ones(num_prompts: int = 8) -> StepWork:
    """A step whose engines decode one sequence at a time, at TOKEN_S a token.

    2 GB of weights take 2 ms, the engine 1.5 ms and the adapter 24 us in each of 2 layers.
    """
    sampling = {"num_prompts": num_prompts, "num_samples": 2, "max_tokens": 1000, "max_num_seqs": 1}
    config = parse_config({"sampling": sampling})
    card = Card("x", 1, 1000 / 0.66, 1 / 0.9, link_gb_s=1, peer_gb_s=1)
    counts = ParameterCounts(10**9, 10**9, 1, 0, 1, 1)
    return step_work(config, small_config(), counts, card)


def test_a_broadcast_is_passed_along_in_parts() -> None:
    # 3.9 GB over 0.78 x 50 GB/s, and 3 doublings from one GPU to all 8.
    assert broadcast_s(3.9e9, 7) == pytest.approx(0.1 + 60e-6)


def test_samplers_that_are_too_few_bound_the_step() -> None:
    work = by_ones()
    found = split_time(work, CACHE, 2, 1, max_staleness=1)
    # 16 completions of the mean length and 8 prompts, by two samplers.
    assert found.bound == "sampling"
    assert found.seconds == pytest.approx((16 * MEAN * TOKEN_S + 8 * 0.512e-3) / 2, rel=1e-4)


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_the_longest_completion_has_a_step_for_each_version(max_staleness: int) -> None:
    work = by_ones()
    found = split_time(work, CACHE, 32, 1, max_staleness)
    # The longest of 16 is cut at 1,000 tokens. Then the batch is learned, and handed over: 0.05 s,
    # and 5 doublings of 20 us.
    by_hand = 1000 * TOKEN_S + work.learn_s() + 0.05 + math.log2(33) * 20e-6
    assert found.bound == "longest completion"
    assert found.seconds == pytest.approx(by_hand / (max_staleness + 1), rel=1e-4)


def test_on_policy_samplers_and_learners_take_turns() -> None:
    work = by_ones()
    found = split_time(work, CACHE, 4, 1, max_staleness=0)
    sample_s = replace(work, num_ranks=4).sampling(1).total_s
    by_hand = sample_s + work.learn_s() + 0.05 + math.log2(5) * 20e-6
    assert found.seconds == pytest.approx(by_hand, rel=1e-6)


def test_learners_that_are_too_few_bound_the_step() -> None:
    work = by_ones()
    slow = replace(work, assumed=replace(work.assumed, learner=1e-6))
    found = split_time(slow, CACHE, 16, 1, max_staleness=4)
    assert found.bound == "learning"
    assert found.seconds == pytest.approx(slow.learn_s())


def test_no_split_has_more_samplers_than_groups_in_flight() -> None:
    assert best_split(by_ones(num_prompts=1), CACHE, 8, 1).num_samplers <= 2
    two = best_split(by_ones(), CACHE, 2, 4)
    assert (two.num_samplers, two.num_learners) == (1, 1)


def test_staleness_pays_from_some_number_of_gpus_on() -> None:
    """Qwen3-8B, 1,024 completions of up to 8,192 tokens: a batch that one GPU decodes for minutes
    is not bound by its longest completion, one that is divided among 64 GPUs is."""
    config = load_config(CONFIGS / "deepmath_qwen3_8b.toml")
    shape, card, cache = known_config(config.model.name), CARDS["h100"], 40 * 2**30
    assert shape is not None
    counts = parameter_counts(build_on_meta(shape), config.lora)
    work = step_work(config, shape, counts, card)
    today = {n: step_time(config, shape, counts, cache, card, n).total_s for n in (4, 64)}
    stale = {n: best_split(work, cache, n, 4).seconds for n in (4, 64)}
    assert stale[4] > 0.9 * today[4]
    assert stale[64] < 0.5 * today[64]
    # Each version more is a little faster, and none is slower.
    steps = [best_split(work, cache, 64, bound).seconds for bound in (0, 1, 2, 4)]
    assert steps == sorted(steps, reverse=True)
