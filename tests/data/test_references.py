"""References with alternatives: whichever fits best counts, wherever completions are graded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from rewards import Score, load_reward
from rl_lora.commands.grade import grade_file
from rl_lora.config import DataSection
from rl_lora.data.chats import finish_solution
from rl_lora.data.references import SEPARATOR, alternatives
from rl_lora.prompts import load_prompt_sets
from rl_lora.rollouts import score_groups
from rl_lora.scoring import score_best
from rl_lora.types import Completion, Prompt
from tests.helpers.fakes import FakeReward
from tests.test_prompts import word_tokenizer


class TableReward(FakeReward):
    """Reward by (completion, reference), and what was asked."""

    def __init__(self, table: dict[tuple[str, str], tuple[float, bool]]) -> None:
        self.table = table
        self.calls: list[list[tuple[str, str]]] = []

    def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]:
        pairs = list(zip(completions, references, strict=True))
        self.calls.append(pairs)
        return [
            Score(*self.table.get(pair, (0.0, False)), "ok", f"{pair[1]}", has_format=False)
            for pair in pairs
        ]


def test_alternatives_come_back() -> None:
    assert SEPARATOR.join(["1/2", "0.5"]) == "1/2 ||| 0.5"
    assert alternatives("1/2 ||| 0.5") == ["1/2", "0.5"]
    assert alternatives("|x|||y|") == ["|x|||y|"]
    assert alternatives("") == [""]


def test_the_best_alternative_counts_in_one_call() -> None:
    table = {("a", "1"): (0.2, False), ("a", "2"): (1.0, True), ("b", "3"): (0.5, False)}
    reward = TableReward(table)
    scores = score_best(reward, ["a", "b", "c"], ["1 ||| 2", "3", "4 ||| 5"])
    assert [(score.reward, score.correct) for score in scores] == [
        (1.0, True),
        (0.5, False),
        (0.0, False),
    ]
    assert [score.answer for score in scores] == ["2", "3", "4"]  # ties: the first
    assert reward.calls == [[("a", "1"), ("a", "2"), ("b", "3"), ("c", "4"), ("c", "5")]]


def test_a_right_answer_beats_a_larger_reward() -> None:
    reward = TableReward({("a", "1"): (2.0, False), ("a", "2"): (1.0, True)})
    assert score_best(reward, ["a"], ["1 ||| 2"])[0].correct


@pytest.mark.parametrize(
    ("answer", "reference", "correct"),
    [
        ("3", "3 ||| -3", True),
        ("-3", "3 ||| -3", True),
        ("4", "3 ||| -3", False),
        ("3, -3", "3 ||| -3", False),
        ("3, -3", "3, -3", True),
        ("3", "3, -3", False),
        ("0.5", r"1/2 ||| \frac{1}{2}", True),
    ],
)
def test_rollouts_and_files_are_graded_by_alternatives(
    tmp_path: Path, answer: str, reference: str, correct: bool
) -> None:
    text = f"so \\boxed{{{answer}}}"
    completion = Completion((1,), text, (0.0,), is_truncated=False, adapter_version=0)
    with load_reward("math") as reward:
        (group,) = score_groups([Prompt("p/0", "p", "q", reference, (1,))], [[completion]], reward)
    assert group.rewards_G == [float(correct)]
    row = {"completion": text, "reference": alternatives(reference)}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert grade_file(tmp_path / "a.jsonl").num_correct == correct


def test_prompts_tell_how_many_rows_have_alternatives(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": ["3", "-3"] if i == 1 else ["5"]} for i in range(4)]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSection(train=str(path), held_out=1)  # type: ignore[arg-type]
    sets = load_prompt_sets(data, word_tokenizer(), 1000, 10, 0)
    assert sets.notes[0].endswith("; 1 with several answers, any of which counts")
    assert {p.reference for p in (*sets.train, *sets.eval)} == {"5", "3 ||| -3"}


def test_a_worked_solution_ends_in_the_first_alternative() -> None:
    assert finish_solution("so", "3 ||| -3", "Box it: \\boxed{}") == "so\n\\boxed{3}"
