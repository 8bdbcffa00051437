"""The simulation of samplers and learners, by hand where lengths are the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scaling import simulate as simulate_script
from scaling.cpu_check import CALIBRATION, Equal, Measured, calibrated, estimate, ratio
from scaling.curve import TODAY, Scenario, load_scenario, points, with_failures
from scaling.lengths import MEASURED_SIGMA, Lengths, fit, recorded, with_mean
from scaling.simulation import Design, simulate

from rl_lora.config import LoraSection
from rl_lora.planning.cards import CARDS
from rl_lora.planning.roofline import Assumptions
from tests.helpers.tiny_models import small_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

LONG = Lengths(mu=4.0, sigma=0.8, limit=400)


def design(**changes: Any) -> Design:
    """8 groups of 2 sequences of 10 tokens, each of which takes a second; learning takes 4 s."""
    same: dict[str, Any] = {
        "num_samplers": 2,
        "num_prompts": 8,
        "num_samples": 2,
        "max_staleness": 0,
        "num_slots": 100,
        "learn_s": 4.0,
        "lengths": lambda batch, group: [10, 10],
        "decode_s": lambda number, age: 1.0,
    }
    return Design(**same | changes)


def long_tailed(batch: int, group: int) -> list[int]:
    return [int(n) for n in LONG.draw((7, batch, group), 2)]


@pytest.mark.parametrize(
    ("max_staleness", "expected"),
    [
        (0, 10 + 4 + 1),  # sampling, learning, hand-over
        (1, (10 + 4 + 1) / 2),
        (2, (10 + 4 + 1) / 3),
        (4, 4),  # the learner always works
    ],
)
def test_a_step_of_equal_lengths(max_staleness: int, expected: float) -> None:
    found = simulate(design(max_staleness=max_staleness, hand_over_s=1.0), 130)
    assert found.step_s(num_first=10) == pytest.approx(expected, rel=1e-2)
    assert max(found.staleness) == max_staleness


def test_samplers_with_too_few_slots_bound_the_step() -> None:
    # Two samplers, a group at a time: 4 groups each, of 10 s.
    found = simulate(design(num_slots=2, max_staleness=3), 40)
    assert found.step_s(num_first=5) == pytest.approx(40)
    assert found.busy_s == pytest.approx(2 * found.ends[-1], rel=0.02)
    on_policy = simulate(design(num_slots=2), 40)
    assert on_policy.step_s() == pytest.approx(44)


def test_an_engine_slows_down_with_its_batch_and_with_age() -> None:
    # One sampler, one group of 4 and 8 tokens: 4 tokens by two, then 4 by one; a token takes a
    # tenth of a second for each sequence and nothing for age.
    one: dict[str, Any] = {"num_samplers": 1, "num_prompts": 1, "learn_s": 0.0}
    both = design(**one, lengths=lambda b, g: [4, 8], decode_s=lambda number, age: 0.1 * number)
    assert simulate(both, 1).ends == [pytest.approx(4 * 0.2 + 4 * 0.1)]
    # Rates change when a sequence starts or ends: at age 0, then at age 4.
    older = design(**one, lengths=lambda b, g: [4, 8], decode_s=lambda number, age: 1 + age)
    assert simulate(older, 1).ends == [pytest.approx(4 * 1 + 4 * 5)]
    prompts = design(**one, prefill_s=0.5)
    assert simulate(prompts, 3).ends == pytest.approx([10.5, 21.0, 31.5])


def test_shares_are_fixed_and_dispatching_is_not() -> None:
    # Groups 0 and 2 are long, so that the first of two samplers gets both of them.
    uneven: dict[str, Any] = {
        "num_prompts": 4,
        "num_slots": 2,
        "learn_s": 0.0,
        "lengths": lambda batch, group: [100, 100] if group % 2 == 0 else [10, 10],
    }
    assert simulate(design(**uneven, has_shares=True), 1).ends == [pytest.approx(200)]
    # The second one takes group 1 and then group 2.
    assert simulate(design(**uneven), 1).ends == [pytest.approx(110)]


def test_littles_law() -> None:
    """Sequences that run on average = those that start a second x the seconds that each takes."""
    steps = 60
    found = simulate(
        design(lengths=long_tailed, max_staleness=2, decode_s=lambda n, age: 0.1), steps
    )
    assert found.num_ended >= steps * 16
    tokens = [sum(sum(long_tailed(b, g)) for g in range(8)) for b in range(steps)]
    # Those of the last batches still run at the end, or were sampled ahead.
    assert found.sequences_s == pytest.approx(0.1 * sum(tokens), rel=0.06)
    rate = found.num_ended / found.ends[-1]
    each_s = 0.1 * sum(tokens) / (steps * 16)
    assert found.sequences_s / found.ends[-1] == pytest.approx(rate * each_s, rel=0.06)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_no_sample_is_staler_than_the_bound_and_none_is_lost_or_counted_twice(
    max_staleness: int,
) -> None:
    failing: dict[str, Any] = {"mean_s_to_failure": 300.0, "restart_s": 20.0, "hand_over_s": 2.0}
    found = simulate(
        design(num_samplers=4, lengths=long_tailed, max_staleness=max_staleness, **failing), 60
    )
    assert found.num_failures > 10
    assert found.num_lost > 0
    assert len(found.staleness) == 60 * 8
    assert 0 <= min(found.staleness) <= max(found.staleness) <= max_staleness


def test_a_failure_costs_time_and_its_group_is_sampled_again() -> None:
    # One sampler; in its first 12 s it finishes groups of 10 s or it does not.
    one: dict[str, Any] = {"num_samplers": 1, "num_prompts": 1, "learn_s": 0.0}
    calm = simulate(design(**one), 50)
    assert calm.ends[-1] == pytest.approx(500)
    found = simulate(design(**one, mean_s_to_failure=60.0, restart_s=5.0), 50)
    assert found.num_lost == found.num_failures > 0  # it is never idle but while it restarts
    # Sequences of lost groups had not ended, so that each group's two ended once.
    assert found.num_ended == 100
    # Each failure takes its restart and the 0 to 10 s that were lost.
    extra = found.ends[-1] - 500 - 5.0 * found.num_failures
    assert 0 < extra < 10 * found.num_failures
    again = simulate(design(**one, mean_s_to_failure=60.0, restart_s=5.0), 50)
    assert again == found
    other = simulate(design(**one, mean_s_to_failure=60.0, restart_s=5.0, seed=1), 50)
    assert other != found


def test_a_group_needs_room() -> None:
    with pytest.raises(ValueError, match="room for a whole group"):
        design(num_slots=1)


def test_lengths_that_are_cut() -> None:
    found = with_mean(3000, 0.65, 8192)
    assert found.mean == pytest.approx(3000)
    drawn = found.draw((0,), 200_000)
    assert drawn.max() == 8192
    assert drawn.mean() == pytest.approx(3000, rel=0.01)
    assert (drawn[:5] == found.draw((0,), 5)).all()
    assert with_mean(100, 0.0, 200).draw((0,), 3).tolist() == [100, 100, 100]
    with pytest.raises(ValueError, match="needs a limit above it"):
        with_mean(300, 0.5, 200)


def test_a_fit_knows_which_lengths_were_cut() -> None:
    drawn = Lengths(5.0, 0.7, 10**6).draw((3,), 4000)
    cut = np.minimum(drawn, 200).tolist()
    found = fit(cut, limit=200)
    assert found.mu == pytest.approx(5.0, abs=0.05)
    assert found.sigma == pytest.approx(0.7, abs=0.05)
    naive = np.log(cut)
    assert naive.std() < 0.55  # without knowing it
    # By hand: logarithms 1 and 3 have mean 2 and standard deviation 1.
    found = fit([round(math.exp(1) * 1000), round(math.exp(3) * 1000)], limit=10**6)
    assert found.mu == pytest.approx(2 + math.log(1000), abs=1e-3)
    assert found.sigma == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="too few to fit"):
        fit([8, 8, 8], limit=8)


def test_recorded_lengths(tmp_path: Path) -> None:
    path = tmp_path / "transcripts.jsonl"
    rows = [{"tokens": 5, "truncated": False}, {"tokens": 64, "truncated": True}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recorded(path) == ([5, 64], 64)
    path.write_text(json.dumps(rows[0]) + "\n")
    assert recorded(path) == ([5], 6)


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return load_scenario(CONFIGS / "deepmath_qwen3_8b.toml", CARDS["h100"], MEASURED_SIGMA)


def test_the_plans_estimate_is_near_the_simulation(scenario: Scenario) -> None:
    """The plan assumes exponential lengths with the same mean, and a steady state."""
    found = list(points(scenario, 16))
    assert [one.design for one in found] == [
        TODAY,
        *(f"divided, staleness {bound}" for bound in (0, 1, 2, 4)),
    ]
    for one in found:
        assert one.estimated_s == pytest.approx(one.step_s, rel=0.25)
    assert found[3].step_s < 0.8 * found[0].step_s  # staleness 2, and today's design
    assert [one.max_staleness for one in found[:4]] == [0, 0, 1, 2]


def test_failures_cost_time_and_no_batch(scenario: Scenario) -> None:
    for calm, failing in with_failures(scenario.with_prompts(8), 8, 60.0, 300.0):
        assert (calm.num_lost, failing.max_staleness) == (0, calm.max_staleness)
        assert failing.num_lost > 0
        assert failing.step_s > calm.step_s


@pytest.mark.slow
def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def called(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["simulate.py", *arguments])
        assert simulate_script.main() == 0
        return capsys.readouterr().out

    path = tmp_path / "transcripts.jsonl"
    rows = [{"tokens": tokens, "truncated": False} for tokens in (20, 148)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert called("lengths", str(path)).startswith("mu 3.996, sigma 1.001")  # log 20, log 148
    text = called("curve", "--largest", "2", "--out", str(tmp_path))
    assert "divided, staleness 4" in text
    found = json.loads((tmp_path / "curve.json").read_text())
    assert [row["num_gpus"] for row in found["own batch"]] == [1, 2, 2, 2, 2, 2]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_lengths_of_a_scenario_have_the_plans_mean(scenario: Scenario) -> None:
    lengths = scenario.lengths()
    drawn = [tokens for group in range(500) for tokens in lengths(0, group)]
    assert np.mean(drawn) == pytest.approx(scenario.work.mean_tokens, rel=0.02)
    assert lengths(3, 5) == lengths(3, 5) != lengths(3, 6)
    larger = scenario.with_prompts(128)
    assert larger.work.config.sampling.num_prompts == 128
    assert scenario.work.config.sampling.num_prompts == 64


def test_a_calibration_finds_the_rates_of_which_measurements_are_made() -> None:
    policy: Any = SimpleNamespace(
        model=SimpleNamespace(config=small_config()),
        lora=LoraSection(),
    )
    prompts: Any = [SimpleNamespace(token_ids=(1,) * 40), SimpleNamespace(token_ids=(1,) * 50)]
    true = Assumptions(
        products=0.03,  # 30 GFLOP/s
        bandwidth=1e9,
        attention_forward=0.03,
        attention_backward=0.03,
        learner=0.8,
        engine_step_s=1e-6,
        engine_sequence_s=0.0,
        lora_layer_s=0.0,
        hand_over_s=0.0,
        mean_share=1e6,
        prompt_tokens=45,
        number_bytes=4,
    )

    def made(size: Equal) -> Measured:
        found = estimate(policy, size, true)
        return Measured(size, found.sample_s, found.learn_s)

    found = calibrated(policy, prompts, [made(size) for size in CALIBRATION])
    for name in ("products", "engine_step_s", "learner"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-6), name
    other = Equal(3, 4, 20)
    assert ratio(made(other), estimate(policy, other, found)) == pytest.approx(1)
    # 12 sequences of 20 tokens: 20 steps, 12 x 20 tokens and 3 prompts of 2 FLOP a weight. Layers
    # have 576 weights and two norms of 8; the last norm has 8, embedding and lm_head 80 each.
    counted = (2 * (576 + 16) + 8 + 2 * 80) * 2 * (12 * 20 + 3 * 45) / 30e9
    assert made(other).sample_s == pytest.approx(20 * 1e-6 + counted, rel=1e-3)
