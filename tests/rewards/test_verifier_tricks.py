"""Authored answers: equal ones in many spellings, unequal ones, and tricks that are wrong."""

from __future__ import annotations

import pytest

from rewards import GradingRules, score, verify
from tests.helpers.verifier_cases import EQUAL, TRICKS, UNEQUAL, pairs


@pytest.mark.parametrize(("gold", "answer"), pairs(EQUAL))
def test_equal_answers_are_equal_both_ways(gold: str, answer: str) -> None:
    assert verify(gold, answer).correct
    assert verify(answer, gold).correct


@pytest.mark.parametrize(("gold", "answer"), pairs(UNEQUAL))
def test_unequal_answers_are_unequal_both_ways(gold: str, answer: str) -> None:
    assert not verify(gold, answer).correct
    assert not verify(answer, gold).correct


@pytest.mark.parametrize(("gold", "answer"), pairs(TRICKS))
def test_tricks_earn_nothing(gold: str, answer: str) -> None:
    assert not verify(gold, answer).correct
    assert not score(f"Therefore \\boxed{{{answer}}}.", gold).correct


def test_there_are_enough_tricks() -> None:
    assert len(pairs(TRICKS)) >= 150


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("<think>It is \\boxed{42}.", "42"),
        ("<think>It is \\boxed{42}.</think>", "42"),
        ("<think>It is \\boxed{42}.</think> I do not know.", "42"),
        ("<think>no</think> x <think> \\boxed{42}", "42"),
        ("It is \\boxed{41} or \\boxed{42}", "42"),
        ("It is \\boxed{41}, \\boxed{42}", "42"),
        ("\\boxed{41} and \\boxed{42}", "42"),
        ("\\boxed{42} ... so finally \\boxed{41}", "42"),
        ("\\boxed{42", "42"),
        ("\\boxed{}", "42"),
        ("\\boxed{ }", "42"),
        ("", "42"),
        ("The answer is", "42"),
        ("#### 41\n#### ", "42"),
        ("The answer is 41 or 42.", "42"),
        ("The answer is either 41 or 42", "42"),
        ("The answer is not 42.", "42"),
        ("Compute 6 \\cdot 7 = ?\n\\boxed{?}", "42"),
        ("Evaluate $\\int_0^2 x dx$. \\boxed{\\int_0^2 x dx}", "2"),
        ("\\boxed{41}<|im_end|>\\boxed{42}", "42"),
    ],
)
def test_completions_that_earn_nothing(completion: str, reference: str) -> None:
    assert not score(completion, reference).correct


def test_a_gold_that_is_a_task_equals_itself() -> None:
    assert verify(r"\gcd(a, b)", r"\gcd(a,b)").correct
    assert verify(r"\sum_{k=0}^{n} F_k F_{n-k}", r"\sum_{k=0}^{n} F_{n-k} F_k").correct
    assert not verify(r"\sum_{k=0}^{n} F_k", r"\sum_{k=0}^{n-1} F_k").correct


