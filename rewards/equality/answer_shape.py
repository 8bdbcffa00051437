"""The form of an answer apart from its values: lists, labels, plus-minus, families, renaming."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from rewards.equality.exact import Undecided
from rewards.equality.modular import Residues
from rewards.equality.numeric import is_real, line_in
from rewards.equality.relations import compatible_names, standard_name
from rewards.parsing.names import is_equation, is_name
from rewards.parsing.nodes import PI, LimitExceeded, Node, number_node
from rewards.rules import GradingRules

MAX_EXPANSION = 64
TINY = 1e-20
_PARAMETERS = frozenset("kKnNmltsjCcpq")
_CONSTANT = re.compile(r"[CKck](?:_\{\d\})?|[AB]")


def renamings(
    gold: Node,
    answer: Node,
    gold_bound: frozenset[str],
    answer_bound: frozenset[str],
    rules: GradingRules,
) -> Iterator[dict[str, str]]:
    """Ways to rename the answer's bound symbols and parameters to those of the gold."""
    is_option = gold.kind == "sym" and gold.name.upper() in tuple("ABCDE")
    if not rules.rename_bound or (gold.kind == "sym" and not is_option):
        return
    gold_names = sorted(gold.symbols() - answer.symbols())
    answer_names = sorted(answer.symbols() - gold.symbols())
    if not 0 < len(answer_names) == len(gold_names) <= 3:
        return
    is_shared = _are_families(gold, answer)
    are_tuples = _runs_through(gold, gold_names) and _runs_through(answer, answer_names)
    for order in itertools.permutations(gold_names):
        pairs = list(zip(answer_names, order, strict=True))
        if all(
            rules.rename_free
            or a.lower() == b.lower()
            or (a in answer_bound and (b in gold_bound or b in _PARAMETERS or is_shared))
            or (b in gold_bound and a in _PARAMETERS)
            or (gold.kind in ("rel", "add", "mul") and _are_constants(a, b))
            or (is_shared and a in _PARAMETERS and b in _PARAMETERS)
            or (are_tuples and len(pairs) == 1 and a in _PARAMETERS and len(b) == 1)
            or (are_tuples and len(pairs) == 1 and b in _PARAMETERS and len(a) == 1)
            for a, b in pairs
        ):
            yield dict(pairs)


def _are_families(*nodes: Node) -> bool:
    """Are these families of solutions: multiples of pi, or collections that repeat a letter?"""
    return all(
        any(item == PI for item in node.walk())
        or (node.has("seq", "union", "set") and _has_repeated_letter(node))
        for node in nodes
    )


def _has_repeated_letter(node: Node) -> bool:
    names = [item.name for item in node.walk() if item.kind == "sym"]
    return len(set(names)) < len(names)


def _runs_through(node: Node, names: list[str]) -> bool:
    """Is there one symbol, the parameter of a tuple such as (3 + 2t, 5 - t)?"""
    if len(names) != 1 or node.kind not in ("seq", "matrix", "list", "set"):
        return False
    parts = [item for item in node.walk() if item.kind not in ("seq", "matrix", "list", "set")]
    components = [part for part in parts if names[0] in part.symbols() and part.kind != "sym"]
    return node.has("seq") and len(components) > 1


def _are_constants(left: str, right: str) -> bool:
    """Can both be the same constant of integration? C and K, A and C; not A and B, c and k."""
    if not _CONSTANT.fullmatch(left) or not _CONSTANT.fullmatch(right):
        return False
    names = (left, right)
    if any(name in "AB" for name in names):
        return any("_" in name or name == "C" for name in names)
    return any("_" in name or name.isupper() for name in names)


def option_letters(node: Node) -> list[str] | None:
    """The options of ABD, or A, B, D; None for anything else."""
    names = [item.name.upper() for item in node.args if item.kind in ("sym", "text")]
    if len(names) != len(node.args) or len(set(names)) != len(names):
        return None
    return sorted(names) if all(name in tuple("ABCDEFGH") for name in names) else None


def is_coordinates(node: Node) -> bool:
    """Can a bare list be a tuple? Its items are plain values, or each has its own name."""
    if all(item.kind not in ("seq", "rel") for item in node.args):
        return True
    names = [item.args[0] for item in node.args if is_equation(item) and len(item.args) == 2]
    return len(names) == len(set(names)) == len(node.args) and all(
        name.kind == "sym" for name in names
    )


def by_coordinates(node: Node) -> Node:
    """(x, y) = (2, 3) as the list x = 2, y = 3; other nodes as they are."""
    if node.kind == "rel" and node.name == "=" and len(node.args) == 2:
        left, right = node.args
        if left.kind == right.kind == "seq" and len(left.args) == len(right.args):
            pairs = zip(left.args, right.args, strict=True)
            return Node("list", tuple(Node("rel", pair, "=") for pair in pairs), ",")
    return node


def unlabelled(node: Node) -> Node:
    """The node without the names of its values."""
    if node.kind in ("list", "set"):
        return node._replace(args=tuple(item_value(item) for item in node.args))
    return item_value(node)


def is_set_of_reals(node: Node) -> bool:
    """Is this a half-open interval, or a list with inequalities or unions?"""
    if node.kind == "seq":
        return len(node.args) == 2 and node.name in ("[)", "(]")
    return node.kind == "list" and any(
        item.kind == "rel" and not is_equation(item) or item.kind == "union" for item in node.args
    )


def items_of(node: Node) -> list[Node]:
    """The items of a list or set; anything else is one item."""
    return list(node.args) if node.kind in ("list", "set") else [node]


