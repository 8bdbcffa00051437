"""Tricks that a policy may find in training: spellings, words, signs, units, names.

Each table and generator contains both tricks and similar correct answers.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import GradingRules, score_batch, verify
from rewards.extraction.extract import extract
from rewards.parsing.units import read_unit
from tests.helpers.mutations import MUTATIONS
from tests.helpers.verifier_cases import GOLDS, OPEN, SHUT, pairs
from tests.helpers.verifier_generators import GENERATORS

CASES_AN_EXAMPLE = 25  # hypothesis draws only seeds, so that 2,000 cases per kind are cheap
MAX_MUTANTS_ACCEPTED = 0.001


@pytest.mark.parametrize(("gold", "answer"), pairs(OPEN))
def test_right_answers_pass_both_ways(gold: str, answer: str) -> None:
    assert verify(gold, answer).correct
    assert verify(answer, gold).correct


WITHIN = r"""
2.5 | 2.6
2.5 | 2.4
2.5 | \frac{49}{20}
2.5 m | 255 cm
\pi | 3.2
3.1 | \pi
7 | 6.95
2, 3 | 3.1, 1.9
x = 2.5 | 2.6
"""
BEYOND = r"""
2.5 | 2.61
2.5 | 2.39
2.5 m | 265 cm
2.5 m | 2.5 s
\pi | 3.3
3 | \pi
7 | 8
2, 3 | 3.2, 2
x = 2.5 | y = 2.6
"""


@pytest.mark.parametrize(("gold", "answer"), pairs(WITHIN))
def test_a_reference_may_state_its_tolerance(gold: str, answer: str) -> None:
    assert verify(f"{gold} [tolerance 0.1]", answer).correct
    (scored,) = score_batch([f"\\boxed{{{answer}}}"], [f"{gold} [tolerance 1E-1]"])
    assert scored.correct
    assert not verify(f"{gold} [tolerance 0.001]", answer).correct


@pytest.mark.parametrize(("gold", "answer"), pairs(BEYOND))
def test_beyond_its_tolerance_an_answer_is_wrong(gold: str, answer: str) -> None:
    assert not verify(f"{gold} [tolerance 0.1]", answer).correct


def test_a_tolerance_without_a_value_is_a_bad_reference() -> None:
    (scored,) = score_batch(["5"], [" [tolerance 0.1]"])
    assert (scored.correct, scored.status) == (False, "bad_reference")


@pytest.mark.parametrize(("gold", "answer"), pairs(SHUT))
def test_wrong_answers_fail_both_ways(gold: str, answer: str) -> None:
    assert not verify(gold, answer).correct
    assert not verify(answer, gold).correct


@pytest.mark.parametrize("kind", GENERATORS)
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32))
def test_generated_pairs(kind: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(CASES_AN_EXAMPLE):
        one, other, are_equal = GENERATORS[kind](rng)
        assert verify(one, other).correct == are_equal, (one, other)
        assert verify(other, one).correct == are_equal, (other, one)


def moved_braces(gold: str) -> set[str]:
    """The gold with one brace moved by one token, in all ways."""
    tokens = re.findall(r"\\[A-Za-z]+|\\.|.", gold, re.DOTALL)
    found = set()
    for place, token in enumerate(tokens):
        for other in (place - 1, place + 1):
            if token in "{}" and 0 <= other < len(tokens) and tokens[other] not in "{}":
                moved = tokens.copy()
                moved[place], moved[other] = moved[other], moved[place]
                found.add("".join(moved))
    return found - {gold}


# Moved braces that do not change the value for TeX or any reader, or that are not valid TeX.
SAME_VALUE = re.compile(
    r"\{\\sqrt\d+\}|\\sqrt\d\{\}|\\frac\{?[^{}]*\}?\\sqrt\{|\\right\}|\\(?:text|mbox)|\d\s+\}|\w \}"
    r"|\\mathbf|\\(?:ln|log|sin|cos|tan|sqrt)[a-z]|\}\s+\}|\$\}"
)


def accepted_moves(golds: list[str]) -> tuple[list[tuple[str, str]], int]:
    moves = [(gold, moved) for gold in golds for moved in moved_braces(gold)]
    return [
        pair for pair in moves if not SAME_VALUE.search(pair[1]) and verify(*pair).correct
    ], len(moves)


def test_no_moved_brace_is_accepted() -> None:
    accepted, num_moves = accepted_moves(GOLDS)
    assert num_moves > 100
    assert accepted == []


def test_no_moved_brace_is_accepted_in_the_golds_of_math(shared_dir: Path) -> None:
    lines = (shared_dir / "data" / "math" / "test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = {row.get("answer") or extract(row["solution"]).answer for row in rows}
    golds = sorted(gold for gold in found if gold and "oxed" not in gold)
    accepted, num_moves = accepted_moves(golds)
    assert num_moves > 4000
    assert accepted == []


def test_mutants_are_not_accepted() -> None:
    """With one digit, sign, bracket, brace, function, exponent, unit, name or modulus changed."""
    rng = random.Random(14)
    mutants = {
        (gold, kind, mutant)
        for gold in GOLDS
        for kind, mutate in MUTATIONS.items()
        for mutant in (mutate(gold, rng) for _ in range(16))
        if mutant is not None and mutant != gold
    }
    assert {kind for _, kind, _ in mutants} == set(MUTATIONS)
    assert len(mutants) > 1000
    accepted = [mutant for mutant in mutants if verify(mutant[0], mutant[2]).correct]
    assert len(accepted) / len(mutants) < MAX_MUTANTS_ACCEPTED, accepted


@pytest.mark.parametrize("reference", ["", "  ", "\n", None])
def test_a_bad_reference_does_not_end_a_batch(reference: str | None) -> None:
    scores = score_batch(["\\boxed{7}", "\\boxed{8}"], [reference, "8"])
    assert [(s.reward, s.status) for s in scores] == [(0.0, "bad_reference"), (1.0, "ok")]


def test_decimal_commas_depend_on_the_rules() -> None:
    assert not verify("2.5", "2,5").correct
    assert verify("2.5", "2,5", GradingRules(decimal_comma=True)).correct
    assert verify("2,5", "2.5", GradingRules(decimal_comma=True)).correct
    assert not verify("2.5", "2,6", GradingRules(decimal_comma=True)).correct


@pytest.mark.parametrize(
    ("text", "dimension", "scale"),
    [
        ("km/h", {"m": 1, "s": -1}, "5/18"),
        ("square feet", {"m": 2}, "145161/1562500"),  # 0.3048^2
        ("kg m/s^2", {"kg": 1, "m": 1, "s": -2}, "1"),
        ("kWh", {"kg": 1, "m": 2, "s": -2}, "3600000"),
        ("mL", {"m": 3}, "1/1000000"),
        ("meters per second squared", {"m": 1, "s": -2}, "1"),
        ("W/(m^2 K)", {"kg": 1, "s": -3, "K": -1}, "1"),
        ("W/(m^2)", {"kg": 1, "s": -3}, "1"),
        ("cents", {"dollar": 1}, "1/100"),
    ],
)
def test_units(text: str, dimension: dict[str, int], scale: str) -> None:
    unit = read_unit(text)
    assert unit is not None
    assert dict(unit.dimension) == dimension
    assert str(unit.scale) == scale


@pytest.mark.parametrize("text", ["apples", "", "m^99", "km//", "(m", "x" * 100, "per", "^2"])
def test_texts_that_are_not_units(text: str) -> None:
    assert read_unit(text) is None
