r"""Subsets of the real line: intervals, unions, inequalities, set-builders, excluded points.

All of them become a Region: a union of pieces. `x < 5`, `(-\infty, 5)` and `\{x \mid x < 5\}` are
the same region.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from rewards.exact import Undecided, exact
from rewards.nodes import (
    INFINITY,
    UNNAMED,
    Node,
    divide,
    negative,
    number_node,
    replace,
    symbols,
    walk,
)
from rewards.numeric import FLOATS, is_real, value_of

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_MAGNITUDE = Node("sym", name="\\magnitude")
_INTEGERS = {"\\mathbb{Z}": None, "\\mathbb{N}": 1, "\\mathbb{Z}^+": 1}  # and the least of them
_WHOLE_LINE = ("\\mathbb{R}", "\\mathbb R", "R")
MAX_PIECES = 64


class NotARegion(Exception):
    """The answer does not describe a subset of the real line."""


class Piece(NamedTuple):
    """From `low` to `high`; `low_value`, `high_value` order them (NaN where symbols remain)."""

    low: Node
    is_low_closed: bool
    high: Node
    is_high_closed: bool
    low_value: float
    high_value: float


@dataclass(frozen=True)
class Region:
    """A union of pieces; `variable` is what lies in it, None where the answer does not say."""

    pieces: tuple[Piece, ...]
    variable: Node | None = None

    @property
    def is_numeric(self) -> bool:
        return not any(math.isnan(p.low_value) or math.isnan(p.high_value) for p in self.pieces)


MINUS_INFINITY = negative(INFINITY)
LINE = Region((Piece(MINUS_INFINITY, False, INFINITY, False, -math.inf, math.inf),))


def _order(node: Node) -> float:
    if node == INFINITY:
        return math.inf
    if node == MINUS_INFINITY:
        return -math.inf
    if symbols(node):
        return math.nan
    try:
        value = value_of(node, {}, FLOATS)
    except Undecided:
        raise NotARegion from None
    if not is_real(value):
        raise NotARegion
    return float(getattr(value, "real", value))


def _piece(low: Node, is_low_closed: bool, high: Node, is_high_closed: bool) -> Piece:
    low_value, high_value = _order(low), _order(high)
    if low_value > high_value:
        raise NotARegion
    is_low_closed = is_low_closed and not math.isinf(low_value)
    is_high_closed = is_high_closed and not math.isinf(high_value)
    return Piece(low, is_low_closed, high, is_high_closed, low_value, high_value)


def to_region(node: Node) -> Region:
    """Raises NotARegion."""
    kind = node.kind
    if kind == "seq" and len(node.args) == 2 and node.name in ("()", "[)", "(]", "[]"):
        low, high = node.args
        piece = _piece(low, node.name[0] == "[", high, node.name[1] == "]")
        if piece.low_value == piece.high_value:
            raise NotARegion
        return Region((piece,))
    if kind == "set" and all(item.kind not in ("seq", "set", "text") for item in node.args):
        return _normalised([_piece(item, True, item, True) for item in node.args])
    if kind == "sym" and node.name in _WHOLE_LINE:
        return LINE
    if kind == "union":
        return _union([to_region(item) for item in node.args])
    if kind == "inter":
        regions = [to_region(item) for item in node.args]
        return _fold(regions, _intersect)
    if kind == "minus":
        return _intersect(to_region(node.args[0]), _complement(to_region(node.args[1])))
    if kind == "builder":
        return _from_builder(node)
    if kind == "rel":
        return from_relation(node)
    if kind == "list" and node.args:
        return _from_list(node)
    if kind == "label":
        return to_region(node.args[0])
    raise NotARegion


def _fold(regions: list[Region], combine: Callable[[Region, Region], Region]) -> Region:
    result = regions[0]
    for region in regions[1:]:
        result = combine(result, region)
    return result


def _from_builder(node: Node) -> Region:
    element, condition = node.args
    region = to_region(condition)
    if element.kind == "rel" and element.name == "in":
        if element.args[1].name in _INTEGERS:
            region = _integers_in(region, _INTEGERS[element.args[1].name])
            domain = LINE
        else:
            domain = to_region(element.args[1])
        region, element = _intersect(region, domain), element.args[0]
    if region.variable is not None and region.variable != element:
        raise NotARegion
    return dataclasses.replace(region, variable=None)


def _integers_in(region: Region, least: int | None) -> Region:
    """The integers of a bounded region, each a piece of its own."""
    found: set[int] = set()
    for piece in region.pieces:
        low = piece.low_value if least is None else max(piece.low_value, least)
        if not piece.high_value - low < MAX_PIECES:
            raise NotARegion
        for value in range(math.ceil(low), math.floor(piece.high_value) + 1):
            is_low_end = value == piece.low_value and not piece.is_low_closed
            if not is_low_end and not (value == piece.high_value and not piece.is_high_closed):
                found.add(value)
    nodes = [number_node(value) for value in sorted(found)]
    return dataclasses.replace(
        _normalised([_piece(node, True, node, True) for node in nodes]), variable=region.variable
    )


def _from_list(node: Node) -> Region:
    """Inequalities: 'or' unites, 'and' intersects; so does a comma, unless that is empty."""
    if not all(item.kind in ("rel", "union", "seq") for item in node.args):
        raise NotARegion
    if all(item.kind == "seq" for item in node.args) and node.name != "or":
        raise NotARegion
    regions = [to_region(item) for item in node.args]
    variables = {region.variable for region in regions if region.variable is not None}
    if len(variables) > 1:
        raise NotARegion
    variable = next(iter(variables), None)
    if node.name != "or" and all(region.is_numeric for region in regions):
        both = _fold(regions, _intersect)
        if both.pieces or node.name == "and":
            return dataclasses.replace(both, variable=variable)
    return dataclasses.replace(_union(regions), variable=variable)


def from_relation(node: Node) -> Region:
    """The region of a relation in one unknown, which "at least 5" does not name."""
    region = _solved(node)
    return dataclasses.replace(region, variable=None) if region.variable == UNNAMED else region


def _solved(node: Node) -> Region:
    """`-2 < x \\le 7`, `x \\ne 3`, `x \\in [0, 1]`, `-2x > 6`: the set of x."""
    operators = node.name.split(" ")
    if operators == ["in"]:
        return dataclasses.replace(to_region(node.args[1]), variable=node.args[0])
    if len(operators) == 1 and operators[0] in _FLIPPED:
        return _half_line(node.args[0], operators[0], node.args[1])
    if len(operators) == 2 and all(operator in ("<", "<=", ">", ">=") for operator in operators):
        if (operators[0][0] == "<") != (operators[1][0] == "<"):
            raise NotARegion
        left = _half_line(node.args[0], operators[0], node.args[1])
        right = _half_line(node.args[1], operators[1], node.args[2])
        if left.variable != right.variable:
            raise NotARegion
        return _intersect(left, right)
    raise NotARegion


def _half_line(left: Node, operator: str, right: Node) -> Region:
    within = _magnitude_of(left, right)
    if within is not None:
        return _from_magnitude(left, operator, right, within)
    if not _is_variable(left) and _is_variable(right):
        left, operator, right = right, _FLIPPED[operator], left
    if not _is_variable(left):
        left, operator, right = _solve_linear(left, operator, right)
    if left.kind == "sym" and left.name in symbols(right):
        raise NotARegion
    if operator == "=":
        return Region((_piece(right, True, right, True),), left)
    if operator == "!=":
        below = _piece(MINUS_INFINITY, False, right, False)
        return Region((below, _piece(right, False, INFINITY, False)), left)
    is_closed = operator.endswith("=")
    if operator[0] == "<":
        return Region((_piece(MINUS_INFINITY, False, right, is_closed),), left)
    return Region((_piece(right, is_closed, INFINITY, False),), left)


def _magnitude_of(left: Node, right: Node) -> Node | None:
    """The |x - 1| of |x - 1| < 2, where nothing else holds an unknown."""
    found = {item for item in (*walk(left), *walk(right)) if _is_magnitude(item)}
    if len(found) != 1:
        return None
    (magnitude,) = found
    outside = symbols(replace(left, magnitude, _MAGNITUDE)) | symbols(
        replace(right, magnitude, _MAGNITUDE)
    )
    return magnitude if symbols(magnitude) and outside == {_MAGNITUDE.name} else None


def _is_magnitude(node: Node) -> bool:
    return node.kind == "func" and node.name == "abs"


def _from_magnitude(left: Node, operator: str, right: Node, magnitude: Node) -> Region:
    """|u| < c as -c < u < c, |u| > c as u < -c or u > c; inside, u is solved again."""
    left, right = replace(left, magnitude, _MAGNITUDE), replace(right, magnitude, _MAGNITUDE)
    if right == _MAGNITUDE:
        left, operator, right = right, _FLIPPED[operator], left
    if left != _MAGNITUDE:
        left, operator, right = _solve_linear(left, operator, right)
    if not _order(right) >= 0:
        raise NotARegion
    inner = magnitude.args[0]
    above = _half_line(inner, operator, right)
    below = _half_line(inner, _FLIPPED[operator], negative(right))
    if operator in ("<", "<=", "!="):
        return _intersect(above, below)
    return _union([above, below])


def _is_variable(node: Node) -> bool:
    return node.kind in ("sym", "call")


def _solve_linear(left: Node, operator: str, right: Node) -> tuple[Node, str, Node]:
    r"""a x + b < c with rational coefficients as x < (c - b) / a."""
    names = symbols(left) | symbols(right)
    if len(names) != 1:
        raise NotARegion
    (name,) = names
    difference = Node("add", (left, negative(right)))
    try:
        at = [exact(difference, {name: place}) for place in (0, 1, 2, 7, -3, 1000)]
    except Undecided:
        return _solve_scaled(left, operator, right, name)
    slope = at[1] - at[0]
    steps = zip(at[2:], (2, 7, -3, 1000), strict=True)
    if slope == 0 or any(value != at[0] + step * slope for value, step in steps):
        raise NotARegion
    bound = number_node(Fraction(-at[0], slope))
    return Node("sym", name=name), operator if slope > 0 else _FLIPPED[operator], bound


def _solve_scaled(left: Node, operator: str, right: Node, name: str) -> tuple[Node, str, Node]:
    """-x < \\sqrt{2}: a rational multiple of x against a constant."""
    if name in symbols(right):
        left, operator, right = right, _FLIPPED[operator], left
    if name in symbols(right):
        raise NotARegion
    try:
        at = [exact(left, {name: place}) for place in (0, 1, 2, -3)]
    except Undecided:
        raise NotARegion from None
    slope = at[1] - at[0]
    if slope == 0 or (at[2], at[3]) != (at[0] + 2 * slope, at[0] - 3 * slope):
        raise NotARegion
    shifted = Node("add", (right, number_node(-at[0]))) if at[0] else right
    bound = divide(shifted, number_node(slope)) if slope != 1 else shifted
    return Node("sym", name=name), operator if slope > 0 else _FLIPPED[operator], bound


def _normalised(pieces: list[Piece]) -> Region:
    """Sort, and merge pieces that touch; symbolic endpoints stay as they are."""
    region = Region(tuple(pieces))
    if not region.is_numeric:
        return region
    if len(pieces) > MAX_PIECES:
        raise NotARegion
    merged: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.low_value, not p.is_low_closed)):
        last = merged[-1] if merged else None
        if last is not None and (
            piece.low_value < last.high_value
            or (piece.low_value == last.high_value and (piece.is_low_closed or last.is_high_closed))
        ):
            if (piece.high_value, piece.is_high_closed) > (last.high_value, last.is_high_closed):
                merged[-1] = last._replace(
                    high=piece.high,
                    high_value=piece.high_value,
                    is_high_closed=piece.is_high_closed,
                )
        else:
            merged.append(piece)
    return Region(tuple(merged))


def _union(regions: list[Region]) -> Region:
    pieces = [piece for region in regions for piece in region.pieces]
    variables = [region.variable for region in regions if region.variable is not None]
    return dataclasses.replace(_normalised(pieces), variable=variables[0] if variables else None)


def _intersect(left: Region, right: Region) -> Region:
    if left.pieces == LINE.pieces:
        return right if right.variable else dataclasses.replace(right, variable=left.variable)
    if right.pieces == LINE.pieces:
        return left
    pieces = []
    for a in left.pieces:
        for b in right.pieces:
            piece = _meet(a, b)
            if piece is not None:
                pieces.append(piece)
    return dataclasses.replace(_normalised(pieces), variable=left.variable or right.variable)


def _meet(a: Piece, b: Piece) -> Piece | None:
    """The common part; with symbolic ends only where one of them is infinite."""
    if math.isinf(a.low_value) or b.low_value > a.low_value:
        low, is_low_closed, low_value = b.low, b.is_low_closed, b.low_value
    elif math.isinf(b.low_value) or a.low_value > b.low_value:
        low, is_low_closed, low_value = a.low, a.is_low_closed, a.low_value
    elif a.low_value == b.low_value:
        low, low_value = a.low, a.low_value
        is_low_closed = a.is_low_closed and b.is_low_closed
    else:
        raise NotARegion
    if math.isinf(a.high_value) or b.high_value < a.high_value:
        high, is_high_closed, high_value = b.high, b.is_high_closed, b.high_value
    elif math.isinf(b.high_value) or a.high_value < b.high_value:
        high, is_high_closed, high_value = a.high, a.is_high_closed, a.high_value
    elif a.high_value == b.high_value:
        high, high_value = a.high, a.high_value
        is_high_closed = a.is_high_closed and b.is_high_closed
    else:
        raise NotARegion
    if low_value > high_value:
        return None
    if low_value == high_value and not (is_low_closed and is_high_closed):
        return None
    return Piece(low, is_low_closed, high, is_high_closed, low_value, high_value)


def _complement(region: Region) -> Region:
    if not region.is_numeric:
        raise NotARegion
    pieces = []
    low, is_low_closed, low_value = MINUS_INFINITY, False, -math.inf
    for piece in region.pieces:
        is_point_gap = piece.low_value == low_value
        if piece.low_value > low_value or (is_point_gap and is_low_closed):
            is_closed = not piece.is_low_closed and not math.isinf(piece.low_value)
            if piece.low_value > -math.inf:
                pieces.append(
                    Piece(low, is_low_closed, piece.low, is_closed, low_value, piece.low_value)
                )
        low, low_value = piece.high, piece.high_value
        is_low_closed = not piece.is_high_closed
    if low_value < math.inf:
        pieces.append(Piece(low, is_low_closed, INFINITY, False, low_value, math.inf))
    return Region(tuple(pieces))


def equal_regions(left: Region, right: Region, equal: Callable[[Node, Node], bool]) -> bool:
    """Same pieces, in any order, with the same kind of ends. `equal` compares endpoints."""
    if len(left.pieces) != len(right.pieces):
        return False
    remaining = list(right.pieces)
    for piece in left.pieces:
        match = next((other for other in remaining if _same_piece(piece, other, equal)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


def _same_piece(left: Piece, right: Piece, equal: Callable[[Node, Node], bool]) -> bool:
    if (left.is_low_closed, left.is_high_closed) != (right.is_low_closed, right.is_high_closed):
        return False
    for a, b in ((left.low_value, right.low_value), (left.high_value, right.high_value)):
        if (math.isinf(a) or math.isinf(b)) and a != b:
            return False
        if abs(a - b) > 1e-2 * max(1.0, abs(a)):
            return False
    ends = ((left.low, right.low), (left.high, right.high))
    return all(a == b or equal(a, b) for a, b in ends)
