"""What an answer looks like beside its values: lists, labels, plus-minus signs, families."""

from __future__ import annotations

import itertools

from rewards.exact import Undecided
from rewards.nodes import Node, has_kind, number_node, walk
from rewards.relations import is_equation, is_name

MAX_EXPANSION = 64


def is_family(node: Node) -> bool:
    """A family of solutions: multiples of pi, tuples, or endpoints with a parameter."""
    return any(
        item == Node("const", name="pi") or item.kind in ("seq", "union", "set")
        for item in walk(node)
    )


def without_label(node: Node) -> Node:
    """The value of a labelled item."""
    return node.args[0] if node.kind == "label" else node


def option_letters(node: Node) -> list[str] | None:
    """ABD, or A, B, D: the options of a multiple choice."""
    names = [item.name.upper() for item in node.args if item.kind in ("sym", "text")]
    if len(names) != len(node.args) or len(set(names)) != len(names):
        return None
    return sorted(names) if all(name in tuple("ABCDEFGH") for name in names) else None


def read_as_symbol(value: Node, unit: str) -> list[Node]:
    """5 m and 5 m^2, with the unit read as a symbol."""
    name, _, exponent = unit.partition("^")
    symbol = Node("sym", name=name)
    if exponent.isdigit():
        symbol = Node("pow", (symbol, number_node(int(exponent))))
    return [Node("mul", (value, symbol))]


def is_coordinates(node: Node) -> bool:
    """A bare list that may stand for a tuple: plain values, or each under its own name."""
    if all(item.kind not in ("seq", "rel") for item in node.args):
        return True
    names = [item.args[0] for item in node.args if is_equation(item) and len(item.args) == 2]
    return len(names) == len(set(names)) == len(node.args) and all(
        name.kind == "sym" for name in names
    )


def by_coordinates(node: Node) -> Node:
    """(x, y) = (2, 3) as x = 2, y = 3."""
    if node.kind == "rel" and node.name == "=" and len(node.args) == 2:
        left, right = node.args
        if left.kind == right.kind == "seq" and len(left.args) == len(right.args):
            pairs = zip(left.args, right.args, strict=True)
            return Node("list", tuple(Node("rel", pair, "=") for pair in pairs), ",")
    return node


def form_of(node: Node) -> str:
    """In what form a subset of the line is written."""
    if node.kind == "rel":
        return "membership" if node.name == "in" else "inequality"
    return "set"


def unlabelled(node: Node) -> Node:
    """Without the names that it gives to its values."""
    if node.kind in ("list", "set"):
        return node._replace(args=tuple(item_value(item) for item in node.args))
    return item_value(node)


def has_mixed_brackets(gold: Node, answer: Node) -> bool:
    """Is one of them a half-open interval?"""
    names = {item.name for item in (gold, answer) if item.kind == "seq" and len(item.args) == 2}
    return bool(names & {"[)", "(]"})


def is_condition(node: Node) -> bool:
    """Does a list hold inequalities or unions?"""
    return any(
        item.kind == "rel" and not is_equation(item) or item.kind == "union" for item in node.args
    )


def items_of(node: Node) -> list[Node]:
    """The items of a list or set; anything else is one item."""
    return list(node.args) if node.kind in ("list", "set") else [node]


def item_value(item: Node) -> Node:
    """What a labelled item says: 16 for `w = 16` and for `Paolo: 16`."""
    if item.kind == "label":
        return item.args[0]
    if is_equation(item) and len(item.args) == 2 and is_name(item.args[0]):
        return item.args[1]
    return item


def match_names(left: list[Node], right: list[Node]) -> list[tuple[Node, Node]] | None:
    """Pairs by label, where both sides label every item with the same distinct names."""
    tables = []
    for items in (left, right):
        table = {}
        for item in items:
            if item.kind == "label":
                table[Node("text", name=item.name)] = item
            elif is_equation(item) and len(item.args) == 2 and is_name(item.args[0]):
                table[item.args[0]] = item
        if len(table) != len(items) or len(items) < 2:
            return None
        tables.append(table)
    if tables[0].keys() != tables[1].keys():
        return None
    return [(item, tables[1][name]) for name, item in tables[0].items()]


def expand_all(items: list[Node]) -> list[Node]:
    r"""Replace every \\pm by its two signs; signs in different components are independent."""
    result: list[Node] = []
    for item in items:
        result.extend(expand_signs(item))
        if len(result) > 8 * MAX_EXPANSION:
            raise Undecided
    return result


def expand_signs(node: Node) -> list[Node]:
    """All values of a node with plus-minus signs; within one scalar the signs go together."""
    if not has_kind(node, "pm"):
        return [node]
    if node.kind in ("seq", "set", "matrix", "rel"):
        choices = [expand_signs(item) for item in node.args]
        total = 1
        for choice in choices:
            total *= len(choice)
        if total > MAX_EXPANSION:
            raise Undecided
        return [node._replace(args=args) for args in itertools.product(*choices)]
    return [_signed(node, is_upper) for is_upper in (True, False)]


def _signed(node: Node, is_upper: bool) -> Node:
    args = tuple(_signed(item, is_upper) for item in node.args)
    if node.kind == "pm":
        is_plus = (node.name == "+-") == is_upper
        return args[0] if is_plus else Node("mul", (number_node(-1), args[0]))
    return node._replace(args=args) if args else node
