r"""Solves inequalities in one unknown: -2x > 6, |x - 1| < 2, x^2 \ge 4."""

from __future__ import annotations

from fractions import Fraction

from rewards.equality.exact import Undecided, exact
from rewards.equality.line import (
    LINE,
    MINUS_INFINITY,
    NotARegion,
    Region,
    complement,
    intersect,
    make_piece,
    order_of,
    unite,
)
from rewards.parsing.nodes import (
    HALF,
    INFINITY,
    Node,
    divide,
    negative,
    number_node,
    replace,
    symbols,
    walk,
)

FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "!=": "!=", "=": "="}
_MAGNITUDE = Node("sym", name="\\magnitude")
_PLACES = (2, 7, -3, 1000)  # where a quadratic formula is checked


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
    if left.kind == "sym" and left.name in symbols(right):
        raise NotARegion
    if operator == "=":
        return Region((make_piece(right, True, right, True),), left)
    if operator == "!=":
        below = make_piece(MINUS_INFINITY, False, right, False)
        return Region((below, make_piece(right, False, INFINITY, False)), left)
    is_closed = operator.endswith("=")
    if operator[0] == "<":
        return Region((make_piece(MINUS_INFINITY, False, right, is_closed),), left)
    return Region((make_piece(right, is_closed, INFINITY, False),), left)


def _magnitude_of(left: Node, right: Node) -> Node | None:
    """The |x - 1| of |x - 1| < 2, if there are no unknowns outside it."""
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
    """Solve |u| < c as -c < u < c, and |u| > c as u < -c or u > c."""
    left, right = replace(left, magnitude, _MAGNITUDE), replace(right, magnitude, _MAGNITUDE)
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
    """a x + b < c, with rational coefficients, as x < (c - b) / a."""
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
    return Node("sym", name=name), operator if slope > 0 else FLIPPED[operator], bound


def _solve_scaled(left: Node, operator: str, right: Node, name: str) -> tuple[Node, str, Node]:
    """-x < \\sqrt{2}: a rational linear term in x against a constant."""
    if name in symbols(right):
        left, operator, right = right, FLIPPED[operator], left
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
    return Node("sym", name=name), operator if slope > 0 else FLIPPED[operator], bound


def _solve_quadratic(left: Node, operator: str, right: Node) -> Region:
    """x^2 < 4, with rational coefficients, as -2 < x < 2."""
    names = symbols(left) | symbols(right)
    if len(names) != 1:
        raise NotARegion
    (name,) = names
    difference = Node("add", (left, negative(right)))
    try:
        at = {place: exact(difference, {name: place}) for place in (0, 1, -1, *_PLACES)}
    except Undecided:
        raise NotARegion from None
    c, b = at[0], (at[1] - at[-1]) / 2
    a = at[1] - b - c
    if a == 0 or any(at[x] != a * x * x + b * x + c for x in _PLACES):
        raise NotARegion
    operator = operator if a > 0 else FLIPPED[operator]
    variable = Node("sym", name=name)
    square = b * b - 4 * a * c
    if square < 0:
        if operator[0] not in (">", "!"):
            raise NotARegion
        return Region(LINE.pieces, variable)
    root = Node("pow", (number_node(square), HALF))
    middle = number_node(-b)
    roots = [
        divide(Node("add", (middle, side)), number_node(2 * a))
        for side in ((negative(root), root) if a > 0 else (root, negative(root)))
    ]
    points = unite([Region((make_piece(item, True, item, True),)) for item in roots])
    if operator == "=":
        return Region(points.pieces, variable)
    if operator == "!=":
        return Region(complement(points).pieces, variable)
    is_closed = operator.endswith("=")
    if operator[0] == "<" and (is_closed or square > 0):
        return Region((make_piece(roots[0], is_closed, roots[1], is_closed),), variable)
    if operator[0] == "<":
        raise NotARegion
    outside = (
        Region((make_piece(MINUS_INFINITY, False, roots[0], is_closed),)),
        Region((make_piece(roots[1], is_closed, INFINITY, False),)),
    )
    return Region(unite(list(outside)).pieces, variable)
