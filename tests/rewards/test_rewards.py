"""The interface for the trainer: load_reward, scores, rules and user functions."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rewards import (
    RULES,
    STATUSES,
    RewardError,
    Score,
    load_reward,
    load_rules,
    score,
    score_batch,
    verify,
)

ROOT = Path(__file__).resolve().parents[2]


def test_reward_is_correctness_plus_format() -> None:
    with load_reward("math", format_weight=0.1) as reward:
        scores = reward.score_batch(
            ["\\boxed{42}", "the answer is 42", "\\boxed{41}", "none", "\\boxed{42"], ["42"] * 5
        )
    assert [s.reward for s in scores] == [1.1, 1.0, 0.1, 0.0, 0.0]
    assert [s.has_format for s in scores] == [True, False, True, False, False]
    assert [s.answer for s in scores][:3] == ["42", "42", "41"]


def test_scores_in_full() -> None:
    assert score("so \\boxed{42}", "42") == Score(1.0, True, "ok", "42", True)
    assert score("", "42") == Score(0.0, False, "no_answer", None, False)


def test_every_status_is_listed() -> None:
    assert {"ok", "no_answer", "unparsable", "timeout", "crashed", "limit"} <= set(STATUSES)


def test_unequal_lengths_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 completions but 1 references"):
        score_batch(["1", "2"], ["1"])


def test_an_empty_gold_is_an_error() -> None:
    with pytest.raises(ValueError, match="the gold answer is empty"):
        verify(" ", "1")


def test_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown reward 'mth': did you mean 'math'"):
        load_reward("mth")
    with pytest.raises(ValueError, match="unknown rules 'gsm': did you mean 'gsm8k'"):
        load_reward("math", rules="gsm")
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        load_reward("math", num_workers=0)
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        load_reward("math", timeout_s=0)


USER_MODULE = """
from rewards import Score

def length(completion, reference):
    return len(completion) / 10

def scored(completion, reference):
    return Score(0.5, False, "ok", completion, True)

def broken(completion, reference):
    raise KeyError("mine")

CONSTANT = 3
"""


@pytest.fixture
def user_module(write_module: Callable[[str, str], Path]) -> str:
    return write_module("my_reward_module", USER_MODULE).stem


def test_a_users_own_function(user_module: str) -> None:
    with load_reward(f"{user_module}:length") as reward:
        scores = reward.score_batch(["12345", "1234567890"], ["a", "b"])
    assert [(s.reward, s.correct) for s in scores] == [(0.5, False), (1.0, True)]
    assert load_reward(f"{user_module}:scored").score_batch(["x"], ["y"]) == [
        Score(0.5, False, "ok", "x", True)
    ]
    with pytest.raises(RewardError, match="broken raised KeyError: 'mine'"):
        load_reward(f"{user_module}:broken").score_batch(["x"], ["y"])


def test_a_users_mistakes_are_named(user_module: str) -> None:
    with pytest.raises(ValueError, match="no module 'no_such_module'"):
        load_reward("no_such_module:f")
    with pytest.raises(ValueError, match="has no function 'lenght'; did you mean 'length'"):
        load_reward(f"{user_module}:lenght")
    with pytest.raises(ValueError, match="has no function 'CONSTANT'"):
        load_reward(f"{user_module}:CONSTANT")
    with pytest.raises(ValueError, match="not of the form 'module:function'"):
        load_reward("module:")


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs the extra math-verify"
)
def test_math_verify_as_the_reward() -> None:
    with load_reward("math_verify", timeout_s=60) as reward:
        scores = reward.score_batch(["\\boxed{1/2}", "\\boxed{3}"], ["0.5", "0.5"])
    assert [s.correct for s in scores] == [True, False]


def test_rewards_import_neither_torch_nor_the_trainer_nor_sympy() -> None:
    code = (
        "import sys, rewards; rewards.verify('x^2', 'x x');"
        "print([m for m in ('torch', 'rl_lora', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("rules", "gold", "answer", "is_right"),
    [
        ("default", "1/3", "0.333", False),
        ("default", "1/3", "0.3333", True),
        ("default", "20/3", "6.67", True),
        ("math", "1/3", "0.333", False),
        ("math", "0.333", "1/3", True),
        ("gsm8k", "0.33", "1/3", True),
        ("default", "0.33", "1/3", False),
        ("aime", "073", "73", True),
        ("aime", "73", "073", True),
        ("aime", "73", "73.0", True),
        ("aime", "73", "73%", False),
        ("aime", "73", "1073", False),
        ("deepmath", "Yes", "\\text{Yes}", True),
        ("deepmath", "Yes", "yes.", True),
        ("deepmath", "No", "Yes", False),
        ("deepmath", "A", "(A)", True),
        ("default", "28\\%", "28", True),
        ("default", "k\\pi", "n\\pi", True),
        ("gsm8k", "1,000", "$1000", True),
    ],
)
def test_rules(rules: str, gold: str, answer: str, is_right: bool) -> None:
    assert verify(gold, answer, rules).correct == is_right


def test_each_field_of_the_rules_has_an_effect() -> None:
    from dataclasses import replace

    base = load_rules("default")
    assert not verify("2/3", "4/6", replace(base, accept_unreduced=False)).correct
    assert verify("2/3", "2/3", replace(base, accept_unreduced=False)).correct
    assert not verify("1, 2", "2, 1", replace(base, list_order="gold")).correct
    assert not verify("5", "x = 5", replace(base, accept_labels=False)).correct
    assert not verify("5 \\text{ cm}", "5", replace(base, units="strict")).correct
    assert not verify("k\\pi", "n\\pi", replace(base, rename_bound=False)).correct
    assert not verify("(0, 1)", "0 < x < 1", replace(base, relations_as_sets=False)).correct
    assert not verify(
        "\\frac{\\pi}{6}", "30^\\circ", replace(base, degrees_as_radians=False)
    ).correct
    assert not verify("Ann wins it all.", "Ann", replace(base, accept_short_text=False)).correct
    assert verify("f(x)", "f(y)", replace(base, rename_free=True)).correct
    assert verify("1/3", "0.33", replace(base, tolerance_decimals=2)).correct
    assert not verify("28\\%", "28", replace(base, percent="value")).correct


def test_rules_have_the_name_of_their_key() -> None:
    assert all(name == rules.name for name, rules in RULES.items())