def item_value(item: Node) -> Node:
    """The value of a labelled item: 16 for `w = 16` and for `Paolo: 16`."""
    return _named(item)[1]


def name_of(item: Node) -> Node | None:
    """The standard spelling of the name that an item gives its value; None without a name."""
    name = _named(item)[0]
    return None if name is None else standard_name(name)


def _named(item: Node) -> tuple[Node | None, Node]:
    if item.kind == "label":
        return Node("text", name=item.name), item.args[0]
    is_pair = len(item.args) == 2
    if is_pair and is_equation(item) and is_name(item.args[0]):
        return item.args[0], item.args[1]
    is_point = is_pair and item.kind == "mul" and item.args[1].kind == "seq"
    if is_point and item.args[0].kind == "sym" and item.args[0].name.isupper():
        return item.args[0], item.args[1]  # the point A(1, 2)
    return None, item


def split_conditions(node: Node) -> tuple[Node, list[Node]]:
    """(formula, conditions) of `y = 1/x, x > 0`; (node, []) for anything else."""
    if node.kind != "list":
        return node, []
    conditions = [item for item in node.args if item.kind == "rel" and not is_equation(item)]
    formulas = [item for item in node.args if item not in conditions]
    if len(formulas) != 1 or not conditions:
        return node, []
    formula = formulas[0]
    body = item_value(formula)
    if not all(item.symbols() & body.symbols() for item in conditions):
        return node, []
    return formula, conditions


def same_family(gold: Node, answer: Node) -> bool:
    r"""Same values over the integers k, up to a shift: -\pi/3 + k\pi and 2\pi/3 + k\pi?"""
    names = gold.symbols() | answer.symbols()
    is_integer = bool(names & set("kKnNmlj"))
    if len(names) != 1 or not is_integer or gold.symbols() != answer.symbols():
        return False
    if PI not in gold.walk():
        return False
    (name,) = names
    try:
        (start, period), (other, step) = (line_in(side, name, {}) for side in (gold, answer))
    except Undecided:
        return False
    shift = (start - other) / period
    is_whole = is_real(shift) and abs(shift - round(float(shift.real))) < TINY
    return bool(is_whole and abs(abs(period) - abs(step)) < TINY)


def names_clash(gold: Node, answer: Node) -> bool:
    """Do both sides have names, and one of them a name that the other has not?"""
    gold_names, answer_names = (
        [name_of(item) for item in items_of(side)] if side.args else [] for side in (gold, answer)
    )
    left, right = (
        [name for name in names if name is not None] for names in (gold_names, answer_names)
    )
    if not left or not right:
        return False
    return not all(
        any(compatible_names(name, other) for other in others)
        for names, others in ((left, right), (right, left))
        for name in names
    )


def match_names(left: list[Node], right: list[Node]) -> list[tuple[Node, Node]] | None:
    """Pairs of items by name; None unless both sides name each item, with the same names."""
    tables = []
    for items in (left, right):
        table = {}
        for item in items:
            name = name_of(item)
            if name is not None:
                table[name] = item
        if len(table) != len(items) or len(items) < 2:
            return None
        tables.append(table)
    if tables[0].keys() != tables[1].keys():
        return None
    return [(item, tables[1][name]) for name, item in tables[0].items()]


def expand_all(items: list[Node]) -> list[Node]:
    r"""Replace each \pm by its two signs; signs in different components are independent."""
    result: list[Node] = []
    for item in items:
        result.extend(expand_signs(item))
        if len(result) > 8 * MAX_EXPANSION:
            raise LimitExceeded
    return result


def expand_signs(node: Node) -> list[Node]:
    """All values of a node with plus-minus signs; signs within one scalar are tied."""
    if not node.has("pm"):
        return [node]
    if node.kind in ("seq", "set", "matrix", "rel", "congruence"):
        choices = [expand_signs(item) for item in node.args]
        total = 1
        for choice in choices:
            total *= len(choice)
        if total > MAX_EXPANSION:
            raise LimitExceeded
        return [node._replace(args=args) for args in itertools.product(*choices)]
    return [_signed(node, is_upper) for is_upper in (True, False)]


def _signed(node: Node, is_upper: bool) -> Node:
    args = tuple(_signed(item, is_upper) for item in node.args)
    if node.kind == "pm":
        is_plus = (node.name == "+-") == is_upper
        return args[0] if is_plus else Node("mul", (number_node(-1), args[0]))
    return node._replace(args=args) if args else node


def _residue(node: Node) -> int | None:
    """A key that is equal for algebraically equal items; None if there is none."""
    try:
        return Residues().of(node)
    except Undecided:
        return None


def without_common(left: list[Node], right: list[Node]) -> tuple[list[Node], list[Node]]:
    """Both lists without pairs of algebraically equal items, in linear time."""
    waiting: dict[int, list[Node]] = {}
    rest = []
    for item in right:
        key = _residue(item)
        if key is None:
            rest.append(item)
        else:
            waiting.setdefault(key, []).append(item)
    unmatched = []
    for item in left:
        key = _residue(item)
        if key is not None and waiting.get(key):
            waiting[key].pop()
        else:
            unmatched.append(item)
    return unmatched, rest + [item for items in waiting.values() for item in items]


def without_repeats(items: list[Node]) -> list[Node]:
    """The items without those algebraically equal to an earlier one."""
    seen: set[int] = set()
    kept = []
    for item in items:
        key = _residue(item)
        if key is None or key not in seen:
            kept.append(item)
        if key is not None:
            seen.add(key)
    return kept
