"""Extraction: which answer of a completion counts, in linear time."""

from __future__ import annotations

import time

import pytest

from rewards.extraction.extract import extract


@pytest.mark.parametrize(
    ("completion", "answer", "method"),
    [
        ("so \\boxed{42}.", "42", "boxed"),
        ("\\boxed{\\sqrt{\\frac{3}{4}}}", "\\sqrt{\\frac{3}{4}}", "boxed"),
        ("\\boxed 7", "7", "boxed"),
        ("\\boxed7", "7", "boxed"),
        ("\\boxed{}\\boxed{5}", "5", "boxed"),
        ("\\boxed{1}\\boxed{2}\\boxed{3}", "3", "boxed"),
        ("\\fbox{7}", "7", "boxed"),
        ("\\beginboxed{8\\sqrt6}", "8\\sqrt6", "boxed"),
        ("\x08oxed{5}", "5", "boxed"),
        ("\\boxed{1} then \\boxed{2}", "2", "boxed"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", "boxed"),
        ("\\boxed{1} and later { \\boxed{2}", "2", "boxed"),
        ("\\boxed{5} and then \\boxed{", "5", "boxed"),
        ("\\boxed{9} " * 400 + "\\boxed{42}", "42", "boxed"),
        ("work\n#### 1,234", "1,234", "hashes"),
        ("#### 10\nMore.\n#### 20", "20", "hashes"),
        ("####: 55", "55", "hashes"),
        ("#### 99 dollars.", "99 dollars.", "hashes"),
        ("<answer> 42 </answer>", "42", "tag"),
        ("Sum.\nA: 18", "18", "phrase"),
        ("The answer is 42.", "42", "phrase"),
        ("Answer: 42", "42", "phrase"),
        ("**Answer:** 42", "42", "phrase"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "$\\frac{1}{2}$", "phrase"),
        ("The answer to the question is 5.", "5", "phrase"),
        ("The answer is 3.5.", "3.5", "phrase"),
        ("So the correct option is B.", "B", "phrase"),
        ("It comes to **73** in all.", "73", "bold"),
        ("Hence $x = 5$ holds.", "x = 5", "math"),
        ("Hence \\(y\\) is \\[ 9 \\]", "9", "math"),
        ("So she has 18 eggs left over today.", "18", "math"),
        (
            "He pays $1,200 for the car and then $300 for the tyres, $1,500 in all now",
            "$1,500",
            "math",
        ),
        ("42", "42", "math"),
        ("<think>\\boxed{1}</think>\\boxed{2}", "2", "boxed"),
        ("thought\n</think>\nThe answer is 7.", "7", "phrase"),
        ("42<|im_end|>", "42", "math"),
        ("\\boxed{3}. The final answer is 4.", "4", "phrase"),
    ],
)
def test_extraction(completion: str, answer: str, method: str) -> None:
    found = extract(completion)
    assert found.answer == answer
    assert found.method == method


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "   ",
        "no idea at all, sorry",
        "<think>\\boxed{5}",
        "<think>x</think>",
        "####",
        "\\boxed{}",
    ],
)
def test_nothing_to_extract(completion: str) -> None:
    assert extract(completion).answer is None


def test_format_needs_a_real_balanced_box() -> None:
    assert extract("\\boxed{5}").has_format
    assert not extract("\\boxed 5").has_format
    assert not extract("\\fbox{5}").has_format
    assert not extract("\\boxed{5").has_format
    assert not extract("\\boxed{}").has_format
    assert not extract("<think>\\boxed{5}</think> 5").has_format


def test_joined_boxes_are_reported_not_merged() -> None:
    assert extract("\\boxed{1} and \\boxed{2}").joined == ("1", "2")
    assert extract("$\\boxed{1}$, $\\boxed{2}$ or $\\boxed{3}$").joined == ("1", "2", "3")
    assert extract("\\boxed{1} then \\boxed{2}").joined == ()
    assert extract("\\boxed{1}. So, after more work, \\boxed{2}").joined == ()


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "\\boxed{1} ",
        "{",
        "}",
        "$",
        "answer ",
        "the answer is ",
        "#",
        "*",
        "**1",
        "1/",
        "<think>",
        "\\(",
        "</answer>",
        "\\boxed{1} and ",
        ". ",
        "A: ",
        "oxed",
    ],
)
def test_time_is_linear(unit: str) -> None:
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        best = float("inf")
        for _ in range(3):
            start = time.thread_time()
            extract(text)
            best = min(best, time.thread_time() - start)
        return best

    small, large = seconds(50_000), seconds(400_000)
    assert large < 40 * small + 0.05  # quadratic time would be 64 times as long
    assert large < 1.0
