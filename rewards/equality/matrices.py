"""Products, sums and multiples of literal matrices."""

from __future__ import annotations

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


def _matrix(rows: list[list[Node]]) -> Node:
    return Node("matrix", tuple(Node("seq", tuple(row), "row") for row in rows))


def _multiply(left: Node, right: Node) -> Node:
    if left.kind != "matrix" and right.kind != "matrix":
        return Node("mul", (left, right))
    if left.kind == "matrix" and right.kind == "matrix":
        a, b = _cells(left), _cells(right)
        if len(a[0]) != len(b):
            raise ParseError
        rows = []
        for row in a:
            columns = range(len(b[0]))
            rows.append(
                [
                    Node("add", tuple(Node("mul", (x, b[k][c])) for k, x in enumerate(row)))
                    for c in columns
                ]
            )
        return _matrix(rows)
    scalar, matrix = (right, left) if left.kind == "matrix" else (left, right)
    return _matrix([[Node("mul", (scalar, cell)) for cell in row] for row in _cells(matrix)])


def _add(left: Node, right: Node) -> Node:
    if left.kind != "matrix" or right.kind != "matrix":
        raise ParseError
    a, b = _cells(left), _cells(right)
    if len(a) != len(b) or len(a[0]) != len(b[0]):
        raise ParseError
    return _matrix(
        [[Node("add", pair) for pair in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True)]
    )
