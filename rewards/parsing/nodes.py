"""The typed syntax tree of an answer, and size limits."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

MAX_CHARS = 4096
MAX_TOKENS = 2048
MAX_NESTING = 32  # of brackets
MAX_DEPTH = 100  # of signs, exponents and primaries: a bracket takes two
MAX_DIGITS = 1024  # of one number
MAX_EXACT_BITS = 16_384  # of an exact result


class LimitExceeded(Exception):
    """The text, or its exact value, is too large for the verifier."""


class ParseError(Exception):
    """The text is not an answer by the grammar."""


class Node(NamedTuple):
    """One node. `kind` determines the meaning of the other fields.

    | kind | name | args |
    |---|---|---|
    | num | "" or "decimal" | () with `number` and `decimals` (printed; 0 for an integer) |
    | sym, const | x, a_{n}; pi, e, i, inf | () |
    | add, mul, pow | "" | terms; factors; (base, exponent) |
    | func, call | sin, root; f (of unknown meaning) | arguments |
    | pm | "+-" or "-+" | (operand,) |
    | open | integral, sum, gcd, ... (a task, not its value) | its parts |
    | percent, deg | "" | (operand,) |
    | unit | cm^2 | (quantity,) |
    | base | digits | (base,) |
    | ratio | "" | parts |
    | seq | its brackets: "()", "[)", "[]", "<>" | items |
    | set, list | ""; ",", "and", "or" | items |
    | union, inter, minus | "" | operands |
    | builder | "" | (variable or expression, condition) |
    | rel | operators, joined by spaces: "= <" | operands, one more than operators |
    | congruence | "" | (left, right, modulus) |
    | matrix | "" | rows, each a seq |
    | text | normalised words | () |
    | raw | text outside the grammar, equal only to itself | () |
    | label | its words | (value,) |

    Example: ``Node("pow", (Node("sym", name="x"), number_node(2)))`` is x^2.
    """

    kind: str
    args: tuple[Node, ...] = ()
    name: str = ""
    number: Fraction = Fraction(0)
    decimals: int = 0

    def walk(self) -> list[Node]:
        """Every node of the tree, parents first."""
        found = [self]
        for item in found:
            found.extend(item.args)
        return found

    def walk_to_tasks(self) -> list[Node]:
        """Every node outside open tasks, and the tasks themselves."""
        found = [self]
        for item in found:
            if item.kind != "open":
                found.extend(item.args)
        return found

    def has(self, *kinds: str) -> bool:
        """Does any node of the tree have one of these kinds?"""
        return any(item.kind in kinds for item in self.walk())

    def symbols(self) -> frozenset[str]:
        """Names of the free symbols."""
        return frozenset(item.name for item in self.walk() if item.kind == "sym")

    def rename(self, names: dict[str, str]) -> Node:
        """The tree with symbols renamed; `names` maps old names to new ones."""
        if self.kind == "sym":
            return self._replace(name=names.get(self.name, self.name))
        return self._replace(args=tuple(item.rename(names) for item in self.args))

    def substitute(self, old: Node, new: Node) -> Node:
        """The tree with every `old` replaced by `new`."""
        if self == old:
            return new
        return self._replace(args=tuple(item.substitute(old, new) for item in self.args))


def number_node(value: int | Fraction) -> Node:
    """An exact number."""
    return Node("num", number=Fraction(value))


MINUS_ONE = number_node(-1)
HALF = number_node(Fraction(1, 2))
INFINITY = Node("const", name="inf")
PI = Node("const", name="pi")
UNNAMED = Node("sym", name="\\unnamed")  # the unknown of "at least 5"


def negative(node: Node) -> Node:
    """-node, folded if it is a literal number."""
    if node.kind == "num":
        return node._replace(number=-node.number)
    if node.kind == "mul":
        return Node("mul", (MINUS_ONE, *node.args))
    return Node("mul", (MINUS_ONE, node))


def divide(numerator: Node, denominator: Node) -> Node:
    """Numerator / denominator as a product."""
    return Node("mul", (numerator, Node("pow", (denominator, MINUS_ONE))))


GOLDEN_RATIO = Node(
    "mul", (HALF, Node("add", (number_node(1), Node("pow", (number_node(5), HALF)))))
)


def function(name: str, *args: Node) -> Node:
    """A call of a known function."""
    return Node("func", args, name)


SCALAR_KINDS = frozenset(
    {"num", "sym", "const", "add", "mul", "pow", "func", "call", "pm", "open", "percent", "deg"}
)
