"""Equality of two scalar expressions: exact, modular, rounded, numeric, logarithmic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from rewards.equality.exact import Undecided, exact
from rewards.equality.modular import identical
from rewards.equality.numeric import (
    FLOATS,
    HIGH,
    LOW,
    MAX_LOG_OF_LOG,
    Arithmetic,
    Precise,
    differ,
    is_real,
    same_value,
    value_of,
)
from rewards.parsing.nodes import INFINITY, SCALAR_KINDS, Node, number_node
from rewards.rules import GradingRules

FLOAT_DIGITS = 12
MAX_COMMON_DENOMINATOR = 12  # fractions such as 1/3, for which 0.333 is too coarse
NO_FRACTION = Fraction(1)
NUMERIC_KINDS = SCALAR_KINDS | {"ratio"}
EVALUATED_TASKS = frozenset({"max", "min"})


class TooLarge(Undecided):
    """Even the logarithm is too large."""


class Printed(NamedTuple):
    """A number as printed: 2.50 has 2 decimals and 3 significant digits."""

    value: Fraction
    decimals: int
    num_significant: int


def printed(node: Node) -> Printed | None:
    r"""A literal decimal with its sign and power of ten: -0.25, 1.5 \times 10^{-3}; else None."""
    if node.kind == "percent":
        inner = printed(node.args[0])
        return inner and Printed(inner.value / 100, inner.decimals + 2, inner.num_significant)
    found, sign, shift = None, Fraction(1), 0
    for factor in node.args if node.kind == "mul" else (node,):
        if factor.kind == "num" and factor.name == "decimal" and found is None:
            found = factor
        elif factor.kind == "num" and abs(factor.number) == 1:
            sign *= factor.number
        elif factor.kind == "pow" and factor.args[0] == number_node(10):
            power = factor.args[1]
            if power.kind != "num" or power.number.denominator != 1 or abs(power.number) > 3000:
                return None
            shift += int(power.number)
        else:
            return None
    if found is None:
        return None
    num_significant = len(str(abs(int(found.number * 10**found.decimals))).lstrip("0"))
    value = found.number * sign * Fraction(10) ** shift
    return Printed(value, found.decimals - shift, num_significant)


def rounds_to(value: Fraction, target: Printed) -> bool:
    """Does `value` round to the target, half up or down, at the target's decimals?"""
    error = abs(value - target.value)
    if target.num_significant > FLOAT_DIGITS and error * 10**FLOAT_DIGITS <= abs(value):
        return True  # the last digits of a float are noise
    return error * 2 * Fraction(10) ** target.decimals <= 1


def equal_scalars(gold: Node, answer: Node, rules: GradingRules) -> bool:
    """Are two scalars equal under the rules? Raises Undecided."""
    if answer.has("open") and not gold.has("open"):
        return False  # a task is not its value
    if gold == answer:
        return True
    pairs = [(gold, answer), *_converted(gold, answer, rules)]
    undecided: Undecided | None = None
    for left, right in pairs:
        try:
            if _equal_pair(left, right, rules):
                return True
        except Undecided as error:
            undecided = error
    if undecided is not None:
        raise undecided
    return False


def _converted(gold: Node, answer: Node, rules: GradingRules) -> list[tuple[Node, Node]]:
    """Further readings: 28% as 28, 30 degrees as 30 or as pi/6."""
    pairs = []
    if rules.percent == "either" and (gold.kind == "percent") != (answer.kind == "percent"):
        pairs.append((gold.args[0], answer) if gold.kind == "percent" else (gold, answer.args[0]))
    if (gold.kind == "deg") != (answer.kind == "deg"):
        # The bare number in degrees; _equal_pair converts degrees to radians.
        pairs.append((gold.args[0], answer) if gold.kind == "deg" else (gold, answer.args[0]))
    return pairs


def _equal_pair(gold: Node, answer: Node, rules: GradingRules) -> bool:
    if gold.kind == answer.kind == "deg":
        return _equal_pair(gold.args[0], answer.args[0], rules)
    if "deg" in (gold.kind, answer.kind) and not rules.degrees_as_radians:
        return False
    left = right = None
    try:
        left = exact(gold)
        right = exact(answer)
    except Undecided:
        pass
    if left is not None and right is not None:
        return left == right or _within(gold, answer, left, right, rules)
    is_numeric = not gold.symbols() and not answer.symbols()
    if is_numeric and _rounds(gold, answer, rules):
        return True
    if gold.has("pm") or answer.has("pm"):
        return False
    verdict = identical(gold, answer)
    if verdict is not None:
        return verdict
    return _equal_numerically(gold, answer, is_numeric)


def _equal_numerically(gold: Node, answer: Node, is_numeric: bool) -> bool:
    nodes = [*gold.walk_to_tasks(), *answer.walk_to_tasks()]
    if any(node == INFINITY or node.kind not in NUMERIC_KINDS for node in nodes):
        return False  # N(0, 1), -221_3 and infinities are equal only to the same tree
    tasks = [node for node in nodes if node.kind == "open" and node.name not in EVALUATED_TASKS]
    if not all(map(_is_for_sympy, tasks)):
        return False
    if tasks:
        raise Undecided  # a gold that is a sum or an integral: sympy may evaluate it
    try:
        return same_value(gold, answer)
    except Undecided:
        if gold.symbols() != answer.symbols():
            return False
        if not is_numeric:
            raise
    try:
        return _same_magnitude(gold, answer)
    except TooLarge:
        raise
    except Undecided:
        return False  # no value, such as 1/0


