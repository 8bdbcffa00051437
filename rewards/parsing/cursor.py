"""A cursor over tokens, the base class of the parser."""

from __future__ import annotations

from collections.abc import Callable

from rewards.parsing.nodes import MAX_DEPTH, LimitExceeded, Node, ParseError
from rewards.parsing.tokens import Token


class Cursor:
    """Tokens, a position, and the state that brackets save and restore.

    The grammar is a chain of subclasses: functions, expressions, structures, items and whole
    answers. Methods that are called before they are defined in the chain are declared here.
    """

    parse_sum: Callable[[], Node]
    parse_product: Callable[[], Node]
    parse_power: Callable[[], Node]
    parse_exponent: Callable[[], Node]
    parse_primary: Callable[[], Node]
    parse_list: Callable[[str], Node]  # after its opening bracket
    parse_environment: Callable[[str], Node]  # after its \\begin
    # Arguments: the brackets that end it. None: it only qualifies the other items.
    parse_item: Callable[[tuple[str, ...]], Node | None]
    # The items up to a closing bracket, their separators, and whether ';' groups them.
    parse_items: Callable[[tuple[str, ...]], tuple[list[Node], set[str], bool]]
    starts_factor: Callable[[Node], bool]  # does a juxtaposed factor follow this one?
    at_modulus: Callable[[], bool]  # at the bare modulus of a congruence?

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.index = 0
        self.depth = 0
        self.num_open_bars = 0
        self.is_bar_separator = False  # inside \{x | ...\}, where a bar is a separator
        self.domains: dict[str, Node] = {}  # n \in N next to other conditions
        self.conditions: list[Node] = []  # on the preceding formula
        self.bound: set[str] = set()  # symbols that the answer quantifies

    @property
    def token(self) -> Token:
        return self.tokens[self.index]

    @property
    def following(self) -> Token:
        """The token after the current one; after the end token comes the end token again."""
        return self.tokens[min(self.index + 1, len(self.tokens) - 1)]

    def next(self) -> Token:
        token = self.tokens[self.index]
        if token.kind != "end":
            self.index += 1
        return token

    def at(self, kind: str, *texts: str) -> bool:
        token = self.tokens[self.index]
        return token.kind == kind and (not texts or token.text in texts)

    def accept(self, kind: str, *texts: str) -> bool:
        if self.at(kind, *texts):
            self.index += 1
            return True
        return False

    def expect(self, kind: str, *texts: str) -> Token:
        if not self.at(kind, *texts):
            raise ParseError
        return self.next()

    def enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise LimitExceeded

    def read_subscript(self) -> str:
        """The subscript after "_" as one string."""
        if not self.at("open", "{"):
            token = self.next()
            if token.kind in ("end", "close"):
                raise ParseError
            return token.text
        self.next()
        depth, pieces = 1, []
        while depth:
            token = self.next()
            if token.kind == "end":
                raise ParseError
            depth += {"open": 1, "close": -1}.get(token.kind, 0)
            if depth:
                pieces.append(token.text)
        return "".join(pieces)


def product_of(factors: list[Node]) -> Node:
    """The product of the factors, or the only factor."""
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
