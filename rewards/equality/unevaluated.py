"""Is a number worked out, or still a sum to do?

A policy that is rewarded for `\\boxed{5 + 7 - 4}` where the gold is 8 learns to copy the question:
a reinforcement-learning run of ours found that within eight steps (LOG.md). So where the gold is a
plain number, an answer that leaves an addition, a subtraction or a product of plain numbers to the
reader is no answer. A fraction, a power, a root, a factorial, a binomial coefficient and a x 10^k
are values as they stand: one operation in the notation in which textbooks leave a result.
"""

from __future__ import annotations

import re

from rewards.parsing.nodes import Node, walk

# Degrees and minutes, dozens and millions are sums and products in the tree, but not on paper.
_OPERATOR = re.compile(r"[\d)}\]]\s*(?:[-+*×·−–]|x\b|\\times|\\cdot|\\ast|\()")
_CONTAINERS = frozenset({"percent", "deg", "unit", "label", "seq", "list", "set"})


def is_literal(node: Node) -> bool:
    """A plain number, or a container of plain numbers: 8, -3/4, 5 cm, (1, 2), x = 5."""
    if node.kind == "rel":
        return sum(item.kind == "sym" for item in node.args) == 1 and all(
            item.kind == "sym" or is_literal(item) for item in node.args
        )
    if node.kind in _CONTAINERS:
        return bool(node.args) and all(is_literal(item) for item in node.args)
    return _is_rational(node)


def has_sum_to_do(text: str, node: Node) -> bool:
    """Does the answer, as text and as tree, leave a sum or product of plain numbers to the reader?

    A chain of equations (5 + 7 = 12) does not where one of its sides is worked out; a name is not
    (5 + 7 = QQQ, as a policy wrote after two steps of training).
    """
    return _OPERATOR.search(text) is not None and _has_sum(node)


def _has_sum(node: Node) -> bool:
    if node.kind in ("unit", "label"):  # 20 - 10 = 10 dollars is the whole chain in dollars
        return _has_sum(node.args[0])
    if node.kind == "rel":
        is_worked_out = any(is_literal(item) for item in node.args)
        return not is_worked_out and any(_has_sum(item) for item in node.args)
    return any(_is_sum_to_do(item) for item in walk(node))


def _is_sum_to_do(node: Node) -> bool:
    if node.kind == "add":
        return sum(_is_rational(item) for item in node.args) > 1
    if node.kind == "mul":
        return sum(item.kind == "num" and item.number != -1 for item in node.args) > 1
    return False


def _is_rational(node: Node) -> bool:
    """An integer, a decimal, a fraction of two numbers, or the negative of one."""
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
