"""Numerical comparison at random points, certified by agreement at two precisions.

Floats refute equality quickly. It is granted only if at every point the two sides agree to 28
digits at a working precision of 40 digits, and to 68 digits at 80.
"""

from __future__ import annotations

import cmath
import functools
import math
import operator
import os
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import mpmath

from rewards.equality.exact import Undecided
from rewards.parsing.nodes import Node

MAX_LOG_OF_LOG = 1e5  # beyond it, not even logarithms are computed
MAX_FACTORIAL_ARGUMENT = 1e4
MAX_ARGUMENT = 1e300
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Arithmetic:
    """One number system: how to make a number and what each function means in it."""

    number: Callable[[Fraction], Any]
    pi: Any
    e: Any
    i: Any
    functions: Mapping[str, Callable[..., Any]]
    tiny: float  # relative differences below this are noise
    max_log: float  # natural logarithm of the largest magnitude


_FUNCTIONS = (
    "sin cos tan cot sec csc asin acos atan acot asec acsc sinh cosh tanh coth asinh acosh atanh"
    " exp ln gamma loggamma floor ceil"
)


def _arithmetic(context: Any, tiny: float, max_log: float) -> Arithmetic:
    """The arithmetic of a context of mpmath: of its floats, or of a fixed precision."""
    functions: dict[str, Callable[..., Any]] = {"abs": abs}
    for name in _FUNCTIONS.split():  # mpmath's floats have no asinh, acosh, atanh
        functions[name] = getattr(context, name, None) or getattr(cmath, name)

    def number(value: Fraction) -> Any:
        top = value.numerator if context is mpmath.fp else context.mpf(value.numerator)
        return top / value.denominator

    return Arithmetic(number, +context.pi, +context.e, context.j, functions, tiny, max_log)


def _precise(digits: int) -> Arithmetic:
    context = mpmath.MPContext()
    context.dps = digits
    return _arithmetic(context, 10.0 ** -(digits - 12), MAX_LOG_OF_LOG)


IMAGINARY = Node("const", name="i")
FLOATS = _arithmetic(mpmath.fp, 1e-7, 700.0)
LOW, HIGH = _precise(40), _precise(80)


class Precise:
    """A lock: some mpmath functions change their context's precision, so one thread at a time."""

    lock = threading.RLock()


# Another thread may hold it during a fork.
os.register_at_fork(after_in_child=lambda: setattr(Precise, "lock", threading.RLock()))


def value_of(node: Node, values: Values, system: Arithmetic) -> Any:
    """The value of a tree. Raises Undecided if it has none or is out of range."""
    try:
        if system is FLOATS:
            value = _evaluate(node, values, system)
        else:
            with Precise.lock:
                value = _evaluate(node, values, system)
        size = abs(value)
    except (ZeroDivisionError, OverflowError, ValueError, TypeError) as error:
        raise Undecided from error
    if not size < math.inf:  # infinite, or not a number
        raise Undecided
    return value


def _evaluate(node: Node, values: Values, system: Arithmetic) -> Any:
    kind = node.kind
    if kind == "num":
        return system.number(node.number)
    if kind == "sym":
        return values[node.name]
    if kind == "const":
        if node.name == "inf":
            raise Undecided
        return getattr(system, node.name)
    args = [_evaluate(arg, values, system) for arg in node.args]
    if kind == "add":
        return sum(args[1:], args[0])
    if kind == "mul":
        return functools.reduce(operator.mul, args)
    if kind == "pow":
        return _power(args[0], args[1], system)
    if kind == "percent":
        return args[0] / 100
    if kind == "deg":
        return args[0] * system.pi / 180
    if kind == "ratio" and len(args) == 2:
        return args[0] / args[1]
    if kind == "open" and node.name in ("max", "min"):
        return max(args) if node.name == "max" else min(args)
    if kind == "func":
        return _call(node.name, args, system)
    if kind == "call":
        return _unknown(node.name, args, system)
    raise Undecided


def _unknown(name: str, args: list[Any], system: Arithmetic) -> Any:
    """The value of an unknown function: some fixed smooth function of its arguments."""
    seed = sum(ord(letter) * (7 + place) for place, letter in enumerate(name))
    total = system.number(Fraction(seed % 97 + 3, 101))
    for place, arg in enumerate(args):
        total = total + system.functions["sin"](arg * (place + 2) / 3 + seed % 13) * (place + 1)
    return total


