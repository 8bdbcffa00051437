r"""Congruences: x \equiv 2 \pmod 5, and equivalent families such as x = 5k + 2."""

from __future__ import annotations

from collections.abc import Callable

from rewards.equality.exact import Undecided, exact, quadratic
from rewards.parsing.names import is_equation
from rewards.parsing.nodes import Node, number_node

Equal = Callable[[Node, Node], bool]
_INTEGERS = frozenset("kKnNmltsjq")


def equal_congruences(gold: Node, answer: Node, equal: Equal) -> bool:
    """Same unknown, modulus and residue? A residue without its modulus is not a congruence."""
    left, right = _as_congruence(gold), _as_congruence(answer)
    if left is None or right is None:
        return False
    if not equal(left.args[2], right.args[2]):
        return False
    for left_order in _orders(left):
        for right_order in _orders(right):
            has_names = None not in (left_order[0], right_order[0])
            if has_names and not equal(*[name for name in (left_order[0], right_order[0]) if name]):
                continue
            if _is_multiple(left_order[1], right_order[1], left.args[2], equal):
                return True
    return False


def _orders(node: Node) -> list[tuple[Node | None, Node]]:
    left, right, _ = node.args
    if not left.args and left.kind == "text":
        return [(None, right)]
    return [(left, right), (right, left)]


def _is_multiple(left: Node, right: Node, modulus: Node, equal: Equal) -> bool:
    try:
        size = exact(modulus)
        return size != 0 and (exact(left) - exact(right)) % size == 0
    except Undecided:
        return equal(left, right)


def _as_congruence(node: Node) -> Node | None:
    """The node as a congruence, with an empty text for a missing left side; None if impossible."""
    nameless = Node("text")
    if node.kind == "congruence":
        return node
    if node.kind == "open" and node.name == "mod" and len(node.args) == 2:
        return Node("congruence", (nameless, *node.args))
    name, value = nameless, node
    if is_equation(node) and len(node.args) == 2:
        name, value = node.args
        if name.kind != "sym":
            return None
    free = value.symbols() & _INTEGERS
    if len(value.symbols()) != 1 or not free:
        return None
    (parameter,) = free
    coefficients = quadratic(value, parameter)
    if coefficients is None or coefficients[0] or not coefficients[1]:
        return None
    _, period, start = coefficients
    return Node("congruence", (name, number_node(start), number_node(abs(period))))
