"""The benchmark's workload and its comparison with the baseline."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmarks import our_arms, run
from benchmarks.workload import Size

from rl_lora.samplers.vllm.sampler import VllmSampler
from rl_lora.types import SampleParams

RATIOS = {
    *("step_vs_trl", "learn_vs_trl", "memory_vs_trl", "learner_share_of_peak"),
    *("sampling_lora_vs_base", "lora_vs_full_flops", "lora_vs_full_time"),
}


def test_lengths_are_fixed_spread_out_and_within_the_cap() -> None:
    lengths = Size().lengths()
    assert lengths == Size().lengths()
    assert len(lengths) == 128
    assert 6 <= min(lengths) < 20
    assert max(lengths) == 96
    assert sum(lengths) == 4890


def test_no_group_ties() -> None:
    size = Size(num_prompts=2, num_samples=3)
    assert size.rewards() == [0.0, 1.0, 0.0, 1.0, 0.0, 1.0]


def test_the_baseline_holds_every_ratio_with_its_command_and_spread() -> None:
    baseline = json.loads((Path(run.__file__).parent / "baseline.json").read_text("utf-8"))
    assert set(baseline["ratios"]) == RATIOS == set(baseline["spread"])
    assert "bench_step" in baseline["command"]
    for name, (low, high) in baseline["spread"].items():
        assert low <= baseline["ratios"][name] <= high


@pytest.mark.parametrize(
    ("name", "now", "is_lost"),
    [
        ("step_vs_trl", 4.4, False),  # 5 / 4.4 - 1 = 13.6 %
        ("step_vs_trl", 4.3, True),  # 16.3 %
        ("memory_vs_trl", 5.7, False),  # more memory is worse: 14 %
        ("memory_vs_trl", 5.8, True),
        ("memory_vs_trl", 1.0, False),
    ],
)
def test_a_loss_of_over_15_per_cent_is_named(name: str, now: float, is_lost: bool) -> None:
    lines = run.compare({name: now}, {name: 5.0})
    assert bool(lines) is is_lost
    assert all(line.startswith(name) for line in lines)


def test_a_ratio_that_was_not_measured_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "has_trl", lambda: False)
    assert run.compare({}, {"step_vs_trl": 5.0}) == []
    assert run.compare({}, {"lora_vs_full_flops": 0.67}) == [
        "lora_vs_full_flops: not measured, baseline 0.67"
    ]


def test_lengths_are_fixed_in_the_samplers_own_call() -> None:
    made = SimpleNamespace()
    asked = []

    def original(params: SampleParams, stops: object, seed: int) -> SimpleNamespace:
        asked.append((params.max_tokens, stops, seed))
        return made

    sampler = SimpleNamespace(_sampling_params=original)
    size = Size(num_prompts=1, num_samples=2, max_tokens=9)
    our_arms.fix_lengths(sampler, size)
    theirs = list(inspect.signature(VllmSampler._sampling_params).parameters)[1:]
    assert list(inspect.signature(sampler._sampling_params).parameters) == theirs
    sampler._sampling_params(SampleParams(2, 9, 1.0), "stops", 7)
    assert asked == [(size.lengths()[0], "stops", 7)]
    assert made.ignore_eos
    assert made.stop_token_ids == []
