"""Exact rational values of bounded size; nothing larger is ever computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from mpmath import libmp

from rewards.parsing.nodes import MAX_EXACT_BITS, Node

MAX_FACTORIAL = 1000
MAX_ROOT_BITS = 2048


class Undecided(Exception):
    """This tier cannot tell; the next one may."""


def exact(node: Node, values: Mapping[str, int] | None = None) -> Fraction:
    """The rational value of a tree, with symbols from `values`.

    Raises Undecided if the value is irrational, unknown or too large.
    """
    kind = node.kind
    if kind == "num":
        return node.number
    if kind == "add":
        return _checked(sum((exact(term, values) for term in node.args), Fraction(0)))
    if kind == "mul":
        product = Fraction(1)
        for factor in node.args:
            product = _checked(product * exact(factor, values))
        return product
    if kind == "pow":
        return exact_power(exact(node.args[0], values), exact(node.args[1], values))
    if kind == "percent":
        return exact(node.args[0], values) / 100
    if kind == "sym" and values is not None and node.name in values:
        return Fraction(values[node.name])
    if kind == "func":
        return _function(node.name, [exact(arg, values) for arg in node.args])
    raise Undecided


def quadratic(node: Node, name: str) -> tuple[Fraction, Fraction, Fraction] | None:
    """(a, b, c) of a x^2 + b x + c with rational coefficients; None for anything else."""
    try:
        at = {x: exact(node, {name: x}) for x in (0, 1, -1, 2, 7, -3, 1000)}
    except Undecided:
        return None
    c, b = at[0], (at[1] - at[-1]) / 2
    a = at[1] - b - c
    return (a, b, c) if all(at[x] == a * x * x + b * x + c for x in at) else None


def _checked(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > MAX_EXACT_BITS:
        raise Undecided
    return value


def exact_power(base: Fraction, exponent: Fraction) -> Fraction:
    """base ** exponent. Raises Undecided if that is irrational, too large or 0 ** 0."""
    if base == 0:
        if exponent <= 0:
            raise Undecided
        return base
    if exponent.denominator != 1:
        base = exact_root(base, exponent.denominator)
    power = exponent.numerator
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if bits > 1 and bits * abs(power) > MAX_EXACT_BITS:
        raise Undecided
    if bits <= 1:  # 1 or -1
        return base if power % 2 else Fraction(1)
    return base**power


def exact_root(value: Fraction, degree: int) -> Fraction:
    """The real root of that degree. Raises Undecided if it is irrational."""
    if degree > 64 or value < 0 or value.numerator.bit_length() > MAX_ROOT_BITS:
        raise Undecided  # the principal root of a negative number is complex
    return Fraction(
        _integer_root(value.numerator, degree), _integer_root(value.denominator, degree)
    )


def _integer_root(value: int, degree: int) -> int:
    if value < 2:
        return value
    digits = value.bit_length() // degree + 16
    root = libmp.to_int(libmp.mpf_nthroot(libmp.from_int(value), degree, digits, "n"), "n")
    if root**degree != value:
        raise Undecided
    return root


def _function(name: str, args: list[Fraction]) -> Fraction:
    if name == "abs":
        return abs(args[0])
    if name == "floor":
        return Fraction(math.floor(args[0]))
    if name == "ceil":
        return Fraction(math.ceil(args[0]))
    if name == "root" and len(args) == 2 and args[1].denominator == 1 and args[1] > 0:
        return exact_root(args[0], args[1].numerator)
    if any(arg.denominator != 1 or arg < 0 for arg in args):
        raise Undecided
    whole = [arg.numerator for arg in args]
    if name == "factorial" and whole[0] <= MAX_FACTORIAL:
        return Fraction(math.factorial(whole[0]))
    if name == "factorial2" and whole[0] <= MAX_FACTORIAL:
        return Fraction(math.prod(range(whole[0], 0, -2)))
    if name == "binom" and len(whole) == 2:
        num_bits = min(whole[1], whole[0] - whole[1]) * whole[0].bit_length()
        if whole[0] <= MAX_EXACT_BITS // 2 or num_bits <= MAX_EXACT_BITS:
            return Fraction(math.comb(whole[0], whole[1]))
    raise Undecided
