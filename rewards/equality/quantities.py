"""Equality of quantities: 45 km/h is 12.5 m/s; 3 apples are not 3 oranges."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from rewards.parsing.nodes import PI, Node, divide, number_node
from rewards.parsing.quantities import quantity_of_product
from rewards.parsing.units import Unit, read_unit

Equal = Callable[[Node, Node], bool]
# Words next to an unknown unit that do not matter.
_IDLE = frozenset(
    "the in total altogether overall all each of together exactly about approximately"
    " different possible".split()
)
_RATES = frozenset({"per", "/"})
_GENERIC = frozenset({"unit"})
_ANGLE = Unit((("degree", 1),), Fraction(1))


def equal_quantities(gold: Node, answer: Node, equal: Equal, *, is_strict: bool) -> bool:
    """Compare, at least one side with a unit. `is_strict`: the answer must have the gold's unit."""
    if gold.kind != answer.kind:
        one, other = (
            side if side.kind == "unit" else quantity_of_product(side) for side in (gold, answer)
        )
        if one is not None and other is not None and equal(_in_base(one), _in_base(other)):
            left, right = read_unit(one.name), read_unit(other.name)
            return left is not None and right is not None and left.dimension == right.dimension
        return _equal_without_unit(gold, answer, equal, is_strict=is_strict)
    left, right = read_unit(gold.name), read_unit(answer.name)
    if left is None or right is None:
        is_known = left is not None or right is not None
        same = _same_start if is_known else _same_words
        return same(gold.name, answer.name) and equal(gold.args[0], answer.args[0])
    if left.dimension != right.dimension:
        return False
    if left.scale == right.scale:
        return equal(gold.args[0], answer.args[0])
    ratio = number_node(right.scale / left.scale)
    return equal(gold.args[0], Node("mul", (ratio, answer.args[0])))


def _equal_without_unit(gold: Node, answer: Node, equal: Equal, *, is_strict: bool) -> bool:
    with_unit, other = (gold, answer) if gold.kind == "unit" else (answer, gold)
    value, unit = with_unit.args[0], read_unit(with_unit.name)
    if other.kind == "deg":
        if unit == Unit((), Fraction(1)):  # radians
            other = divide(Node("mul", (other.args[0], PI)), number_node(180))
        elif unit != _ANGLE:
            return False
    if is_strict and gold.kind == "unit":
        return False
    return equal(value, other) if gold.kind == "unit" else equal(other, value)


def _in_base(quantity: Node) -> Node:
    unit = read_unit(quantity.name)
    if unit is None or unit.scale == 1:
        return quantity.args[0]
    return Node("mul", (number_node(unit.scale), quantity.args[0]))


def _same_words(left: str, right: str) -> bool:
    """Do unknown units have the same head word, and the same rate and exponent, if any?"""
    exponents = {match[1] for match in map(_EXPONENT.search, (left, right)) if match is not None}
    if len(exponents) > 1:
        return False
    one, other = _words(left), _words(right)
    if _RATES & (set(one) ^ set(other)):
        return False
    if not one or not other or set(one) == set(other) or _GENERIC & {*one, *other}:
        return True
    if _RATES & {*one, *other}:
        return False
    if min(len(one[-1]), len(other[-1]), len(one[0]), len(other[0])) < 2:
        return False
    return one[-1] == other[-1] or one[0] == other[0] and 1 in (len(one), len(other))


def _same_start(left: str, right: str) -> bool:
    """Does one unit begin with the other: inches, inches wide? "units" matches any name."""
    one, other = _words(left), _words(right)
    if _GENERIC & {*one, *other}:
        return _same_words(left, right)
    size = min(len(one), len(other))
    return one[:size] == other[:size] and not _RATES & {*one[size:], *other[size:]}


_EXPONENT = re.compile(r"\^\s*\{?\s*(\d+)|\b(?:(?P<square>square|sq)|cubic)\b")


def _words(name: str) -> list[str]:
    """The words of a unit's name in lower case and singular."""
    words = re.findall(r"[a-z]+|/", name.lower())
    words = [word for word in words if word not in _IDLE or len(words) == 1]
    return [re.sub(r"(?<=[a-z]{2})(?:ies|y|es|s)$", "", word) for word in words]
