"""`rl-lora grade`: files, figures, disagreements, mistakes."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import pytest

from rewards import load_reward
from rl_lora.commands.grade import Disagreement, add_arguments, grade_file, run
from rl_lora.config import EvalSection
from rl_lora.errors import UserError
from rl_lora.evaluation.intervals import exact_interval
from tests.helpers.evaluations import evaluate
from tests.helpers.fakes import FakeReward, FakeSampler, make_prompt


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS: list[dict[str, object]] = [
    {"completion": "so \\boxed{42}", "reference": "42", "label": True},
    {"completion": "so \\boxed{41}", "reference": "42", "label": False},
    {"completion": "so \\boxed{1/2}", "reference": "0.5", "label": False},
    {"completion": "so \\boxed{7}", "reference": "8", "label": True},
    {"completion": "<think> I", "reference": "8", "label": False},
]


def test_figures_by_hand(tmp_path: Path) -> None:
    report = grade_file(write(tmp_path / "a.jsonl", ROWS))
    assert (report.num, report.num_correct, report.num_compared) == (5, 2, 5)
    assert report.accuracy == 3 / 5
    assert report.precision == 1 / 2
    assert report.recall == 1 / 2
    assert report.statuses == {"ok": 4, "no_answer": 1}
    assert [(d.where, d.verdict, d.expected) for d in report.disagreements] == [
        ("line 3", True, False),
        ("line 4", False, True),
    ]


def test_other_field_names_and_no_labels(tmp_path: Path) -> None:
    report = grade_file(write(tmp_path / "a.jsonl", [{"answer": "\\boxed{5}", "gold": 5}]))
    assert report.num_correct == 1
    assert report.judge is None
    assert report.accuracy is None


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the extra math-verify"
)
def test_against_math_verify(tmp_path: Path) -> None:
    report = grade_file(write(tmp_path / "a.jsonl", ROWS), against="math_verify", timeout_s=60)
    assert report.judge == "math_verify"
    assert report.num_compared == 5
    assert report.accuracy == 1.0


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def test_run_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, {"completion": "\\boxed{[red]9[/red]}", "reference": "8", "label": True}]
    path, out = write(tmp_path / "a.jsonl", rows), tmp_path / "report.json"
    assert run(arguments(str(path), "--json", str(out), "--show", "3")) == 0
    printed = capsys.readouterr().out
    assert "2 of 6 correct" in printed
    assert "3 disagreements" in printed
    assert json.loads(out.read_text())["recall"] == 1 / 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"completion": "5", "gold": "5"}\n[' + "[" * 100_000, "line 2 is not JSON: nested too"),
        ('{"completion": null, "gold": "5"}', "line 1: 'completion', the completion, is null"),
        ('{"completion": ["5"], "gold": "5"}', "'completion', the completion, is a list"),
        ('{"completion": "5", "gold": {"a": 5}}', "'gold', the reference, is an object"),
        ('{"completion": "5", "gold": []}', "line 1: the reference is empty"),
        ("[1]", "line 1: not a JSON object"),
        ('{"text": "5", "gold": "5"}', "line 1: no completion; expected a string under one of"),
        ('{"completion": "5"}', "line 1: no reference"),
        ('{"completion": "5", "gold": " "}', "line 1: the reference is empty"),
        (
            '{"completion": "5", "gold": "5", "label": 1}',
            "the label is 1; it must be true or false",
        ),
        ("\n\n", "has no completions"),
    ],
)
def test_bad_files_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        run(arguments(str(path)))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0c", "\x1c", "\r"])
def test_only_line_feeds_end_a_line(tmp_path: Path, mark: str) -> None:
    row = {"completion": f"so{mark}\\boxed{{42}}", "reference": "42"}
    text = json.dumps(row, ensure_ascii=mark < " ")
    (tmp_path / "a.jsonl").write_bytes(f"\ufeff{text}\r\n\n{text}\n".encode())
    report = grade_file(tmp_path / "a.jsonl")
    assert (report.num, report.num_correct) == (2, 2)


def test_another_encoding_names_the_file(tmp_path: Path) -> None:
    text = '{"completion": "5", "gold": "5"}\n{"completion": "caf\u00e9", "gold": "5"}\n'
    (tmp_path / "a.jsonl").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"a\.jsonl: line 2 is not UTF-8 text \(byte 0xe9\)"):
        grade_file(tmp_path / "a.jsonl")


def test_numbers_and_their_lengths(tmp_path: Path) -> None:
    digits = "7" * 5000
    rows = f'{{"completion": "\\\\boxed{{{digits}}}", "gold": {digits}}}\n'
    rows += '{"completion": "\\\\boxed{51}", "gold": 51.0}\n{"completion": 5, "gold": [4, 5]}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    assert grade_file(tmp_path / "a.jsonl").num_correct == 3


def test_unknown_names_are_user_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="did you mean 'math'"):
        run(arguments(str(path), "--reward", "maths"))
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        run(arguments(str(path), "--policy", "gsm8"))
    with pytest.raises(UserError, match="no such file"):
        run(arguments(str(tmp_path / "none.jsonl")))


# --- evaluations
# ----------------------------------------------------------------------------------------


def write_evaluation(folder: Path, identity: dict[str, object]) -> Path:
    """Two problems, two samples each; the fake reward takes 0.5 for wrong where 1/2 is asked."""
    prompts = [make_prompt("s/0", "7"), make_prompt("s/1", "1/2")]
    sampler = FakeSampler(
        {"s/0": ["\\boxed{7}", "\\boxed{8}"], "s/1": ["\\boxed{0.5}", "\\boxed{[red]9[/red]}"]}
    )
    section = EvalSection(num_samples=2, temperature=1.0)
    options = {"max_tokens": 99, "seed": 0, "folder": folder, "identity": identity}
    evaluate(sampler, prompts, FakeReward(), section, **options)  # type: ignore[arg-type]
    return folder / "eval.jsonl.gz"


def test_an_evaluation_is_graded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_evaluation(tmp_path, {"reward_policy": "math"}), tmp_path / "report.json"
    report = grade_file(path)
    assert report.old is not None
    assert report.new is not None
    assert (report.reward, report.policy) == ("math", "math")
    assert (report.old.accuracy, report.new.accuracy) == (1 / 4, 2 / 4)
    # Two problems with half their samples right each: four that count (clustered_interval).
    assert (report.new.accuracy_low, report.new.accuracy_high) == exact_interval(2, 4)
    changed = Disagreement("s/1, sample 1", "1/2", "0.5", True, False, "ok")
    assert report.disagreements == (changed,)
    before = path.read_bytes()
    assert run(arguments(str(path), "--json", str(out))) == 0
    printed = capsys.readouterr().out
    assert "accuracy (avg@2) 25.0% (" in printed
    assert "-> 50.0% (6.8 to 93.2)" in printed
    assert "1 of 4 verdicts changed" in printed
    assert "s/1" in printed
    assert json.loads(out.read_text())["disagreements"][0]["verdict"] is True
    assert path.read_bytes() == before
    assert grade_file(tmp_path / "eval.json", policy="gsm8k").policy == "gsm8k"


def test_an_evaluation_is_graded_again_with_its_own_thinking_tags(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path, {"thinking_tags": [["\\boxed{7", "</7>"]]})
    new = grade_file(path).new
    assert new is not None
    assert new.accuracy == 1 / 4  # 0.5; the right 7 opens a thought that never ends


def test_an_evaluation_with_equal_verdicts_has_no_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [make_prompt("s/0", "7")]
    with load_reward("math") as reward:
        sampler = FakeSampler({"s/0": ["\\boxed{7}"]})
        options = {"max_tokens": 99, "seed": 0, "folder": tmp_path}
        evaluate(sampler, prompts, reward, EvalSection(), **options)  # type: ignore[arg-type]
    assert run(arguments(str(tmp_path / "eval.jsonl.gz"))) == 0
    assert "0 of 1 verdicts changed" in capsys.readouterr().out


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the extra math-verify"
)
def test_an_evaluation_against_another_judge(tmp_path: Path) -> None:
    report = grade_file(write_evaluation(tmp_path, {}), against="math_verify", timeout_s=60)
    assert (report.num, report.num_compared, report.num_correct) == (4, 4, 2)
    assert report.accuracy == 1.0


def test_evaluations_that_cannot_be_graded(tmp_path: Path) -> None:
    path = write_evaluation(tmp_path, {"reward": "os:system"})
    with pytest.raises(
        UserError, match=r"was graded by 'os:system'; to import that code, pass it as --reward"
    ):
        run(arguments(str(path)))
    (tmp_path / "empty.jsonl.gz").touch()
    with pytest.raises(UserError, match="has no problems yet"):
        run(arguments(str(tmp_path / "empty.jsonl.gz")))
    with pytest.raises(UserError, match="no such evaluation"):
        run(arguments(str(tmp_path / "none.jsonl.gz")))
