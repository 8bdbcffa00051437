"""Numbers far too large or small to write, compared by their logarithms."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import mpmath

from rewards.equality.exact import Undecided
from rewards.equality.numeric import (
    HIGH,
    LOW,
    MAX_LOG_OF_LOG,
    Arithmetic,
    Precise,
    differ,
    is_real,
    value_of,
)
from rewards.parsing.nodes import Node


class TooLarge(Undecided):
    """Even the logarithm is too large to write."""


def log_magnitude(node: Node, system: Arithmetic) -> Any:
    """ln of a positive number that may be far too large to write. Raises Undecided."""
    if node.kind == "mul":
        return sum((log_magnitude(arg, system) for arg in node.args), system.number(Fraction(0)))
    if node.kind == "pow":
        return value_or_huge(node.args[1], system) * log_magnitude(node.args[0], system)
    if node.kind == "func" and node.name in ("factorial", "binom"):
        context = mpmath.MPContext()
        context.dps = 40 if system is LOW else 80
        whole = [value_or_huge(arg, system) for arg in node.args]
        parts = [whole[0]] if node.name == "factorial" else [*whole, whole[0] - whole[1]]
        if any(not is_real(part) or part <= -1 for part in parts):
            raise Undecided
        logs = [context.loggamma(part + 1) for part in parts]
        return logs[0] - sum(logs[1:])
    value = value_of(node, {}, system)
    if not is_real(value) or not value > 0:
        raise Undecided
    return system.functions["ln"](value)


def value_or_huge(node: Node, system: Arithmetic) -> Any:
    """A real value, reached through its logarithm where it is large."""
    if node.kind in ("num", "add"):
        return value_of(node, {}, system)
    try:
        return value_of(node, {}, system)
    except Undecided:
        logarithm = log_magnitude(node, system)
        if abs(logarithm) > MAX_LOG_OF_LOG:
            raise TooLarge from None
        return system.functions["exp"](logarithm)


def same_magnitude(left: Node, right: Node) -> bool:
    """Compare two huge positive products by their logarithms. Raises Undecided.

    Products and powers whose logarithms agree to 60 digits are taken as equal.
    """
    for system in (LOW, HIGH):
        magnitudes = []
        for side in (left, right):
            try:
                with Precise.lock:
                    magnitudes.append(log_magnitude(side, system))
            except TooLarge:
                magnitudes.append(None)
        a, b = magnitudes
        if a is None and b is None:
            raise TooLarge
        if a is None or b is None or differ(a, b, system.tiny):
            return False
    return True