@pytest.mark.parametrize(
    ("gold", "answer", "status"),
    [
        ("5", "3 = 5", "contradictory"),
        ("2", r"\int_0^2 x dx", "unevaluated"),
        ("2", "9" * 5000, "limit"),
        ("2", "(" * 200 + "2" + ")" * 200, "limit"),
        ("2", "\\frac{1}{", "unparsable"),
        ("2", "3", "ok"),
    ],
)
def test_status_says_why(gold: str, answer: str, status: str) -> None:
    verdict = verify(gold, answer)
    assert not verdict.correct
    assert verdict.status == status


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("5 = 1\n1 = -1\n\\boxed{5 + 1 - 1 = -5 + 1 =", "1"),
        ("0 = -1\n\\boxed{0 - 0 = 0\n\\boxed{0 + 0 = 0\n\\boxed{0 - 0", "0"),
        ("0 + 0 = 0\n\\boxed{0 + 8 = 8", "8"),
        ("6 = 3\n8 = 2 (due to 8 = 3*2)\n7 = ", "7"),
        ("7 + 9 = -2\n-1 = -2\n\\boxed{7 + 2", "2"),
        ("First some steps.\nSo we get 7 + 2", "2"),
        ("First some steps.\nSo we get 7 - 2", "-2"),
        ("First some steps.\nSo we get 3 * 5", "5"),
        ("First some steps.\nSo x = 7 +", "7"),
        ("7 = 8\n0 = 1\nundefined\n1 = -1", "-1"),
        ("First some steps.\n3 = 5.", "5"),
        ("First some steps.\n3 = 5.", "3"),
        ("What is 3 + 4?", "4"),
        ("What is 3 + 4? 7 or 8", "7"),
        ("What is 3 + 4? 3 + 4", "7"),
    ],
)
def test_a_truncated_or_false_ending_earns_nothing(completion: str, gold: str) -> None:
    """Policies in training were rewarded for such endings, most of them at the token limit."""
    assert not score(completion, gold, rules="gsm8k").correct


@pytest.mark.parametrize(
    ("completion", "gold"),
    [
        ("First some steps.\nSo we get 7 + 2 = 9", "9"),
        ("First some steps.\nSo we get -2", "-2"),
        ("2 + 2 = 4\n4 + 2 = 6\n6 = 6\n", "6"),
        ("First some steps.\n-6 = -6", "-6"),
        ("First some steps.\nx = 6", "6"),
        ("What is 3 + 4? 7", "7"),
        ("What is 3 + 4 - 2? 3 + 4 - 2 = 5", "5"),
        ("First some steps.\n20 - 10 = 10 dollars left", "10"),
        ("20 - 10 = 10 dollars left", "10"),
        ("Of her 20 dollars she keeps 3 -- and that is all she has.", "3"),
    ],
)
def test_a_result_without_an_announcement_counts(completion: str, gold: str) -> None:
    assert score(completion, gold, rules="gsm8k").correct


def test_contradicting_boxes_are_named() -> None:
    assert score("\\boxed{41} or \\boxed{42}", "42").status == "contradictory"
    assert score("nothing here", "42").status == "ok"
    assert score("<think>", "42").status == "no_answer"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("8", "5 + 7 + 4 - 8"),
        ("15", r"5 \times 3"),
        ("15", "(5)(3)"),
        ("-5", "2 - 7"),
        ("1/2", "1/4 + 1/4"),
        ("12", "x = 5 + 7"),
        ("19", "7 + 12 = QQQ"),
        ("19", "7 + 12 = a + b"),
        ("19", "f(2) = 7 + 12"),
        ("19", "P(A) = 7 + 12"),
        ("(1, 2)", "(1, 1 + 1)"),
        ("5 cm", "2 + 3 cm"),
        ("8", r"\frac{5 + 7 + 4}{2}"),
    ],
)
def test_unevaluated_arithmetic_does_not_answer_a_number(gold: str, answer: str) -> None:
    """A policy in training found that it could copy the question into the box."""
    assert verify(gold, answer).status == "unevaluated"
    assert not score(f"\\boxed{{{answer}}}", gold).correct
    assert verify(gold, answer, rules=GradingRules(accept_sums=True)).correct


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("12", "5 + 7 = 12"),
        ("1024", "2^{10}"),
        ("600000000", r"6 \times 10^8"),
        ("2.5", r"2\frac12"),
        ("3/2", "6/4"),
        ("60.7^\\circ", "60^\\circ 42'"),
        (r"\sqrt{2} + 1", r"1 + \sqrt{2}"),
        ("1 + 1/2", "3/2"),
        ("3x + 2", "2 + 3x"),
    ],
)
def test_values_as_they_stand_are_answers(gold: str, answer: str) -> None:
    assert verify(gold, answer).correct
