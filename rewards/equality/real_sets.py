r"""Subsets of the real line as a Region, a union of pieces.

`x < 5`, `(-\infty, 5)` and `\{x \mid x < 5\}` are the same region.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from rewards.equality.inequalities import FLIPPED, solve
from rewards.equality.line import (
    LINE,
    MAX_PIECES,
    NotARegion,
    Region,
    complement,
    intersect,
    make_piece,
    normalised,
    unite,
)
from rewards.parsing.nodes import UNNAMED, Node, number_node

_INTEGERS = {"\\mathbb{Z}": None, "\\mathbb{N}": 1, "\\mathbb{Z}^+": 1}  # and the least one
_WHOLE_LINE = ("\\mathbb{R}", "\\mathbb R", "R")


def to_region(node: Node) -> Region:
    """The region that an answer describes. Raises NotARegion if it does not describe one."""
    kind = node.kind
    if kind == "seq" and len(node.args) == 2 and node.name in ("()", "[)", "(]", "[]"):
        low, high = node.args
        piece = make_piece(low, node.name[0] == "[", high, node.name[1] == "]")
        if piece.low_value == piece.high_value:
            raise NotARegion
        return Region((piece,))
    if kind == "set" and all(item.kind not in ("seq", "set", "text") for item in node.args):
        return normalised([make_piece(item, True, item, True) for item in node.args])
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
        return from_relation(node)
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
        low = piece.low_value if least is None else max(piece.low_value, least)
        if not piece.high_value - low < MAX_PIECES:
            raise NotARegion
        for value in range(math.ceil(low), math.floor(piece.high_value) + 1):
            is_low_end = value == piece.low_value and not piece.is_low_closed
            if not is_low_end and not (value == piece.high_value and not piece.is_high_closed):
                found.add(value)
    nodes = [number_node(value) for value in sorted(found)]
    return dataclasses.replace(
        normalised([make_piece(node, True, node, True) for node in nodes]), variable=region.variable
    )


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


def from_relation(node: Node) -> Region:
    """The region of a relation in one unknown, which may be unnamed ("at least 5")."""
    region = _solved(node)
    return dataclasses.replace(region, variable=None) if region.variable == UNNAMED else region


def _solved(node: Node) -> Region:
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
