"""Products, sums and multiples of literal matrices."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from rewards.parsing.nodes import Node, ParseError

MAX_CELLS = 64
_TRANSPARENT = ("list", "set", "rel", "label", "unit", "seq")


def reduce_matrices(node: Node) -> Node:
    """Evaluate matrix arithmetic in a tree; a tree without it is returned unchanged."""
    if node.kind not in ("mul", "add", *_TRANSPARENT) or not node.args:
        return node
    if node.kind in _TRANSPARENT:
        args = tuple(reduce_matrices(item) for item in node.args)
        return node if args == node.args else node._replace(args=args)
    args = tuple(reduce_matrices(item) for item in node.args)
    if not any(item.kind == "matrix" for item in args):
        return node
    result = args[0]
    for item in args[1:]:
        result = _multiply(result, item) if node.kind == "mul" else _add(result, item)
    return result


def _cells(matrix: Node) -> list[tuple[Node, ...]]:
    rows = [row.args for row in matrix.args]
    if len(rows) * len(rows[0]) > MAX_CELLS:
        raise ParseError
    return rows


def _matrix(rows: Iterable[Iterable[Node]]) -> Node:
    return Node("matrix", tuple(Node("seq", tuple(row), "row") for row in rows))


def _multiply(left: Node, right: Node) -> Node:
    if left.kind == right.kind == "matrix":
        a, b = _cells(left), _cells(right)
        if len(a[0]) != len(b):
            raise ParseError
        columns = list(zip(*b, strict=True))
        return _matrix([[_dot(row, column) for column in columns] for row in a])
    if "matrix" not in (left.kind, right.kind):
        return Node("mul", (left, right))
    scalar, matrix = (right, left) if left.kind == "matrix" else (left, right)
    return _matrix([[Node("mul", (scalar, cell)) for cell in row] for row in _cells(matrix)])


def _dot(row: tuple[Node, ...], column: tuple[Node, ...]) -> Node:
    return Node("add", tuple(Node("mul", pair) for pair in zip(row, column, strict=True)))


def _add(left: Node, right: Node) -> Node:
    if left.kind != "matrix" or right.kind != "matrix":
        raise ParseError
    rows = list(zip_longest(_cells(left), _cells(right), fillvalue=()))
    if any(len(one) != len(other) for one, other in rows):
        raise ParseError
    return _matrix([[Node("add", pair) for pair in zip(*row, strict=True)] for row in rows])
