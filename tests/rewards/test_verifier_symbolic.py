"""The last tier: sympy expressions built from the tree, with sizes checked beforehand."""

from __future__ import annotations

import pytest

from rewards.equality.exact import Undecided
from rewards.equality.symbolic import decide_symbolically, equal_symbolically, to_sympy
from rewards.parsing.parser import parse
from rewards.rules import RULES


@pytest.mark.parametrize(
    ("gold", "answer", "is_right"),
    [
        (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}", True),
        (r"\sum_{k=1}^{n} k", r"\frac{n(n-1)}{2}", False),
        (r"\sum_{k=1}^{10} k^2", "385", True),
        (r"\prod_{k=1}^{5} k", "120", True),
        (r"\int_0^2 x \, dx", "2", True),
        (r"\int_0^2 x \, dx", "3", False),
        (r"\gcd(12, 18)", "6", True),
        (r"\operatorname{lcm}(12, 18)", "36", True),
        (r"7^{4} \bmod 10", "1", True),
        (r"\det \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "-2", True),
        (r"\max(3, 5)", "5", True),
        ("2", r"\int_0^2 x \, dx", False),
    ],
)
def test_a_gold_that_is_a_task_is_evaluated(gold: str, answer: str, is_right: bool) -> None:
    assert decide_symbolically(gold, answer, RULES["default"]).correct == is_right


@pytest.mark.parametrize(
    "text",
    [
        "2^{100000}",
        "100000!",
        r"\binom{100000}{50000}",
        "(x+y)^{100}",
        r"\sum_{k=1}^{100000} k",
        r"\lim_{x \to 0} x",
        r"\int x dx",
    ],
)
def test_large_and_unknown_expressions_are_undecided(text: str) -> None:
    with pytest.raises(Undecided):
        to_sympy(parse(text).node)


def test_trees_become_the_same_expression() -> None:
    pairs = [
        (r"\sin^2 x + \cos^2 x", "1"),
        (r"\sqrt[3]{x}", r"x^{1/3}"),
        (r"50\%", r"\frac12"),
        (r"30^\circ", r"\frac{\pi}{6}"),
        (r"f(x) + f(x)", r"2f(x)"),
        (r"|{-3}|", "3"),
    ]
    for left, right in pairs:
        assert equal_symbolically(parse(left).node, parse(right).node)
    assert not equal_symbolically(parse("x").node, parse("y").node)
