"""Reward rises: the whole loop on the smoke job.

The reward is one that any working policy gradient raises in a few steps, the share of sevens in an
answer: right sums, the smoke job's own reward, take 60 steps (LOG.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from rl_lora.config import load_config
from rl_lora.train import train

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.toml"


def share_of_sevens(completion: str, reference: str) -> float:
    digits = [character for character in completion if character.isdigit()]
    return digits.count("7") / len(digits) if digits else 0.0


@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_the_smoke_runs_reward_rises(tmp_path: Path, mode: str) -> None:
    overrides = [
        f"run.output_dir={tmp_path}",
        f"lora.mode={mode}",
        f"optim.lr={1e-3 if mode == 'lora' else 3e-4}",
        "reward.name=tests.test_learning:share_of_sevens",
        "run.num_steps=15",
        "sampling.max_tokens=32",
    ]
    outcome = train(load_config(SMOKE, overrides), quiet=True)
    lines = (outcome.folder / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward/mean"] for line in lines]
    assert fmean(rewards[-3:]) > 1.5 * fmean(rewards[:3])
    assert fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.05
