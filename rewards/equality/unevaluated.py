"""Is a number evaluated, or still unevaluated arithmetic?

A policy that is rewarded for `\\boxed{5 + 7 - 4}` when the gold is 8 learns to copy the question;
in one of our runs it took eight steps (LOG.md). So if the gold is a plain number, an answer with an
addition, subtraction or product of plain numbers is wrong. Fractions, powers, roots, factorials,
binomial coefficients and a x 10^k count as values, since textbooks leave results in that form.
"""

from __future__ import annotations

import re

from rewards.parsing.nodes import Node

# Degrees and minutes, dozens and millions are sums and products in the tree, not in the text.
_OPERATOR = re.compile(r"[\d)}\]]\s*(?:[-+*×·−–]|x\b|\\times|\\cdot|\\ast|\()")
_CONTAINERS = frozenset({"percent", "deg", "unit", "label", "seq", "list", "set"})


def is_literal(node: Node) -> bool:
    """Is this a plain number or a container of plain numbers: 8, -3/4, 5 cm, (1, 2), x = 5?"""
    if node.kind == "rel":
        return sum(item.kind == "sym" for item in node.args) == 1 and all(
            item.kind == "sym" or is_literal(item) for item in node.args
        )
    if node.kind in _CONTAINERS:
        return bool(node.args) and all(is_literal(item) for item in node.args)
    return _is_rational(node)


def has_unevaluated_sum(text: str, node: Node) -> bool:
    """Is there a sum or product of plain numbers in the answer, both as text and as a tree?

    Not in a chain of equations with an evaluated side (5 + 7 = 12). A name is not evaluated: after
    two steps of training a policy wrote 5 + 7 = QQQ.
    """
    return _OPERATOR.search(text) is not None and _has_sum(node)


def _has_sum(node: Node) -> bool:
    if node.kind in ("unit", "label"):  # the chain 20 - 10 = 10 dollars is one unit node
        return _has_sum(node.args[0])
    if node.kind == "rel":
        is_evaluated = any(is_literal(item) for item in node.args)
        return not is_evaluated and any(_has_sum(item) for item in node.args)
    return any(_is_unevaluated(item) for item in node.walk())


def _is_unevaluated(node: Node) -> bool:
    if node.kind == "add":
        return sum(_is_rational(item) for item in node.args) > 1
    if node.kind == "mul":
        return sum(item.kind == "num" and item.number != -1 for item in node.args) > 1
    return False


def _is_rational(node: Node) -> bool:
    """Is this an integer, a decimal, a fraction of two numbers, or the negative of one?"""
    if node.kind == "num":
        return True
    if node.kind != "mul":
        return False
    factors = [item for item in node.args if not (item.kind == "num" and item.number == -1)]
    numbers = [item for item in factors if item.kind == "num"]
    bottoms = [
        item
        for item in factors
        if item.kind == "pow" and item.args[0].kind == "num" and item.args[1].number == -1
    ]
    return len(numbers) + len(bottoms) == len(factors) and len(numbers) <= 1 and len(bottoms) <= 1
