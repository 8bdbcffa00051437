"""The estimate of a step's time, by hand on sizes and cards with round numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from rl_lora.config import RunConfig, parse_config
from rl_lora.errors import UserError
from rl_lora.planning.cards import CARDS, Card, card_of_device, find_card
from rl_lora.planning.counts import ParameterCounts
from rl_lora.planning.roofline import learner_token_s, shape_of, weights_read
from rl_lora.planning.speed import step_time
from tests.helpers.tiny_models import small_config

SMALL = small_config()
# A rate of 10^12 products and bytes a second, once the shares that are reached are taken off.
PRODUCTS, BYTES = 1 / 0.66, 1 / 0.9
AT_ONCE = 1e12  # takes no time


def job(**sections: Any) -> RunConfig:
    return parse_config(sections)


def counts(base: int, active: int | None = None) -> ParameterCounts:
    return ParameterCounts(base, active or base, 1, 0, 1, 1)


def test_learning_bound_by_products() -> None:
    card = Card("x", 1, PRODUCTS, AT_ONCE, 1)
    # A layer: q, o 8x8; k, v 8x4; gate, up, down 8x16: 576 weights, 2 FLOP each, there and back.
    layers, head = learner_token_s(job(), shape_of(SMALL), card, context=0)
    assert layers == pytest.approx(2 * (2 * 2 * 576) / 1e12)
    assert head == pytest.approx(4 * 80 / 1e12)
    again = job(optim={"checkpoint_activations": True})
    layers, head = learner_token_s(again, shape_of(SMALL), card, context=0)
    assert layers == pytest.approx(2 * (3 * 2 * 576) / 1e12)
    full = job(lora={"mode": "full"}, model={"dtype": "float32"})
    layers, head = learner_token_s(full, shape_of(SMALL), card, context=0)
    assert layers == pytest.approx(2 * (3 * 2 * 576) / 1e12)
    assert head == pytest.approx(6 * 80 / 1e12)
    # Attention over 100 keys: 4 x 8 x 100 FLOP forward, 10 x 8 x 100 backward.
    longer, _ = learner_token_s(full, shape_of(SMALL), card, context=100)
    peak = 1e12 / 0.66
    assert longer - layers == pytest.approx(2 * (3200 / (0.35 * peak) + 8000 / (0.3 * peak)))


def test_learning_bound_by_bytes() -> None:
    card = Card("x", 1, AT_ONCE, BYTES, 1)
    # Linear layers take 8 + 2 x 8 + 8 + 2 x 8 + 16 = 64 elements, and make as many:
    # 8 + 2 x 4 + 8 + 2 x 16 + 8.
    linear, adapter = 2 * (64 + 64), (64 + 2 * 64) + (3 * 64 + 2 * 64)
    forward = 8 * 8 + 4 * 8 + 4 * 4 + 3 * 16
    backward = 17 * 8 + 8 * 8 + 6 * 4 + 5 * 16
    layers, head = learner_token_s(job(), shape_of(SMALL), card, context=0)
    assert layers == pytest.approx(2 * 2 * (linear + adapter + forward + backward) / 1e12)
    assert head == pytest.approx(5 * 2 * 10 / 1e12)


def test_a_step_of_two_sequences_one_after_the_other() -> None:
    sampling = {"num_prompts": 1, "num_samples": 2, "max_tokens": 1000, "max_num_seqs": 1}
    config = job(sampling=sampling)
    card = Card("x", 1, 1000 * PRODUCTS, BYTES, link_gb_s=1.25)
    found = step_time(config, SMALL, counts(10**9), cache_bytes=2**20, card=card)
    # 2 GB of weights take 2 ms a step, the engine 1.5 ms and the adapter 24 us in each of 2 layers.
    # The first sequence has the mean length; the last, of mean 400 if uncut, ends at 400 x 0.577.
    # The prompt takes 2 x 256 x 10^9 products.
    mean = 400 * (1 - math.exp(-2.5))
    by_hand = (mean + 400 * 0.577) * 3.548e-3 + 0.512e-3
    assert found.sample_s == pytest.approx(by_hand, rel=1e-4)
    assert found.mean_tokens == pytest.approx(mean)
    assert found.switch_s == pytest.approx(4.0)  # 2 GB there and back at 0.8 of 1.25 GB/s
    assert found.num_at_once == 1
    layers, head = learner_token_s(config, shape_of(SMALL), card, 256 + mean)
    tokens = 2 * mean
    by_hand = ((tokens + 256) * layers + tokens * head) / 0.75
    assert found.learn_s == pytest.approx(by_hand)
    assert found.learner_tokens_s == pytest.approx(tokens / by_hand)
    # An adapter of one weight: its 8 bytes over the link take no time.
    assert found.hand_over_s == pytest.approx(0.05)
    assert found.total_s == pytest.approx(found.sample_s + by_hand + 4.05)


def test_the_phases_of_a_step() -> None:
    """16 sequences together: half of them run until age 400 log 2, the rest is the long tail."""
    sampling = {"num_prompts": 4, "num_samples": 4, "max_tokens": 1000}
    config = job(sampling=sampling)
    # The KV cache of 16 sequences is small next to 2 GB of weights, which take 2 ms.
    found = step_time(config, SMALL, counts(10**9), 2**30, Card("x", 1, AT_ONCE, BYTES, 1e9))
    parts = found.sampling
    # Half die by 277 tokens; the integral has 200 points up to the limit of 1000.
    decoding = 277 / 5 // 1 * 5
    assert parts.bandwidth_s == pytest.approx(decoding * 2e-3, rel=2e-3)
    assert parts.launches_s == pytest.approx(decoding * 1.548e-3)
    assert parts.products_s == 0
    assert parts.tail_s == pytest.approx((1000 - decoding) * 3.548e-3, rel=2e-3)
    assert sum(found.phases.values()) == pytest.approx(found.total_s)
    assert found.total_s == pytest.approx(found.sample_s + found.learn_s + 0.05)
    assert found.bottleneck == "long tail"
    # Where products take longer than bytes, decoding is bound by them: 2 x 16 x 10^9 a token.
    found = step_time(config, SMALL, counts(10**9), 2**30, Card("x", 1, PRODUCTS, AT_ONCE, 1e9))
    assert found.sampling.products_s == pytest.approx(
        sum(0.032 * math.exp(-(point + 0.5) * 5 / 400) * 5 for point in range(55)), rel=1e-6
    )
    assert found.sampling.bandwidth_s == 0
    # Where neither takes time, by the host: 25 us a sequence.
    found = step_time(config, SMALL, counts(10**9), 2**30, Card("x", 1, AT_ONCE, AT_ONCE, 1e9))
    assert found.sampling.host_s == pytest.approx(
        sum(16 * 25e-6 * math.exp(-(point + 0.5) * 5 / 400) * 5 for point in range(55)), rel=1e-6
    )
    assert found.sampling.bandwidth_s == found.sampling.products_s == 0


def test_the_share_of_the_peak() -> None:
    config = job(sampling={"num_prompts": 1, "num_samples": 2, "max_tokens": 1000})
    found = step_time(config, SMALL, counts(10**9), 2**30, Card("x", 1, 1000, 1, 1), num_ranks=1)
    tokens = 2 * 400 * (1 - math.exp(-2.5)) + 256
    assert found.learner_mfu == pytest.approx(4e9 * tokens / 1e15 / found.learn_s)


def test_sequences_that_do_not_fit_wait() -> None:
    def at_once(cache_bytes: int, **sampling: Any) -> int:
        config = job(sampling={"num_prompts": 4, "num_samples": 4, "max_tokens": 1000, **sampling})
        return step_time(config, SMALL, counts(10**9), cache_bytes, CARDS["h100"]).num_at_once

    # A token takes 2 x 2 layers x 4 x 2 = 32 bytes; a sequence has 367, and a quarter of a prompt.
    sequence = 32 * (400 * (1 - math.exp(-2.5)) + 256 / 4)
    assert at_once(int(5.5 * sequence)) == 5
    assert at_once(int(50 * sequence)) == 16
    assert at_once(int(50 * sequence), max_num_seqs=7) == 7
    # All 16 at once decode up to the limit of 256 tokens. By fours, three fours of a mean length
    # come first, and the longest of the last four has mean 102.4 x (log 4 + 0.577).
    fast, slow = (
        step_time(
            job(sampling={"num_prompts": 4, "num_samples": 4, "max_num_seqs": width}),
            SMALL,
            counts(10**9),
            2**30,
            CARDS["h100"],
        ).sample_s
        for width in (16, 4)
    )
    steps = 3 * 102.4 * (1 - math.exp(-2.5)) + 102.4 * (math.log(4) + 0.577)
    assert slow / fast == pytest.approx(steps / 256, rel=1e-2)


def test_a_mixture_reads_the_experts_that_are_used() -> None:
    mixture = shape_of(
        Qwen3MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
    )
    of = counts(base=1000, active=300)
    assert weights_read(mixture, of, batch=1) == pytest.approx(300)
    # Of 8 experts with 700 / 0.75 weights, a second token leaves 0.75 x 0.75 idle.
    assert weights_read(mixture, of, batch=2) == pytest.approx(1000 - 700 * 0.75)
    assert weights_read(mixture, of, batch=1000) == pytest.approx(1000)
    assert mixture.linears()[-1] == (16, 2048, 2)


def test_cards() -> None:
    assert find_card("H100") is CARDS["h100"]
    assert card_of_device("NVIDIA H100 80GB HBM3") is CARDS["h100"]
    assert card_of_device("NVIDIA GeForce RTX 4090") is CARDS["4090"]
    assert card_of_device("Tesla T4") is None
    assert CARDS["h200"].num_bytes == 139 * 2**30
    with pytest.raises(UserError, match=r"--gpu: did you mean 'h100'\?"):
        find_card("h10")
