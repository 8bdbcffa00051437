"""The learning rate that is steered by the measured KL."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rl_lora.batches import pack_samples
from rl_lora.config import RunConfig, RunSection, load_config
from rl_lora.config.sft import load_sft_config
from rl_lora.errors import UserError
from rl_lora.learner import Learner
from rl_lora.runs.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from rl_lora.schedule import Schedule
from tests.helpers.tiny_models import make_policy, random_llama
from tests.test_learner import samples_of


def test_the_factor_moves_by_half_outside_the_band_and_stays_within_a_hundred() -> None:
    schedule = Schedule("kl", target_kl=1e-3)
    for kl, expected in [(2.1e-3, 1 / 1.5), (2e-3, 1.0), (5e-4, 1.0), (4.9e-4, 1.5), (0.0, 1.5)]:
        assert schedule.adapted(1.0, kl) == pytest.approx(expected)
    assert schedule.adapted(0.012, 1.0) == 0.01
    assert schedule.adapted(80.0, 0.0) == 100.0
    assert schedule.adapted(1.0, math.nan) == schedule.adapted(1.0, math.inf) == 1 / 1.5


def test_the_factor_is_of_the_full_rate() -> None:
    schedule = Schedule("kl", warmup_steps=4, target_kl=1e-3)
    assert [schedule.rate(0.1, step, 2.0) for step in (1, 4, 9)] == pytest.approx([0.05, 0.2, 0.2])


def kl_learner(path: Path, lr: float = 1e-3, target_kl: float = 1e-4) -> Learner:
    return Learner(make_policy(path), lr, schedule=Schedule("kl", target_kl=target_kl))


def test_the_kl_is_of_the_policy_before_the_step_to_that_after_it(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    learner = kl_learner(path, lr=1e-2)
    before = samples_of(learner.policy)
    metrics = learner.update(pack_samples(before, microbatch_tokens=99))
    after = samples_of(learner.policy)
    moved = torch.tensor([
        new - old
        for pair in zip(before, after, strict=True)
        for old, new in zip(*(one.sampler_logprobs_T for one in pair), strict=True)
    ]).double()  # fmt: skip
    assert metrics["learn/step_kl"] == pytest.approx(
        float((moved.expm1() - moved).mean()), rel=1e-3
    )
    assert metrics["learn/step_kl"] > 1e-3


def test_a_rate_far_too_low_or_high_is_brought_to_the_target(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    for lr in (3e-6, 1e-3):
        learner = kl_learner(path, lr=lr)
        kls = []
        for _ in range(16):
            updates = pack_samples(samples_of(learner.policy), microbatch_tokens=99)
            rate = lr * learner.lr_factor
            metrics = learner.update(updates)
            assert metrics["optim/lr"] == rate
            kls.append(metrics["learn/step_kl"])
        assert not 1e-5 < kls[0] < 1e-3
        assert min(kls[-4:]) < 2e-4  # it has reached the band around 1e-4, from below or above
        assert max(kls[-4:]) > 5e-5


def test_steps_without_an_update_measure_and_change_nothing(tmp_path: Path) -> None:
    learner = kl_learner(random_llama(tmp_path / "model"))
    tied = pack_samples(samples_of(learner.policy, (0.0, 0.0)), microbatch_tokens=99)
    assert "learn/step_kl" not in learner.update(tied)
    assert learner.lr_factor == 1.0


def test_a_resumed_run_continues_with_the_same_rate(tmp_path: Path) -> None:
    path = random_llama(tmp_path / "model")
    config = RunConfig(run=RunSection(output_dir=str(tmp_path)))
    learner, resumed = kl_learner(path), kl_learner(path)
    samples = samples_of(learner.policy)

    def step(one: Learner) -> dict[str, float]:
        return one.update(pack_samples(samples, microbatch_tokens=99))

    step(learner)
    save_checkpoint(1, learner, config)
    checkpoint = latest_checkpoint(config.run.folder)
    assert checkpoint is not None
    load_checkpoint(checkpoint, resumed)
    assert resumed.lr_factor == learner.lr_factor != 1.0
    assert step(resumed) == step(learner)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.schedule=kl"], "schedule='kl' needs a target: set optim.target_kl"),
        (["optim.target_kl=1e-3"], "target_kl=0.001 has no effect with schedule='constant'"),
    ],
)
def test_the_target_belongs_to_the_schedule(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)


def test_supervised_jobs_have_no_kl_to_steer_by() -> None:
    with pytest.raises(UserError, match="is for RL, where a step has tokens of the policy's own"):
        load_sft_config(None, ["optim.schedule=kl", "optim.target_kl=1e-3"])
