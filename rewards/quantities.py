"""Numbers with units: 45 km/h is 12.5 m/s and 3 h 20 min are 200 min; 3 apples are no oranges."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from rewards.nodes import PI, Node, divide, number_node, walk
from rewards.units import Unit, is_unit, read_unit

Equal = Callable[[Node, Node], bool]
# Words beside an unknown unit that say nothing of it.
_IDLE = frozenset(
    "the in total altogether overall all each of together exactly about approximately"
    " different possible".split()
)
_RATES = frozenset({"per", "/"})
_GENERIC = frozenset({"unit"})
_TEMPERATURES = {"C": "celsius", "F": "fahrenheit", "K": "K"}
_ANGLE = Unit((("degree", 1),), Fraction(1))


def equal_quantities(gold: Node, answer: Node, equal: Equal, *, is_strict: bool) -> bool:
    """At least one of them is a unit node. `is_strict`: a gold's unit has to be given."""
    if gold.kind != answer.kind:
        read = [
            side if side.kind == "unit" else quantity_of_product(side) for side in (gold, answer)
        ]
        if None not in read and equal(*[_in_base(side) for side in read if side is not None]):
            return _same_dimension(*[side.name for side in read if side is not None])
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


def _same_dimension(left: str, right: str) -> bool:
    ours, theirs = read_unit(left), read_unit(right)
    return ours is not None and theirs is not None and ours.dimension == theirs.dimension


def _same_words(left: str, right: str) -> bool:
    """Unknown units: the same head word; a rate and an exponent have to agree."""
    exponents = {match[1] for match in map(_EXPONENT.search, (left, right)) if match is not None}
    if len(exponents) > 1:
        return False
    ours, theirs = _words(left), _words(right)
    if _RATES & (set(ours) ^ set(theirs)):
        return False
    if not ours or not theirs or set(ours) == set(theirs) or _GENERIC & {*ours, *theirs}:
        return True
    if _RATES & {*ours, *theirs}:
        return False
    if min(len(ours[-1]), len(theirs[-1]), len(ours[0]), len(theirs[0])) < 2:
        return False
    return ours[-1] == theirs[-1] or ours[0] == theirs[0] and 1 in (len(ours), len(theirs))


def _same_start(left: str, right: str) -> bool:
    """A known unit and a longer text: inches, inches wide; or units of no name."""
    ours, theirs = _words(left), _words(right)
    if _GENERIC & {*ours, *theirs}:
        return _same_words(left, right)
    size = min(len(ours), len(theirs))
    return ours[:size] == theirs[:size] and not _RATES & {*ours[size:], *theirs[size:]}


_EXPONENT = re.compile(r"\^\s*\{?\s*(\d+)|\b(?:(?P<square>square|sq)|cubic)\b")


def _words(name: str) -> list[str]:
    """Its words in lower case and singular."""
    words = re.findall(r"[a-z]+|/", name.lower())
    words = [word for word in words if word not in _IDLE or len(words) == 1]
    return [re.sub(r"(?<=[a-z]{2})(?:ies|y|es|s)$", "", word) for word in words]


def quantity_of_product(node: Node) -> Node | None:
    r"""5 m^2, 9.8 \\frac{m}{s^2}: a product of a number with symbols of units, as a quantity.

    None for other products.
    """
    if node.kind not in ("mul", "num"):
        return None
    numbers, units = [], []
    for factor in node.args:
        powers = _unit_powers(factor, 1)
        if powers is None:
            numbers.append(factor)
        else:
            units += powers
    if not units or not numbers or any(item.kind == "sym" for n in numbers for item in walk(n)):
        return None
    name = " * ".join(f"{unit}^{power}" for unit, power in units)
    value = numbers[0] if len(numbers) == 1 else Node("mul", tuple(numbers))
    return Node("unit", (value,), name.replace("^1 ", " ").removesuffix("^1"))


def _unit_powers(node: Node, exponent: int) -> list[tuple[str, int]] | None:
    """Unit symbols with their exponents; None where anything else takes part."""
    if node.kind == "sym" and is_unit(node.name):
        return [(node.name, exponent)]
    if node.kind == "pow" and node.args[1].kind == "num":
        power = node.args[1].number
        is_small = power.denominator == 1 and abs(power) < 10
        return _unit_powers(node.args[0], exponent * int(power)) if is_small else None
    if node.kind == "mul":
        parts = [_unit_powers(factor, exponent) for factor in node.args]
        if None not in parts:
            return [item for part in parts if part is not None for item in part]
    return None


def temperature(node: Node, letter: str) -> Node | None:
    r"""-3^\\circ with a C behind it as a temperature; None where the node is no angle."""
    value = _without_degrees(node)
    return None if value is None else Node("unit", (value,), _TEMPERATURES[letter])


def _without_degrees(node: Node) -> Node | None:
    if node.kind == "deg":
        return node.args[0]
    if node.kind == "mul" and node.args[-1].kind == "deg":
        return node._replace(args=(*node.args[:-1], node.args[-1].args[0]))
    return None


def is_temperature(text: str) -> bool:
    """Is this the letter of a temperature scale?"""
    return text in _TEMPERATURES


def compound(first: Node, second: Node) -> Node | None:
    """3 h and 20 min as one quantity; None where they do not add up, largest unit first."""
    if first.kind != "unit" or second.kind != "unit":
        return None
    larger, smaller = read_unit(first.name), read_unit(second.name)
    if larger is None or smaller is None or larger.dimension != smaller.dimension:
        return None
    if not smaller.scale < larger.scale:
        return None
    ratio = number_node(smaller.scale / larger.scale)
    part = Node("mul", (ratio, second.args[0]))
    whole = first.args[0]
    terms = (*whole.args, part) if whole.kind == "add" else (whole, part)
    return Node("unit", (Node("add", terms),), first.name)