def _power(base: Any, exponent: Any, system: Arithmetic) -> Any:
    if base == 0:
        if isinstance(exponent, complex) or not exponent > 0:
            raise Undecided
        return base
    size = math.log(abs(base)) if isinstance(base, (int, float, complex)) else mpmath.log(abs(base))
    if abs(exponent) * abs(size) > system.max_log:
        raise Undecided
    return base**exponent


def _call(name: str, args: list[Any], system: Arithmetic) -> Any:
    functions = system.functions
    first = args[0]
    if name in ("factorial", "binom", "factorial2"):
        if max(map(abs, args)) > (150.0 if system is FLOATS else MAX_FACTORIAL_ARGUMENT):
            raise Undecided
    if abs(first) > MAX_ARGUMENT and name not in ("ln", "log", "abs", "root", "sgn"):
        raise Undecided  # reducing a huge angle needs as many digits of pi
    if name in ("exp", "sinh", "cosh") and abs(first) > system.max_log:
        raise Undecided
    if name == "factorial":
        return functions["gamma"](first + 1)
    if name == "binom" and len(args) == 2:
        gamma = functions["gamma"]
        return gamma(first + 1) / (gamma(args[1] + 1) * gamma(first - args[1] + 1))
    if name == "root" and len(args) == 2:
        return _root(first, args[1], system)
    if name == "log":
        logarithm = functions["ln"](first)
        return logarithm if len(args) == 1 else logarithm / functions["ln"](args[1])
    if name == "cis":
        return functions["cos"](first) + system.i * functions["sin"](first)
    if name == "sgn":
        return first / abs(first) if first else first
    if name in functions and len(args) == 1:
        return functions[name](first)
    raise Undecided


def _root(value: Any, degree: Any, system: Arithmetic) -> Any:
    """The real root of a negative number if the degree is odd, else the principal root."""
    is_real = not isinstance(value, complex) and getattr(value, "imag", 0) == 0
    if is_real and value < 0 and degree == int(degree) and int(degree) % 2:
        return -_power(-value, 1 / degree, system)
    return _power(value, 1 / degree, system)


def line_in(node: Node, name: str, values: Values) -> tuple[Any, Any]:
    """(value at 0, slope) of a tree that is linear in one symbol. Raises Undecided."""
    at = [value_of(node, {**values, name: LOW.number(Fraction(k))}, LOW) for k in range(3)]
    slope = at[1] - at[0]
    if abs(slope) < LOW.tiny or abs(at[2] - at[1] - slope) > LOW.tiny * abs(slope):
        raise Undecided
    return at[0], slope


def is_real(value: Any) -> bool:
    """Is the imaginary part just noise?"""
    return abs(getattr(value, "imag", 0)) <= 1e-12 * max(1.0, abs(value))


def differ(left: Any, right: Any, tolerance: float) -> bool:
    """Do two values differ by more than a relative tolerance? NaN differs from everything."""
    scale = max(abs(left), abs(right))
    return not abs(left - right) <= tolerance * scale


def points(names: frozenset[str], num: int, is_positive: bool) -> list[dict[str, Fraction]]:
    """Random non-integer rational points, half of them below 1, the rest up to 3 in magnitude.

    Seeded, so that verdicts are reproducible. Unless `is_positive`, the first point is negative in
    every symbol.
    """
    generator = random.Random(num * 2 + is_positive)
    drawn = []
    for place in range(num):
        low, high = (60, 930) if place % 2 == 0 else (1060, 2900)
        point = {}
        for name in sorted(names):
            value = Fraction(generator.randrange(low, high), 997)
            is_negative = not is_positive and (generator.random() < 0.6 or place == 0)
            point[name] = -value if is_negative else value
        drawn.append(point)
    return drawn


def corners(names: frozenset[str]) -> list[dict[str, Fraction]]:
    """Points where piecewise functions differ: zero, small integers of both signs, far out."""
    ordered = sorted(names)
    return [
        {name: Fraction(start + step * place) for place, name in enumerate(ordered)}
        for start, step in ((0, 0), (1, 1), (-3, 1), (1013, 7), (-2017, 11))
    ]


