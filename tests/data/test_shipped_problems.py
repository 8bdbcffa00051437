"""The shipped jobs' problems, which their published figures belong to, stay the same ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from rl_lora.config import load_config
from rl_lora.data.collect import Item, collect


def digest(items: Sequence[Item]) -> str:
    lines = (f"{item.prompt_id} {item.row.question}" for item in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "training", "held_out"),
    [
        ("quickstart", "e1624487508d77d6", "be8524b718a33d6d"),  # of two training sets
        ("smoke", "5f463d2ceffd16d0", "29e2f1b0c6cbe618"),
    ],
)
def test_a_shipped_job_has_the_problems_of_its_figures(
    name: str, training: str, held_out: str
) -> None:
    config = load_config(Path(name))
    found = collect(config.data, config.run.seed)
    assert (digest(found.train), digest(found.eval)) == (training, held_out)
