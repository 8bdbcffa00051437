"""Piecewise functions, compared by their values at and on both sides of each boundary."""

from __future__ import annotations

import operator
from fractions import Fraction

from rewards.equality.exact import Undecided
from rewards.equality.numeric import FLOATS, differ, value_of
from rewards.parsing.nodes import Node

_ORDER = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
    "!=": operator.ne,
}  # fmt: skip
MAX_ROWS = 12


def is_piecewise(node: Node) -> bool:
    """Is this a list of values with conditions?"""
    return node.kind == "list" and 1 < len(node.args) <= MAX_ROWS and all(map(_is_row, node.args))


def _is_row(node: Node) -> bool:
    if node.kind != "seq" or node.name != "case" or len(node.args) != 2:
        return False
    condition = node.args[1]
    return (
        condition.kind == "text"
        or condition.kind == "rel"
        and set(condition.name.split(" ")) <= set(_ORDER)
    )


def same_pieces(gold: Node, answer: Node) -> bool:
    """Compare two functions of one unknown, at least one of them piecewise. Raises Undecided."""
    names = gold.symbols() | answer.symbols()
    if len(names) != 1:
        raise Undecided
    (name,) = names
    numbers = {item.number for side in (gold, answer) for item in side.walk() if item.kind == "num"}
    ends = sorted({Fraction(0), *numbers, *(-number for number in numbers)})[:32]
    places = [*ends, *(end + Fraction(37, 101) for end in ends)]
    places += [ends[0] - Fraction(57, 101), ends[0] - 41, ends[-1] + 43]
    num_agreed = 0
    for place in places:
        values = {name: FLOATS.number(place)}
        try:
            left, right = _value(gold, values), _value(answer, values)
        except Undecided:
            continue
        if (left is None) != (right is None):
            return False
        if left is None or right is None:
            continue
        if max(abs(left), abs(right)) > 1e-12 and differ(left, right, 1e-9):
            return False
        num_agreed += 1
    if num_agreed < 3:
        raise Undecided
    return True


def _value(node: Node, values: dict[str, float]) -> float | complex | None:
    """The value of the first piece whose condition holds at a point; None if there is none."""
    if not is_piecewise(node):
        return value_of(node, values, FLOATS)
    for row in node.args:
        if _holds(row.args[1], values):
            return value_of(row.args[0], values, FLOATS)
    return None


def _holds(condition: Node, values: dict[str, float]) -> bool:
    if condition.kind == "text":  # otherwise
        return True
    sides = [value_of(item, values, FLOATS) for item in condition.args]
    names = condition.name.split(" ")
    try:
        return all(
            _ORDER[name](left, right)
            for name, left, right in zip(names, sides, sides[1:], strict=False)
        )
    except TypeError as error:  # complex numbers have no order
        raise Undecided from error