def _is_for_sympy(task: Node) -> bool:
    if task.name == "det":
        return task.args[0].kind == "matrix"
    if task.name in ("gcd", "lcm", "mod"):
        return not task.symbols()
    return task.name in ("sum", "product", "integral")


def _within(gold: Node, answer: Node, left: Fraction, right: Fraction, rules: GradingRules) -> bool:
    """Is one of two unequal exact values within tolerance of, or the rounding of, the other?"""
    tolerance = rules.largest_difference
    if tolerance is not None and abs(left - right) <= tolerance:
        return True
    gold_printed, answer_printed = printed(gold), printed(answer)
    if _is_float_noise(gold_printed, right) or _is_float_noise(answer_printed, left):
        return rules.rounding != "none"
    if gold_printed and answer_printed:
        # Of two printed decimals, the answer must be the more precise one.
        is_finer = answer_printed.decimals > gold_printed.decimals
        return is_finer and _allowed(gold_printed, rules, True) and rounds_to(right, gold_printed)
    target, value = (gold_printed, right) if gold_printed else (answer_printed, left)
    if target is None or value.denominator == 1:
        return False
    return _allowed(target, rules, gold_printed is not None, value) and rounds_to(value, target)


def _is_float_noise(target: Printed | None, value: Fraction) -> bool:
    """Is the target a float with wrong last digits: 12.000000000000002 for 12?"""
    if target is None or target.num_significant <= FLOAT_DIGITS + 2:
        return False
    return abs(value - target.value) * 10**FLOAT_DIGITS <= abs(value)


def _allowed(
    target: Printed, rules: GradingRules, is_gold: bool, value: Fraction = NO_FRACTION
) -> bool:
    """Do the rules accept a printed decimal for a value that rounds to it?"""
    if rules.rounding == "none" or (rules.rounding == "gold" and not is_gold):
        return False
    is_common = abs(value) < 1 and value.denominator <= MAX_COMMON_DENOMINATOR
    num_required = rules.min_significant_digits + (is_common and rules.rounding == "either")
    return target.num_significant >= num_required


def _rounds(gold: Node, answer: Node, rules: GradingRules) -> bool:
    """Is one side a printed decimal to which the other, an irrational value, rounds?"""
    tolerance = rules.largest_difference
    if tolerance is not None:
        try:
            difference = value_of(gold, {}, FLOATS) - value_of(answer, {}, FLOATS)
        except Undecided:
            return False
        if abs(difference) <= float(tolerance):
            return True
    gold_printed, answer_printed = printed(gold), printed(answer)
    if (gold_printed is None) == (answer_printed is None):
        return False
    target = gold_printed or answer_printed
    assert target is not None
    other = answer if gold_printed else gold
    # One digit more than for most fractions: 3.142 is accepted for pi, 3.14 is not. Not needed if
    # only a gold may be rounded.
    stricter = target._replace(
        num_significant=target.num_significant - (rules.rounding == "either")
    )
    if not _allowed(stricter, rules, gold_printed is not None):
        return False
    try:
        value = value_of(other, {}, LOW)
    except Undecided:
        return False
    if not is_real(value):
        return False
    real = getattr(value, "real", value)
    return rounds_to(Fraction(int(real * 10**30), 10**30), target)


def _log_magnitude(node: Node, system: Arithmetic) -> Any:
    """ln of a positive number that may be too large to compute. Raises Undecided."""
    if node.kind == "mul":
        return sum((_log_magnitude(arg, system) for arg in node.args), system.number(Fraction(0)))
    if node.kind == "pow":
        return _value_or_huge(node.args[1], system) * _log_magnitude(node.args[0], system)
    if node.kind == "func" and node.name in ("factorial", "binom"):
        whole = [_value_or_huge(arg, system) for arg in node.args]
        parts = [whole[0]] if node.name == "factorial" else [*whole, whole[0] - whole[1]]
        if any(part <= -1 for part in parts):
            raise Undecided
        logs = [system.functions["loggamma"](part + 1) for part in parts]
        return logs[0] - sum(logs[1:])
    value = _real(value_of(node, {}, system))
    if not value > 0:
        raise Undecided
    return system.functions["ln"](value)


def _real(value: Any) -> Any:
    """The value without imaginary noise: complex numbers have no order. Raises Undecided."""
    if not is_real(value):
        raise Undecided
    return value.real


def _value_or_huge(node: Node, system: Arithmetic) -> Any:
    """A real value, computed from its logarithm if it is large. Raises Undecided."""
    try:
        value = value_of(node, {}, system)
    except Undecided:
        logarithm = _log_magnitude(node, system)
        if abs(logarithm) > MAX_LOG_OF_LOG:
            raise TooLarge from None
        return system.functions["exp"](logarithm)
    return _real(value)


def _same_magnitude(left: Node, right: Node) -> bool:
    """Compare two huge positive numbers by their logarithms. Raises Undecided.

    They count as equal if the logarithms agree to 68 digits.
    """
    for system in (LOW, HIGH):
        magnitudes = []
        for side in (left, right):
            try:
                with Precise.lock:
                    magnitudes.append(_log_magnitude(side, system))
            except TooLarge:
                magnitudes.append(None)
        a, b = magnitudes
        if a is None and b is None:
            raise TooLarge
        if a is None or b is None or differ(a, b, system.tiny):
            return False
    return True