def same_value(left: Node, right: Node) -> bool:
    """Are two trees equal as functions of their symbols? Raises Undecided."""
    names = left.symbols() | right.symbols()
    if not names:
        return _agree_at(left, right, {}, must_be_real=False)
    places: Sequence[Values]
    if IMAGINARY in left.walk() or IMAGINARY in right.walk():
        # At complex points, since |z - i| and |z + i| agree on the whole real line.
        pairs = zip(points(names, 4, False), points(names, 5, False), strict=False)
        places = [{name: (x[name], y[name]) for name in names} for x, y in pairs]
    else:
        num_real = 0
        for places in (points(names, 5, True), points(names, 6, False)):
            num = _num_agreed(left, right, places, 3, must_be_real=True)
            if num is None:
                return False
            num_real += num
        if num_real >= 2:
            return _agree_where_defined(left, right, corners(names))
        places = points(names, 5, True)  # rarely real: compare the principal values instead
    num = _num_agreed(left, right, places, len(places), must_be_real=False)
    if num is not None and num < 2:
        raise Undecided
    return num is not None


def _num_agreed(
    left: Node, right: Node, places: Sequence[Values], enough: int, *, must_be_real: bool
) -> int | None:
    """At how many points both sides agree, up to `enough`; None if they differ at one."""
    num = 0
    for point in places:
        try:
            if not _agree_at(left, right, point, must_be_real):
                return None
        except Undecided:
            continue
        num += 1
        if num == enough:
            break
    return num


def _numbers(point: Values, system: Arithmetic) -> Values:
    """The coordinates of a point, fractions or pairs of real and imaginary parts, as numbers."""
    return {
        name: system.number(value)
        if isinstance(value, Fraction)
        else system.number(value[0]) + system.i * system.number(value[1])
        for name, value in point.items()
    }


def _agree_where_defined(left: Node, right: Node, places: list[dict[str, Fraction]]) -> bool:
    """Do the two sides agree, as floats, wherever both are defined?"""
    for point in places:
        floats = _numbers(point, FLOATS)
        try:
            a, b = value_of(left, floats, FLOATS), value_of(right, floats, FLOATS)
        except Undecided:
            continue
        if is_real(a) and is_real(b) and abs(a - b) > 1e-5 * max(abs(a), abs(b), 1e-3):
            return False
    return True


def _certified(low: tuple[Any, Any], high: tuple[Any, Any]) -> bool:
    """Do two sides at 40 and at 80 digits agree to 28 and to 68 digits, or both vanish?"""
    vanish = [_vanishes(a, b) for a, b in zip(low, high, strict=True)]
    if any(vanish):
        return all(vanish)
    return not differ(*low, LOW.tiny) and not differ(*high, HIGH.tiny)


def _vanishes(low: Any, high: Any) -> bool:
    """Is this zero up to rounding? A small nonzero number stays the same at a higher precision."""
    if low == 0:
        return bool(abs(high) < HIGH.tiny)
    return bool(abs(high) <= 1e-10 * abs(low))


def _agree_at(left: Node, right: Node, point: Values, must_be_real: bool) -> bool:
    """Compare at one point. Raises Undecided if a side is undefined or out of range there."""
    floats = _numbers(point, FLOATS)
    try:
        a, b = value_of(left, floats, FLOATS), value_of(right, floats, FLOATS)
    except Undecided:
        return _agree_precisely(left, right, point, must_be_real)
    if must_be_real and not (is_real(a) and is_real(b)):
        if is_real(a) != is_real(b) and all(value > 0 for value in point.values()):
            return False  # ln x^2 and 2 ln(-x) are real at different places
        raise Undecided
    if a != a or b != b:
        raise Undecided
    scale = max(abs(a), abs(b))
    if scale > 1e-9 and abs(a - b) > 1e-3 * scale and scale < 1e9:
        return False
    return _agree_precisely(left, right, point, must_be_real)


def _agree_precisely(left: Node, right: Node, point: Values, must_be_real: bool) -> bool:
    sides: list[tuple[Any, Any]] = []
    for system in (LOW, HIGH):
        values = _numbers(point, system)
        sides.append((value_of(left, values, system), value_of(right, values, system)))
    if must_be_real and not all(is_real(value) for pair in sides for value in pair):
        raise Undecided
    return _certified(*sides)
