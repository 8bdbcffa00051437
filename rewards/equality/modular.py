"""Algebraic identity at random points modulo a prime.

Every symbol is a random integer, and every function a hash of its arguments' residues. Equal
residues prove equality with an error probability of about degree / 2^61 (Schwartz 1980, Zippel
1979); unequal ones disprove it only if no known function is involved. Powers are never expanded, so
2^(10^9) costs as much as 2^3.
"""

from __future__ import annotations

import contextlib
import random
from fractions import Fraction

from rewards.equality.exact import Undecided, exact
from rewards.parsing.nodes import Node

PRIME = 2**61 - 31  # 1 modulo 4, so that -1 has a root
SQRT_MINUS_ONE = 583529827753931384
_SALT = random.SystemRandom().getrandbits(60)
MAX_POINTS = 12  # (-1)^k and (-1)^n agree at every other point
_COMMUTATIVE = frozenset({"gcd", "lcm", "max", "min"})


class Residues:
    """Evaluates trees at one random point. `is_opaque`: a known function was hashed."""

    def __init__(self, salt: int = 0) -> None:
        self.salt = _SALT + salt
        self.is_odd = salt == 0  # (-1)^n and 1^n differ only at odd n
        self.is_opaque = False
        self.has_symbolic_power = False
        self.integers: dict[str, int] = {}

    def symbol(self, name: str) -> int:
        """A random integer for the symbol, the same in a base and in an exponent."""
        if name not in self.integers:
            value = abs(hash((self.salt, name))) % (1 << 40) + 3
            self.integers[name] = value | 1 if self.is_odd else value
        return self.integers[name]

    def of(self, node: Node) -> int:
        """Residue of a tree. Raises Undecided if a divisor is zero."""
        kind = node.kind
        if kind == "num":
            return _fraction(node.number)
        if kind == "add":
            return sum(self.of(term) for term in node.args) % PRIME
        if kind == "mul":
            product = 1
            for factor in node.args:
                product = product * self.of(factor) % PRIME
            return product
        if kind == "pow":
            return self._power(node)
        if kind == "sym":
            return self.symbol(node.name)
        if kind == "percent":
            return self.of(node.args[0]) * _inverse(100) % PRIME
        if kind == "const" and node.name == "i":
            return SQRT_MINUS_ONE
        if kind == "func" and node.name == "exp":
            return self._power(Node("pow", (Node("const", name="e"), node.args[0])))
        if kind == "func" and node.name in ("factorial", "binom"):
            with contextlib.suppress(Undecided):
                return _fraction(exact(node))
        if kind == "func" and node.name == "root" and len(node.args) == 2:
            inverse = Node("pow", (node.args[1], Node("num", number=Fraction(-1))))
            return self._power(Node("pow", (node.args[0], inverse)))
        if kind == "func" and node.name in ("ln", "log") and len(node.args) == 1:
            node = node._replace(name="log")
        return self._opaque(node)

    def _opaque(self, node: Node) -> int:
        # pi and e are assumed to be algebraically independent.
        if node.kind not in ("call", "const") or node.name == "inf":
            self.is_opaque = True
        parts = tuple(self.of(arg) for arg in node.args)
        if node.name in _COMMUTATIVE:
            parts = tuple(sorted(parts))
        return self._hash(node.kind, node.name, parts)

    def _hash(self, kind: str, name: str, parts: tuple[int, ...]) -> int:
        return hash((self.salt, kind, name, parts)) % PRIME

    def _power(self, node: Node) -> int:
        base, exponent = node.args
        values = {name: self.symbol(name) for name in exponent.symbols()}
        self.has_symbolic_power |= bool(values)
        residue = self.of(base)
        try:
            power = exact(exponent, values)
        except Undecided:
            self.is_opaque = True
            return self._hash("pow", "", (residue, self.of(exponent)))
        if power.denominator != 1:
            self.is_opaque = True
            whole = power.numerator // power.denominator
            rest = power - whole
            root = self._hash("root", str(rest), (residue,))
            return pow(residue, whole, PRIME) * root % PRIME if residue else 0
        if residue == 0 and power <= 0:
            raise Undecided
        return pow(residue, int(power) % (PRIME - 1), PRIME)


def _inverse(value: int) -> int:
    if value % PRIME == 0:
        raise Undecided
    return pow(value, -1, PRIME)


def _fraction(value: Fraction) -> int:
    if value.denominator == 1:
        return value.numerator % PRIME
    return value.numerator * _inverse(value.denominator) % PRIME


def identical(left: Node, right: Node) -> bool | None:
    """True: equal; False: unequal; None: undecided, because known functions are involved.

    Two different formulas that vanish identically do not count as equal: AB - BA is zero only if
    the letters commute.
    """
    num_agreed = 0
    for salt in range(MAX_POINTS + 1):
        residues = Residues(salt)
        try:
            a, b = residues.of(left), residues.of(right)
        except Undecided:
            continue
        if a != b:
            return None if residues.is_opaque else False
        if a == 0 and residues.integers and left != right:
            return None if residues.is_opaque else False
        num_agreed += 1
        if num_agreed == 4 and left.symbols() == right.symbols():
            return True
        if num_agreed == MAX_POINTS or not residues.has_symbolic_power:
            return True
    return True if num_agreed else None
