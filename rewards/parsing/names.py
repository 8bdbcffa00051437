"""Left-hand sides that just name a value: x, f(x), |AB|, m + n."""

from __future__ import annotations

from rewards.parsing.nodes import MINUS_ONE, Node

_EQUALITIES = frozenset({"=", "~=", "==="})
_TASKS = frozenset("integral sum product lim max min gcd lcm mod derivative".split())
_BINDING_TASKS = frozenset({"integral", "sum", "product", "lim", "derivative"})


def is_equation(node: Node) -> bool:
    """Is this a relation with only equality signs?"""
    return node.kind == "rel" and set(node.name.split(" ")) <= _EQUALITIES


def is_name(node: Node) -> bool:
    r"""Can this be a left-hand side that just names a value: x, f(x), |AB|, (x, y), a:b?"""
    kind = node.kind
    if kind in ("sym", "call"):
        return True
    if kind == "const":
        return node.name == "e"
    if kind == "func" and node.name in ("abs", "sin", "cos", "tan", "log"):
        return is_name(node.args[0])
    if kind == "mul":  # AB, \triangle ABC, P(x)
        if node.args[0].name == "m" and node.args[-1].name.startswith("\\angle"):
            return True
        is_value = len(node.args) == 2 and node.args[1].name in tuple("xyznt")
        if is_value and all(item.kind == "sym" for item in node.args):
            return node.args[0].name in tuple("PQRSTWpqFGH")
        if node.args[0].name == "\\Delta" and len(node.args) == 2:
            return node.args[1].kind == "sym"
        return all(_is_segment(item) for item in node.args) or is_asked(node)
    if kind == "add":
        return is_asked(node)
    if kind in ("seq", "ratio", "set", "union", "inter", "minus"):
        return all(is_name(item) for item in node.args)
    if kind == "deg":
        return is_name(node.args[0])
    if kind == "open":  # \int ... = 5: the task, then its value
        return node.name in _TASKS and (node.name in _BINDING_TASKS or not node.symbols())
    return kind == "text"


def _is_segment(node: Node) -> bool:
    r"""Is this a product or quotient of capital letters, such as AB or \frac{NO}{BO}?"""
    if node.kind == "mul":
        return all(map(_is_segment, node.args))
    if node.kind == "pow" and node.args[1] == MINUS_ONE:
        return _is_segment(node.args[0])
    return node.kind == "sym" and node.name[:1].isupper()


def is_asked(node: Node) -> bool:
    """m + n, 100a + b, pq: combinations of an answer's parts that questions ask for; not x + y."""
    terms = node.args if node.kind == "add" else (node,)
    letters = []
    for term in terms:
        for factor in term.args if term.kind == "mul" else (term,):
            if factor.kind == "sym" and factor.name in tuple("abcdkmnpqrs"):
                letters.append(factor.name)
            elif factor.kind != "num" or factor.number < 1 or node.kind != "add":
                return False
        if not term.symbols():
            return False
    return len(set(letters)) == len(letters) > 1
