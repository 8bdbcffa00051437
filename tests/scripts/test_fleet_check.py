"""Predictions of jobs with samplers elsewhere, by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scaling.fleet_check import NUM_FIRST, Rates, plan_work, rates, row

# Four groups, whose longest completions take 10 decoding steps; all but sampling takes 1 s.
STEADY = Rates(token_s=0.1, other_s=1.0, lengths=[[[10, 5]] * 4] * 3)


@pytest.mark.parametrize(
    ("num_samplers", "max_staleness", "step_s", "idle"),
    [
        (1, 0, 4 + 1, 1 / 5),
        (2, 0, 2 + 1, 1 / 3),
        (4, 0, 1 + 1, 1 / 2),
        (2, 1, (4 + 1) / 2, 0),  # all work, on two cores
    ],
)
def test_steps_of_equal_groups(
    num_samplers: int, max_staleness: int, step_s: float, idle: float
) -> None:
    metrics = [{"time/step_s": step_s * 1.2, "fleet/idle_share": idle}] * 3
    found = row(STEADY, num_samplers, max_staleness, metrics)
    assert found.simulated_s == pytest.approx(step_s)
    # A run ends with the learner's last step, and has begun with samplers that all have work.
    assert found.simulated_idle == pytest.approx(idle, abs=0.04)
    assert found.is_predicted
    slower = [{"time/step_s": step_s * 1.4, "fleet/idle_share": idle}] * 3
    assert not row(STEADY, num_samplers, max_staleness, slower).is_predicted
    idler = [{"time/step_s": step_s, "fleet/idle_share": idle + 0.3}] * 3
    assert not row(STEADY, num_samplers, max_staleness, idler).is_predicted


def test_the_plan_gets_the_rates() -> None:
    work = plan_work(STEADY)
    assert work.learn_s() == pytest.approx(1.0)
    assert work.decode(8, 100).total_s == pytest.approx(0.1)
    assert work.mean_tokens == pytest.approx(7.5, rel=1e-6)


def test_rates_of_a_run(tmp_path: Path) -> None:
    """Two groups a step, of at most 4 and 6 tokens: ten decoding steps."""
    steps = range(1, NUM_FIRST + 4)
    metrics = [
        {"step": step, "system/sampler_s": 2.0, "time/sample_s": 2.1, "time/step_s": 3.0 + step}
        for step in steps
    ]
    transcripts = [
        {"step": step, "prompt_id": prompt, "tokens": tokens}
        for step in steps
        for prompt, tokens in [("a", 4), ("a", 1), ("b", 2), ("b", 6)]
    ]
    for name, rows in (("metrics", metrics), ("transcripts", transcripts)):
        text = "".join(json.dumps(one) + "\n" for one in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    found = rates(tmp_path)
    assert found.token_s == pytest.approx(0.2)
    assert found.other_s == pytest.approx(3.0 + NUM_FIRST + 2 - 2.1)  # the middle one of three
    assert found.lengths == [[[4, 1], [2, 6]]] * len(steps)
