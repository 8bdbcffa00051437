"""The benchmark's workload and its comparison with the baseline."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks import our_arms, run, trl_arm
from benchmarks.workload import SIZES, Size

from rl_lora.samplers.restarts import RestartingSampler
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


def test_speeds_by_hand() -> None:
    """128 completions of 4,890 tokens; 100 GFLOP at 200 GFLOP/s and a bound of 1.2 s, in 2 s and,
    by TRL, in 10 s."""
    needed = {"needed_gflop": 100.0, "peak_gflops": 200.0, "bound_s": 1.2}
    answers = {
        "learner": [needed | {"learn": seconds} for seconds in (2.0, 1.0, 8.0)],
        "trl": [{"learn": 10.0}],
        "flops": {},
    }
    assert run.speeds(Size(), answers) == {
        "learner": {"tokens_per_s": 2445, "mfu": 0.25, "roofline": 0.6},
        "trl": {"tokens_per_s": 489, "mfu": 0.05, "roofline": 0.12},
    }


def test_trls_settings_by_device() -> None:
    cpu, cuda = (trl_arm.trainer_options(SIZES[name], 60) for name in ("cpu", "cuda"))
    assert cpu["use_cpu"]
    assert not cpu["bf16"]
    assert "use_vllm" not in cpu
    assert (cpu["per_device_train_batch_size"], cpu["gradient_accumulation_steps"]) == (8, 16)
    assert "use_cpu" not in cuda
    assert cuda["bf16"]
    assert (cuda["use_vllm"], cuda["vllm_mode"]) == (True, "colocate")
    assert (cuda["vllm_max_model_length"], cuda["max_completion_length"]) == (1084, 1024)
    assert (cuda["per_device_train_batch_size"], cuda["gradient_accumulation_steps"]) == (16, 32)
    assert cpu.keys() < cuda.keys() | {"use_cpu"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_trl_has_these_settings(device: str) -> None:
    trl = pytest.importorskip("trl")
    names = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    assert trl_arm.trainer_options(SIZES[device], 60).keys() <= names


def test_trls_requests_get_the_lengths() -> None:
    params = SimpleNamespace(max_tokens=50, ignore_eos=False)
    params.clone = lambda: SimpleNamespace(**vars(params))
    asked = {}
    llm = SimpleNamespace(generate=lambda prompts, **keywords: asked.update(keywords))
    trl_arm.fix_requested(llm, [7, 9])
    llm.generate(["a", "b"], sampling_params=params, use_tqdm=False)
    assert not asked["use_tqdm"]
    found = [(one.max_tokens, one.ignore_eos) for one in asked["sampling_params"]]
    assert found == [(7, True), (9, True)]


def test_a_part_is_measured_by_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Base over adapter: 2 / 4, then 3 / 4 s; the first answer, 9 / 1, warms up."""
    pairs = [{"lora": 1.0, "base": 9.0}, *({"lora": 4.0, "base": base} for base in (2.0, 3.0))]
    answers = {"sample_both": iter(pairs)}
    started = []

    @contextlib.contextmanager
    def arms(names: list[str], *_: object) -> Iterator[dict[str, SimpleNamespace]]:
        started.append(names)
        yield {"ours": SimpleNamespace(ask=lambda command: next(answers[command]))}

    monkeypatch.setattr(run, "arms", arms)
    result = run.measure(Size(), 2, tmp_path, "sampling")
    assert started == [["ours"]]
    assert result["ratios"] == {"sampling_lora_vs_base": 0.625}
    assert result["spread"] == {"sampling_lora_vs_base": [0.5, 0.75]}
    assert result["speeds"] == {}


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


def test_a_share_of_the_peak_is_compared_on_one_kind_of_processor_only() -> None:
    baseline = {"ratios": {"learner_share_of_peak": 0.4, "step_vs_trl": 5.0}, "peak_gflops": 300.0}
    assert run.comparable({"peak_gflops": 330.0}, baseline) == baseline["ratios"]
    assert run.comparable({"peak_gflops": None}, baseline) == baseline["ratios"]
    assert run.comparable({"peak_gflops": 100.0}, baseline) == {"step_vs_trl": 5.0}
    assert (
        run.peak_gflops({"learner": [{"peak_gflops": n} for n in (90.0, 110.04, 130.0)]}) == 110.0
    )
    assert run.peak_gflops({"ours": []}) is None


def test_a_ratio_that_was_not_measured_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "has_trl", lambda: False)
    assert run.compare({}, {"step_vs_trl": 5.0}) == []
    assert run.compare({}, {"lora_vs_full_flops": 0.67}) == [
        "lora_vs_full_flops: not measured, baseline 0.67"
    ]


@pytest.mark.parametrize("is_replaceable", [False, True])
def test_lengths_are_fixed_in_the_samplers_own_call(is_replaceable: bool) -> None:
    made = SimpleNamespace()
    asked = []

    def original(params: SampleParams, stops: object, seed: int) -> SimpleNamespace:
        asked.append((params.max_tokens, stops, seed))
        return made

    sampler = SimpleNamespace(_sampling_params=original)
    size = Size(num_prompts=1, num_samples=2, max_tokens=9)
    outer: Any = sampler
    if is_replaceable:  # as in a run
        outer = RestartingSampler(
            lambda: sampler, max_restarts=0, timeout_s=1, on_restart=lambda text: None
        )
    our_arms.fix_lengths(outer, size)
    theirs = list(inspect.signature(VllmSampler._sampling_params).parameters)[1:]
    assert list(inspect.signature(sampler._sampling_params).parameters) == theirs
    sampler._sampling_params(SampleParams(2, 9, 1.0), "stops", 7)
    assert asked == [(size.lengths()[0], "stops", 7)]
    assert made.ignore_eos
    assert made.stop_token_ids == []
