"""Generated completions that state an answer, and some that only seem to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import score
from rewards.extraction.extract import extract
from rewards.extraction.thinking import after_thinking
from rewards.grading import Grader
from rewards.load import load_reward
from tests.helpers.statement_cases import (
    LANGUAGES,
    LANGUAGES_LETTER,
    LANGUAGES_NOT_STATED,
    NOT_STATED,
    NOT_STATED_LETTER,
    NOT_STATED_NUMBER,
    STATED,
    STATED_LETTER,
    STATED_NUMBER,
    THINKING,
    fill,
    templates,
)

MANY = settings(max_examples=300, deadline=None)

numbers = st.integers(2, 10**6)
decimals = st.builds(
    lambda whole, part: f"{whole}.{part:02}", st.integers(2, 999), st.integers(1, 99)
)
letters = st.sampled_from("ABCDE")


def two_of(values: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[str, str]]:
    """Two values, neither of which contains or rounds to the other."""
    pairs = st.tuples(values, values).map(lambda pair: (str(pair[0]), str(pair[1])))
    return pairs.filter(lambda pair: pair[0] not in pair[1] and pair[1] not in pair[0])


two_numbers = two_of(numbers)
two_values = st.one_of(two_numbers, two_of(decimals), two_of(letters))
two_letters = two_of(letters)


def check(template: str, pair: tuple[str, str], *, is_stated: bool) -> None:
    completion = fill(template, *pair)
    found = score(completion, pair[0])
    assert found.correct == is_stated, (completion, found)
    if is_stated:
        assert not score(completion, pair[1]).correct, completion


@MANY
@given(st.sampled_from(templates(STATED)), two_values)
def test_stated_answers_are_found(template: str, pair: tuple[str, str]) -> None:
    check(template, pair, is_stated=True)


@MANY
@given(st.sampled_from(templates(STATED_NUMBER)), two_numbers)
def test_stated_numbers_are_found(template: str, pair: tuple[str, str]) -> None:
    check(template, pair, is_stated=True)


@MANY
@given(st.sampled_from(templates(STATED_LETTER)), two_letters)
def test_stated_options_are_found(template: str, pair: tuple[str, str]) -> None:
    check(template, pair, is_stated=True)


@MANY
@given(st.sampled_from(templates(NOT_STATED)), two_values)
def test_answers_that_are_not_stated_earn_nothing(template: str, pair: tuple[str, str]) -> None:
    check(template, pair, is_stated=False)


@MANY
@given(st.sampled_from(templates(NOT_STATED_NUMBER)), two_numbers)
def test_numbers_that_are_not_stated_earn_nothing(template: str, pair: tuple[str, str]) -> None:
    check(template, pair, is_stated=False)


@MANY
@given(st.sampled_from(templates(NOT_STATED_LETTER)), two_letters)
def test_options_that_are_not_stated_earn_nothing(template: str, pair: tuple[str, str]) -> None:
    check(template, pair, is_stated=False)


DIGITS = [
    "0123456789",
    "٠١٢٣٤٥٦٧٨٩",
    "۰۱۲۳۴۵۶۷۸۹",
    "०१२३४५६७८९",
    "০১২৩৪৫৬৭৮৯",
    "０１２３４５６７８９",
]


@MANY
@given(st.sampled_from(templates(LANGUAGES)), two_numbers, st.sampled_from(DIGITS), st.booleans())
def test_other_languages(
    template: str, pair: tuple[str, str], digits: str, has_work_before: bool
) -> None:
    work = f"We have {pair[1]} here.\n\n" if has_work_before else ""
    written = tuple(value.translate(str.maketrans(DIGITS[0], digits)) for value in pair)
    completion = work + fill(template, *written)
    assert score(completion, pair[0]).correct, completion
    assert not score(completion, pair[1]).correct, completion


@MANY
@given(st.sampled_from(templates(LANGUAGES_LETTER)), two_letters)
def test_options_in_other_languages(template: str, pair: tuple[str, str]) -> None:
    check(template, pair, is_stated=True)


@MANY
@given(st.sampled_from(templates(LANGUAGES_NOT_STATED)), two_numbers)
def test_negations_in_other_languages(template: str, pair: tuple[str, str]) -> None:
    check(template, pair, is_stated=False)


inner = st.sampled_from(
    ["{}", "\\boxed{{{}}}", "The answer is {}.", "<answer>{}</answer>", "#### {}\n"]
)


@MANY
@given(st.sampled_from(THINKING), inner, inner, two_numbers)
def test_only_text_outside_the_thinking_counts(
    tags: tuple[str, str], thought: str, said: str, pair: tuple[str, str]
) -> None:
    opening, closing = tags
    thought, said = thought.format(pair[1]), said.format(pair[0])
    whole = opening + thought + closing + said
    assert score(whole, pair[0]).correct, whole
    assert not score(whole, pair[1]).correct, whole
    for unsaid in (opening + thought + closing, opening + thought, opening + thought + said):
        assert not score(unsaid, pair[1]).correct, unsaid
        assert extract(unsaid).answer is None
    if "channel" not in opening and not opening.startswith("analysis"):
        prompted = thought + closing + said  # the opening tag was part of the prompt
        assert score(prompted, pair[0]).correct, prompted
        assert not score(prompted, pair[1]).correct, prompted


def test_a_quoted_tag_is_ignored() -> None:
    assert after_thinking("`<think>` opens it. 5") == "`<think>` opens it. 5"
    assert after_thinking("<think>I write `</think>` soon. 4</think>5") == "5"
    assert after_thinking("<think>never <think> twice </think>5") == "5"


def test_text_before_a_later_thought_counts() -> None:
    assert extract("\\boxed{5}<think>or \\boxed{6}?</think>").answer == "5"
    assert extract("\\boxed{5}</think><think>x</think>").answer is None


def test_custom_thinking_tags() -> None:
    completion = "<plan>\\boxed{5}</plan>"
    assert extract(completion).answer == "5"
    assert extract(completion, (("<plan>", "</plan>"),)).answer is None
    with Grader(thinking_tags=(("<plan>", "</plan>"),)) as grader:
        assert grader.score_batch([completion + "6"], ["6"])[0].correct
        assert not grader.score_batch([completion], ["5"])[0].correct
    for tags in [("<plan>", "<plan>"), ("", "</plan>"), ("a", "b")]:
        with pytest.raises(ValueError, match="thinking tags"):
            load_reward("math", thinking_tags=(tags,))


@pytest.mark.parametrize(
    "completion",
    [
        "The roots are \\boxed{{{}}} and \\boxed{{{}}}.",
        "The smaller root is \\boxed{{{}}} and the larger root is \\boxed{{{}}}.",
        "$x_1 = \\boxed{{{}}}$ and $x_2 = \\boxed{{{}}}$.",
        "$x = \\boxed{{{}}}$, $y = \\boxed{{{}}}$",
        "\\boxed{{{}}} apples and \\boxed{{{}}} pears",
        "x is \\boxed{{{}}} while y is \\boxed{{{}}}",
        "- $x = \\boxed{{{}}}$\n- $y = \\boxed{{{}}}$",
        "\\boxed{{{}}} or \\boxed{{{}}}",
    ],
)
def test_boxes_joined_by_words_answer_a_gold_with_several_values(completion: str) -> None:
    assert score(completion.format(3, 5), "3, 5").correct
    assert not score(completion.format(3, 6), "3, 5").correct
    assert not score(completion.format(3, 5), "3").correct


@pytest.mark.parametrize(
    ("completion", "gold", "is_right"),
    [
        ("\\boxed{\\frac{1}{2}} (or 0.5)", "1/2", True),
        ("\\boxed{\\frac{1}{2}} (or 0.6)", "1/2", False),
        ("Thus $m+n = 256+37 = 293$.", "293", True),
        ("Thus $m+n = 256+37 = 293$.", "256", False),
        ("\\boxed{m+n = 293}", "293", True),
        ("No, it does not converge.", "No", True),
        ("No, it does not converge.", "Yes", False),
        ("We test the ratio. The limit is 2 > 1. No, it does not converge.", "No", True),
        ("So, yes, it does converge.", "Yes", True),
        ("No, wait, yes.", "no", False),
        ("No, wait, yes.", "yes", True),
        ("The answer is yes, since 2>1.", "Yes", True),
        ("The answer is not yes.", "Yes", False),
        ("The statement is **True**.", "True", True),
        ("The statement is not true.", "True", False),
        ("The statement is not true.", "False", True),
        ("The claim is false, since 2>1.", "False", True),
        ("The statement is either true or false.", "False", False),
        ("The answer is 1, 2, 3, ...", "1,2,3", False),
        ("The answers are 2 and 3.", "2, 3", True),
        ("The answer is Evelyn.", "Evelyn", True),
        ("The winner is **Evelyn**.", "Evelyn", True),
        ("The answer is no solution.", "no solution", True),
        ("\\begin{aligned}2x&=30\\\\x&=15\\end{aligned}", "15", True),
        ("\\begin{align} x &= 3 \\\\ y &= 5\\end{align}", "3, 5", True),
        ("\\begin{align} x &= 3 \\\\ y &= 5\\end{align}", "5", False),
        ("The total amount at first is \\boxed{32} hectares.", "32", True),
        ("<|channel|>final<|message|>6<|return|><|start|>user<|message|>5", "5", False),
    ],
)
def test_single_statements(completion: str, gold: str, is_right: bool) -> None:
    assert score(completion, gold).correct == is_right


def test_text_after_the_box_does_not_affect_the_format() -> None:
    assert extract("\\boxed{x^2}\n**Answer: D**").has_format
    assert extract("\\boxed{5}. Let me know.").has_format
    assert not extract("\\boxed{5}. The final answer is 6.").has_format
    assert not extract("\\boxed{5} \\boxed{}").has_format
    assert not extract("\\framebox{5}").has_format
    assert not extract("[THINK]\\boxed{5}[/THINK] 5").has_format
