"""RUN/best: the best evaluation's adapter, whole through kills, and never of a step that will run
again."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_lora.config import EvalSection
from rl_lora.errors import UserError
from rl_lora.evaluation.best import (
    BestCheckpoint,
    best_evaluation,
    drop_best_after,
    keep_best,
    read_best,
)
from rl_lora.evaluation.intervals import exact_interval
from tests.helpers.evaluations import evaluate
from tests.helpers.fakes import FakeReward, FakeSampler, make_prompt


def run_evaluation(run: Path, step: int, num_correct: int) -> None:
    """An evaluation of four problems."""
    prompts = [make_prompt(f"s/{index}") for index in range(4)]
    sampler = FakeSampler(lambda prompt, _: "7" if int(prompt.prompt_id[2:]) < num_correct else "8")
    options = {"step": step, "folder": run / "eval", "name": f"step_{step:06d}"}
    evaluate(sampler, prompts, FakeReward(), EvalSection(), max_tokens=9, seed=0, **options)  # type: ignore[arg-type]


def publish(run: Path, step: int) -> Path:
    path = run / "adapters" / f"v{step:06d}"
    path.mkdir(parents=True)
    (path / "weights").write_text(str(step))
    return path


def weights_of(run: Path) -> str:
    return (run / "best" / "weights").read_text()


def step(run: Path, number: int, num_correct: int) -> BestCheckpoint | None:
    run_evaluation(run, number, num_correct)
    return keep_best(run, publish(run, number), number)


def test_the_best_evaluation_is_kept_and_the_earliest_on_ties(tmp_path: Path) -> None:
    assert best_evaluation(tmp_path, 9) is None
    assert read_best(tmp_path) is None
    assert step(tmp_path, 0, 1) is not None
    low, high = exact_interval(3, 4)
    choice = step(tmp_path, 10, 3)
    assert choice == BestCheckpoint(10, "step_000010", 0.75, low, high, 4, 1)
    assert step(tmp_path, 20, 2) is None
    assert step(tmp_path, 30, 3) is None
    assert weights_of(tmp_path) == "10"
    assert read_best(tmp_path) == choice
    assert keep_best(tmp_path, tmp_path / "adapters" / "v000010", 10) is None  # already there
    assert best_evaluation(tmp_path, 9) == best_evaluation(tmp_path, 0)


def test_pruning_the_published_versions_does_not_touch_it(tmp_path: Path) -> None:
    step(tmp_path, 5, 2)
    (tmp_path / "adapters" / "v000005" / "weights").unlink()
    assert weights_of(tmp_path) == "5"


def test_a_replacement_that_a_kill_cut_short(tmp_path: Path) -> None:
    step(tmp_path, 5, 2)
    kept = read_best(tmp_path)
    # Killed between the two renames: the old one waits under its other name.
    (tmp_path / "best").rename(tmp_path / ".best.replaced")
    (tmp_path / ".best.99").mkdir()
    assert read_best(tmp_path) == kept
    assert weights_of(tmp_path) == "5"
    step(tmp_path, 6, 4)
    assert weights_of(tmp_path) == "6"
    assert [path.name for path in tmp_path.glob(".best*")] == []


def test_a_resumed_run_drops_what_it_runs_again(tmp_path: Path) -> None:
    step(tmp_path, 5, 2)
    step(tmp_path, 10, 3)
    assert not drop_best_after(tmp_path, 10)
    assert drop_best_after(tmp_path, 7)
    assert not (tmp_path / "best").exists()
    assert not drop_best_after(tmp_path, 7)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    step(tmp_path, 5, 2)
    (tmp_path / "best" / "best.json").write_text('{"step": 5}')
    with pytest.raises(UserError, match=r"best\.json is damaged"):
        read_best(tmp_path)


def test_a_record_of_an_earlier_version_says_what_was_renamed(tmp_path: Path) -> None:
    step(tmp_path, 5, 2)
    (tmp_path / "best" / "best.json").rename(tmp_path / "best" / "choice.json")
    with pytest.raises(UserError, match=r"choice\.json is best\.json now") as caught:
        read_best(tmp_path)
    assert "damaged" not in str(caught.value)
    assert "delete" in str(caught.value)
