"""Reward rises: the smoke run learns."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from rl_lora.config import load_config
from rl_lora.train import train

SMOKE = Path(__file__).resolve().parents[1] / "configs" / "smoke.toml"


def test_the_smoke_runs_reward_rises(tmp_path: Path) -> None:
    outcome = train(load_config(SMOKE, [f"run.output_dir={tmp_path}"]), quiet=True)
    lines = (outcome.folder / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward/mean"] for line in lines]
    assert fmean(rewards[-3:]) > fmean(rewards[:3]) + 0.1
    assert outcome.before is not None
    assert outcome.after is not None
    assert outcome.after.accuracy > outcome.before.accuracy
