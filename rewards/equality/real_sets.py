r"""Subsets of the real line as a Region, a union of pieces.

`x < 5`, `(-\infty, 5)` and `\{x \mid x < 5\}` are the same region.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from rewards.equality.exact import quadratic
from rewards.equality.line import (
    HIGHEST,
    LINE,
    LOWEST,
    MAX_PIECES,
    NotARegion,
    Region,
    between,
    complement,
    end_at,
    intersect,
    normalised,
    order_of,
    point,
    unite,
)
from rewards.parsing.nodes import HALF, UNNAMED, Node, divide, negative, number_node

_INTEGERS = {"\\mathbb{Z}": None, "\\mathbb{N}": 1, "\\mathbb{Z}^+": 1}  # and the least one
_WHOLE_LINE = ("\\mathbb{R}", "\\mathbb R", "R")
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_MAGNITUDE = Node("sym", name="\\magnitude")


def to_region(node: Node) -> Region:
    """The region that an answer describes. Raises NotARegion if it does not describe one."""
    kind = node.kind
    if kind == "seq" and len(node.args) == 2 and node.name in ("()", "[)", "(]", "[]"):
        low, high = node.args
        piece = between(end_at(low, node.name[0] == "["), end_at(high, node.name[1] == "]"))
        if piece.low.value == piece.high.value:
            raise NotARegion
        return Region((piece,))
    if kind == "set" and all(item.kind not in ("seq", "set", "text") for item in node.args):
        return normalised([point(item) for item in node.args])
    if kind == "sym" and node.name in _WHOLE_LINE:
        return LINE
    if kind == "union":
        return unite([to_region(item) for item in node.args])
    if kind == "inter":
        return functools.reduce(intersect, map(to_region, node.args))
    if kind == "minus":
        return intersect(to_region(node.args[0]), complement(to_region(node.args[1])))
    if kind == "builder":
        return _from_builder(node)
    if kind == "rel":
        region = _from_relation(node)
        # "at least 5" has no name for its unknown.
        return dataclasses.replace(region, variable=None) if region.variable == UNNAMED else region
    if kind == "list" and node.args:
        return _from_list(node)
    if kind == "label":
        return to_region(node.args[0])
    raise NotARegion


def _from_builder(node: Node) -> Region:
    element, condition = node.args
    region = to_region(condition)
    if element.kind == "rel" and element.name == "in":
        if element.args[1].name in _INTEGERS:
            region = _integers_in(region, _INTEGERS[element.args[1].name])
            domain = LINE
        else:
            domain = to_region(element.args[1])
        region, element = intersect(region, domain), element.args[0]
    if region.variable is not None and region.variable != element:
        raise NotARegion
    return dataclasses.replace(region, variable=None)


def _integers_in(region: Region, least: int | None) -> Region:
    """The integers in a bounded region, each as its own piece."""
    found: set[int] = set()
    for piece in region.pieces:
        low = piece.low.value if least is None else max(piece.low.value, least)
        if not piece.high.value - low < MAX_PIECES:
            raise NotARegion
        excluded = {end.value for end in piece if not end.is_closed}
        found |= {*range(math.ceil(low), math.floor(piece.high.value) + 1)} - excluded
    points = [point(number_node(value)) for value in sorted(found)]
    return dataclasses.replace(normalised(points), variable=region.variable)


def _from_list(node: Node) -> Region:
    """The union for 'or', else the intersection; the union for commas if that is empty."""
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
        both = functools.reduce(intersect, regions)
        if both.pieces or node.name == "and":
            return dataclasses.replace(both, variable=variable)
    return dataclasses.replace(unite(regions), variable=variable)


def _from_relation(node: Node) -> Region:
    """The set of x for `-2 < x \\le 7`, `x \\ne 3`, `x \\in [0, 1]`, `-2x > 6`."""
    operators = node.name.split(" ")
    if operators == ["in"]:
        return dataclasses.replace(to_region(node.args[1]), variable=node.args[0])
    if len(operators) == 1 and operators[0] in FLIPPED:
        return solve(node.args[0], operators[0], node.args[1])
    if len(operators) == 2 and all(operator in ("<", "<=", ">", ">=") for operator in operators):
        if (operators[0][0] == "<") != (operators[1][0] == "<"):
            raise NotARegion
        left = solve(node.args[0], operators[0], node.args[1])
        right = solve(node.args[1], operators[1], node.args[2])
        if left.variable != right.variable:
            raise NotARegion
        return intersect(left, right)
    raise NotARegion


def solve(left: Node, operator: str, right: Node) -> Region:
    """The region of the unknown for which a relation holds. Raises NotARegion."""
    within = _magnitude_of(left, right)
    if within is not None:
        return _from_magnitude(left, operator, right, within)
    if not _is_variable(left) and _is_variable(right):
        left, operator, right = right, FLIPPED[operator], left
    if not _is_variable(left):
        try:
            left, operator, right = _solve_linear(left, operator, right)
        except NotARegion:
            return _solve_quadratic(left, operator, right)
    if left.kind == "sym" and left.name in right.symbols():
        raise NotARegion
    end = end_at(right, operator in ("<=", ">="))
    below, above = between(LOWEST, end), between(end, HIGHEST)
    pieces = {"=": (point(right),), "!=": (below, above), "<": (below,), ">": (above,)}
    return Region(pieces[operator if operator == "!=" else operator[0]], left)


def _magnitude_of(left: Node, right: Node) -> Node | None:
    """The |x - 1| of |x - 1| < 2, if there are no unknowns outside it."""
    found = {item for item in (*left.walk(), *right.walk()) if _is_magnitude(item)}
    if len(found) != 1:
        return None
    (magnitude,) = found
    outside = (
        left.substitute(magnitude, _MAGNITUDE).symbols()
        | right.substitute(magnitude, _MAGNITUDE).symbols()
    )
    return magnitude if magnitude.symbols() and outside == {_MAGNITUDE.name} else None


def _is_magnitude(node: Node) -> bool:
    return node.kind == "func" and node.name == "abs"


def _from_magnitude(left: Node, operator: str, right: Node, magnitude: Node) -> Region:
    """Solve |u| < c as -c < u < c, and |u| > c as u < -c or u > c."""
    left, right = left.substitute(magnitude, _MAGNITUDE), right.substitute(magnitude, _MAGNITUDE)
    if right == _MAGNITUDE:
        left, operator, right = right, FLIPPED[operator], left
    if left != _MAGNITUDE:
        left, operator, right = _solve_linear(left, operator, right)
    if not order_of(right) >= 0:
        raise NotARegion
    inner = magnitude.args[0]
    above = solve(inner, operator, right)
    below = solve(inner, FLIPPED[operator], negative(right))
    if operator in ("<", "<=", "!="):
        return intersect(above, below)
    return unite([above, below])


def _is_variable(node: Node) -> bool:
    return node.kind in ("sym", "call")


def _solve_linear(left: Node, operator: str, right: Node) -> tuple[Node, str, Node]:
    """a x + b < c, with rational a and b, as x < (c - b) / a."""
    name = _only_symbol(left, right)
    if name in left.symbols() & right.symbols():
        left, right = Node("add", (left, negative(right))), number_node(0)
    elif name in right.symbols():
        left, operator, right = right, FLIPPED[operator], left
    coefficients = quadratic(left, name)
    if coefficients is None or coefficients[0] or not coefficients[1]:
        raise NotARegion
    _, slope, constant = coefficients
    shifted = Node("add", (right, number_node(-constant))) if constant else right
    bound = divide(shifted, number_node(slope)) if slope != 1 else shifted
    return Node("sym", name=name), operator if slope > 0 else FLIPPED[operator], bound


def _only_symbol(left: Node, right: Node) -> str:
    names = left.symbols() | right.symbols()
    if len(names) != 1:
        raise NotARegion
    return next(iter(names))


def _solve_quadratic(left: Node, operator: str, right: Node) -> Region:
    """x^2 < 4, with rational coefficients, as -2 < x < 2."""
    name = _only_symbol(left, right)
    coefficients = quadratic(Node("add", (left, negative(right))), name)
    if coefficients is None or not coefficients[0]:
        raise NotARegion
    a, b, c = coefficients
    operator = operator if a > 0 else FLIPPED[operator]
    variable = Node("sym", name=name)
    square = b * b - 4 * a * c
    if square < 0 or (square == 0 and operator in ("<", ">=")):  # nowhere or everywhere
        if operator[0] not in (">", "!"):
            raise NotARegion
        return Region(LINE.pieces, variable)
    root = Node("pow", (number_node(square), HALF))
    low, high = (
        divide(Node("add", (number_node(-b), side)), number_node(2 * a))
        for side in ((negative(root), root) if a > 0 else (root, negative(root)))
    )
    if operator in ("=", "!="):
        inside = normalised([point(low), point(high)])
    else:
        is_closed = operator in ("<=", ">")
        inside = Region((between(end_at(low, is_closed), end_at(high, is_closed)),))
    is_inside = operator in ("=", "<", "<=")
    return Region((inside if is_inside else complement(inside)).pieces, variable)
