"""The fixed workload: prompts, completion lengths and rewards of every arm.

16 of the quickstart's prompts, 8 samples each, completion lengths drawn once from a log-normal
(median 35, sigma 0.5, cut to 6..96): the spread of worked solutions. Rewards are fixed so that no
group ties and no arm gains by skipping sequences.
"""

from __future__ import annotations

import math
import os
import random
from dataclasses import dataclass
from pathlib import Path

from rl_lora.config import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
PATH = os.pathsep.join((str(ROOT), str(ROOT / "scripts")))  # of an arm's process


@dataclass(frozen=True)
class Size:
    """One point of the sweep.

    Example: Size(num_prompts=16, num_samples=8, max_tokens=96).
    """

    num_prompts: int = 16
    num_samples: int = 8
    max_tokens: int = 96
    rank: int = 1
    layers: str = "all"
    device: str = "cpu"

    def lengths(self) -> list[int]:
        """Completion lengths, tokens, prompt by prompt."""
        rng = random.Random(0)
        log_median = 3.55 + math.log(self.max_tokens / 96)
        count = self.num_prompts * self.num_samples
        return [
            min(self.max_tokens, max(6, int(rng.lognormvariate(log_median, 0.5))))
            for _ in range(count)
        ]

    def rewards(self) -> list[float]:
        """1 for every second sample of a group, else 0."""
        return [float(i % 2) for i in range(self.num_prompts * self.num_samples)]


# A step on a GPU takes long enough to be measured with this many tokens.
SIZES = {
    "cpu": Size(),
    "cuda": Size(num_prompts=32, num_samples=16, max_tokens=1024, device="cuda"),
}
SETTINGS: dict[str, dict[str, object]] = {
    # A compiled engine samples 6 % faster, but its process is 125 MiB larger, 0.517 of TRL's peak
    # (LOG.md).
    "cpu": {"sampling.eager": "true"},
    # Two engines and two learners share the card.
    "cuda": {
        "model.dtype": "bfloat16",
        "optim.microbatch_tokens": 16_384,
        "sampling.memory_fraction": 0.3,
    },
}


def config(size: Size, *, mode: str = "lora", **overrides: object) -> RunConfig:
    """The quickstart's settings at this size, those of SETTINGS for the device."""
    settings = {
        "run.name": "bench",
        "run.num_steps": 1000,
        "warm_start.num_steps": 0,
        "sampling.num_prompts": size.num_prompts,
        "sampling.num_samples": size.num_samples,
        "sampling.max_tokens": size.max_tokens,
        "model.device": size.device,
        "lora.mode": mode,
        "lora.rank": size.rank,
        "lora.layers": size.layers,
        "optim.schedule": "constant",
        **SETTINGS[size.device],
        **overrides,
    }
    return load_config(
        ROOT / "configs" / "quickstart.toml", [f"{k}={v}" for k, v in settings.items()]
    )
