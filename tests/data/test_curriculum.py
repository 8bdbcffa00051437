"""Pass rates: running ones that thin out a stream, and files of them that filter prompts."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rewards import Score
from rl_lora.config import DataSection
from rl_lora.data.curriculum import FLOOR, PassRates, draw_weight
from rl_lora.data.pass_rates import PassRate, write_pass_rates
from rl_lora.data.stream import PromptStream
from rl_lora.errors import UserError
from rl_lora.runs.metrics import rollout_metrics
from rl_lora.types import Prompt, Rollout, RolloutGroup
from tests.helpers.fakes import make_completion
from tests.test_prompts import ids, load, numbered, write_rows


def prompts_of(count: int) -> list[Prompt]:
    return [Prompt(str(i), "s", "q", "a", (1,)) for i in range(count)]


def group_of(prompt_id: str, num_correct: int, num_samples: int = 4) -> RolloutGroup:
    rollouts = [
        Rollout(make_completion(), Score(float(right), right, "ok", None, has_format=True))
        for right in (place < num_correct for place in range(num_samples))
    ]
    return RolloutGroup(Prompt(prompt_id, "s", "q", "a", (1,)), tuple(rollouts))


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(None, 1.0), (0.5, 1.0), (0.0, 0.1), (1.0, 0.1), (0.25, 0.1 + 0.9 * 0.75)],
)
def test_prompts_in_the_middle_have_the_largest_weight(rate: float, expected: float) -> None:
    assert draw_weight(rate) == pytest.approx(expected)


def test_a_rate_is_the_first_share_and_then_half_of_the_new_one() -> None:
    rates = PassRates(rates={"b": 0.25})
    rates.begin_draw()
    rates.add([group_of("a", 1), group_of("b", 4)])
    rates.begin_draw()
    rates.add([group_of("a", 3), group_of("a", 4)])  # 0.25, 0.5, 0.75
    rates.begin_draw()
    assert rates.state_dict()["rates"] == {"a": 0.75, "b": 0.625}


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_draw_knows_the_results_up_to_a_fixed_delay(delay: int) -> None:
    rates = PassRates(delay)
    for step in range(1, 6):
        for _ in range(delay + 1 if step == 1 else 1):  # as sampling runs ahead
            rates.begin_draw()
        assert set(rates.state_dict()["rates"]) == {str(done) for done in range(1, step)}
        rates.add([group_of(str(step), 2)])


def stream_of(count: int, rates: PassRates | None = None, seed: int = 0) -> PromptStream:
    return PromptStream(prompts_of(count), seed, curriculum=rates or PassRates())


def test_the_first_epoch_is_that_without_a_curriculum() -> None:
    plain, stream = PromptStream(prompts_of(12), 0), stream_of(12)
    for _ in range(3):
        taken = stream.take(4)
        assert ids(taken) == ids(plain.take(4))
        stream.observe([group_of(one, 4) for one in ids(taken)], stream.state_dict())


def test_solved_prompts_are_seldom_drawn_and_never_excluded() -> None:
    rates = PassRates(rates={str(i): 1.0 if i < 50 else 0.5 for i in range(100)})
    stream = stream_of(100, rates)
    counts: Counter[str] = Counter()
    while stream.epoch < 100:
        counts.update(ids(stream.take(10)))
        stream.observe([], stream.state_dict())
    solved = [counts[str(i)] for i in range(50)]
    assert all(counts[str(i)] in (100, 101) for i in range(50, 100))
    assert sum(solved) / 50 / 100 == pytest.approx(FLOOR, rel=0.1)
    assert min(solved) > 0


def test_a_take_repeats_nothing_and_ends_where_most_prompts_are_solved() -> None:
    stream = stream_of(10, PassRates(rates={str(i): float(i % 2) for i in range(10)}))
    for _ in range(20):
        assert len(set(ids(stream.take(8)))) == 8
        stream.observe([], stream.state_dict())


@pytest.mark.parametrize("weights", [{}, {"s": 2.0, "t": 1.0}])
@pytest.mark.parametrize("delay", [0, 2])
def test_a_stream_with_a_curriculum_resumes_exactly(weights: dict[str, float], delay: int) -> None:
    prompts = [Prompt(f"{s}{i}", s, "q", "a", (1,)) for s in "st" for i in range(9)]

    def outcome(step: int, taken: list[str]) -> list[RolloutGroup]:
        return [group_of(one, (step * 7 + int(one[1:])) % 5) for one in taken]

    def steps(stream: PromptStream, first: int, last: int) -> tuple[list[list[str]], Any]:
        """Draws are `delay` steps ahead of results, as with sampling.max_staleness."""
        under_way: list[tuple[list[str], dict[str, Any]]] = []
        taken, saved = [], {}
        for step in range(first, last + 1):
            while len(under_way) < delay + 1:
                under_way.append((ids(stream.take(4)), stream.state_dict()))
            drawn, position = under_way.pop(0)
            taken.append(drawn)
            saved = stream.observe(outcome(step, drawn), position)
        return taken, json.loads(json.dumps(saved))

    def new() -> PromptStream:
        return PromptStream(prompts, 3, weights, PassRates(delay))

    whole, _ = steps(new(), 1, 30)
    for stop in (1, 7):
        first, saved = steps(new(), 1, stop)
        resumed = new()
        resumed.load_state_dict(saved)
        rest, _ = steps(resumed, stop + 1, 30)
        assert first + rest == whole


def test_the_metrics_of_a_curriculum() -> None:
    state = PassRates(rates={"a": 0.5, "b": 1.0}).state_dict()
    metrics = rollout_metrics([group_of("a", 2)], {"curriculum": state})
    assert metrics["data/num_rated"] == 2
    assert metrics["data/pass_rate"] == 0.75
    assert metrics["data/draw_weight"] == pytest.approx(0.55)
    assert rollout_metrics([group_of("a", 2)], {"curriculum": PassRates().state_dict()})


# --- files ----------------------------------------------------------------------------------------


def write_rates(folder: Path, rates: dict[int, int]) -> str:
    path = folder / "rates.jsonl"
    write_pass_rates(
        path, [PassRate(f"m/{i}", f"q number {i}", correct, 4) for i, correct in rates.items()]
    )
    return str(path)


def test_prompts_outside_the_bounds_are_left_out(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "m.jsonl", numbered(8))
    evaluation = write_rows(tmp_path / "e.jsonl", ["other"])
    rates = write_rates(tmp_path, {0: 0, 1: 1, 2: 2, 3: 3, 4: 4})
    sets = load(
        train=data, eval=evaluation, pass_rates=rates, min_pass_rate=0.25, max_pass_rate=0.5
    )
    assert ids(sets.train) == ["m/1", "m/2", "m/5", "m/6", "m/7"]
    assert (
        "pass rates from 0.25 to 0.5: 5 of 8 training prompts, 3 of them without one" in sets.notes
    )
    below = load(train=data, eval=evaluation, pass_rates=rates, max_pass_rate=0.99)
    assert ids(below.train) == ["m/0", "m/1", "m/2", "m/3", "m/5", "m/6", "m/7"]
    begun = load(train=data, eval=evaluation, pass_rates=rates, curriculum="pass_rate")
    assert begun.pass_rates == {"m/0": 0.0, "m/1": 0.25, "m/2": 0.5, "m/3": 0.75, "m/4": 1.0}
    assert len(begun.train) == 8


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (None, "rates.jsonl does not exist; make it with `rl-lora pass-rates`"),
        ('{"prompt_id": "m/0"}', "line 1 of .* is not a pass rate: question: Field required"),
        ("[1]", "line 1 of .* is not a pass rate"),
        (
            '{"prompt_id": "m/0", "question": "q number 0", "num_correct": 5, "num_samples": 4}',
            "line 1 of .* has 5 correct of 4 samples",
        ),
        (
            '{"prompt_id": "m/0", "question": "old", "num_correct": 4, "num_samples": 4}',
            "has another question for m/0: the data have changed since; make the file again",
        ),
        (
            '{"prompt_id": "x/0", "question": "q", "num_correct": 4, "num_samples": 4}',
            "has none of the training prompts",
        ),
        (
            '{"prompt_id": "m/0", "question": "q number 0", "num_correct": 4, "num_samples": 4}',
            "no training prompt has a pass rate from 0 to 0.5; lower",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, line: str | None, message: str) -> None:
    data = write_rows(tmp_path / "m.jsonl", numbered(1))
    evaluation = write_rows(tmp_path / "e.jsonl", ["other"])
    path = tmp_path / "rates.jsonl"
    if line is not None:
        path.write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        load(train=data, eval=evaluation, pass_rates=str(path), max_pass_rate=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_pass_rate": 0.1}, "set data.pass_rates to a file"),
        ({"pass_rates": "x"}, "pass_rates has no effect by itself; set data.min_pass_rate"),
        ({"pass_rates": "x", "min_pass_rate": 0.9, "max_pass_rate": 0.1}, "is above max_pass_rate"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSection.model_validate({"train": "gsm8k", **settings})
