"""Properties of the verifier on generated answers."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import score, verify
from rewards.extraction.extract import extract

small = st.integers(-(10**6), 10**6)
any_int = st.integers(-(10**30), 10**30)
fractions = st.fractions(max_denominator=1000).filter(lambda f: abs(f) < 10**6)
FEW = settings(max_examples=60, deadline=None)


def latex_fraction(value: Fraction, factor: int = 1) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator) * factor}}}{{{value.denominator * factor}}}"


@FEW
@given(any_int, any_int)
def test_integers_are_equal_only_to_themselves(a: int, b: int) -> None:
    assert verify(str(a), str(b)).correct == (a == b)
    assert score(f"so \\boxed{{{b}}}", str(a)).correct == (a == b)


@FEW
@given(fractions, st.integers(2, 50), fractions)
def test_fractions_in_any_form(value: Fraction, factor: int, other: Fraction) -> None:
    gold = latex_fraction(value)
    assert verify(gold, latex_fraction(value, factor)).correct
    assert verify(gold, f"{value.numerator}/{value.denominator}").correct
    assert verify(gold, latex_fraction(other, factor)).correct == (value == other)


@FEW
@given(small, st.integers(1, 6))
def test_decimals_and_percents(number: int, places: int) -> None:
    value = Fraction(number, 10**places)
    whole, decimals = divmod(abs(number), 10**places)
    printed = f"{'-' if number < 0 else ''}{whole}.{decimals:0{places}}"
    assert verify(latex_fraction(value), printed).correct
    assert verify(f"{printed}\\%", latex_fraction(value / 100)).correct
    assert not verify(latex_fraction(value + 1), printed).correct


@FEW
@given(st.lists(small, min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_lists_are_multisets_and_tuples_are_ordered(items, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(items)
    random.shuffle(shuffled)
    gold, answer = ", ".join(map(str, items)), ", ".join(map(str, shuffled))
    assert verify(gold, answer).correct
    assert verify(f"({gold})", f"({answer})").correct == (items == shuffled)
    assert not verify(gold, f"{answer}, {items[0]}").correct
    assert not verify(str(items[0]), answer).correct


@FEW
@given(small, small, small)
def test_polynomials_expand(a: int, b: int, c: int) -> None:
    gold = f"(x + {a})(x + {b}) + {c}".replace("+ -", "- ")
    expanded = f"x^2 + {a + b} x + {a * b + c}".replace("+ -", "- ")
    assert verify(gold, expanded).correct
    assert not verify(gold, expanded + " + 1").correct


@FEW
@given(st.integers(2, 500), st.integers(2, 500))
def test_roots_multiply(a: int, b: int) -> None:
    gold = f"\\sqrt{{{a}}} \\cdot \\sqrt{{{b}}}"
    assert verify(gold, f"\\sqrt{{{a * b}}}").correct
    assert not verify(gold, f"\\sqrt{{{a * b + 1}}}").correct


@FEW
@given(small, st.integers(1, 10**6), st.booleans(), st.booleans())
def test_intervals_keep_their_ends(low: int, length: int, left: bool, right: bool) -> None:
    high = low + length
    gold = f"{'[' if left else '('}{low}, {high}{']' if right else ')'}"
    below, above = "\\le" if left else "<", "\\le" if right else "<"
    assert verify(gold, f"{low} {below} x {above} {high}").correct
    other = f"{'(' if left else '['}{low}, {high}{']' if right else ')'}"
    assert not verify(gold, other).correct


@FEW
@given(st.integers(0, 10**9), st.integers(2, 9), st.integers(2, 9))
def test_a_base_is_part_of_the_value(number: int, base: int, other: int) -> None:
    digits = ""
    rest = number
    while True:
        rest, digit = divmod(rest, base)
        digits = str(digit) + digits
        if rest == 0:
            break
    gold = f"{digits}_{{{base}}}"
    assert verify(gold, f"{digits}_{base}").correct
    assert verify(gold, f"{digits}_{other}").correct == (base == other)
    assert not verify(gold, digits).correct


@FEW
@given(small)
def test_an_unknown_letter_is_never_a_unit(number: int) -> None:
    for letter in "abcghklmnstxyz":
        assert not verify(str(number), f"{number}{letter}").correct or number == 0


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_no_text_raises(text: str) -> None:
    extract(text)
    assert score(text, "123456789123").correct in (False, "123456789123" in text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            (
                r"\frac \sqrt \boxed { } [ ] ( ) ^ _ 1 23 x y \pi + - * / = < \le , ; \pm \{ \}"
                r" \begin{pmatrix} \end{pmatrix} & \\ \text{ \% % ! | \int \sum \infty \in \cup"
                r" . $ \circ e i \log"
            ).split()
        ),
        max_size=40,
    )
)
def test_no_latex_raises(pieces: list[str]) -> None:
    text = " ".join(pieces)
    verdict = verify("987654321", text)
    assert not verdict.correct
    assert verify(text or "0", text or "0").correct
