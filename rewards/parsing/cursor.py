"""A cursor over tokens: what every part of the parser stands on."""

from __future__ import annotations

from rewards.parsing.nodes import MAX_DEPTH, LimitExceeded, Node, ParseError
from rewards.parsing.tokens import Token


class Cursor:
    """Tokens, a position, and the state that brackets save and restore.

    The grammar is spread over subclasses that call each other: numerals, functions, expressions,
    whole answers. What they call upwards is declared here.
    """

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.index = 0
        self.depth = 0
        self.num_open_bars = 0
        self.is_bar_separator = False  # inside \{x | ...\}, where a bar ends the first part
        self.domains: dict[str, Node] = {}  # n \in N beside other conditions
        self.conditions: list[Node] = []  # of the formula before them
        self.bound: set[str] = set()  # symbols that the answer itself quantifies

    @property
    def token(self) -> Token:
        return self.tokens[self.index]

    @property
    def following(self) -> Token:
        """The token behind the current one; the end token stands behind itself."""
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
        """The subscript behind "_" as one string."""
        if not self.at("open", "{"):
            token = self.next()
            if token.kind in ("end", "close"):
                raise ParseError
            return token.text
        return self._read_group_text()

    def _read_group_text(self) -> str:
        self.expect("open", "{")
        depth, pieces = 1, []
        while depth:
            token = self.next()
            if token.kind == "end":
                raise ParseError
            depth += {"open": 1, "close": -1}.get(token.kind, 0)
            if depth:
                pieces.append(token.text)
        return "".join(pieces)

    def parse_sum(self) -> Node:
        """Terms joined by + - and plus-minus."""
        raise NotImplementedError

    def parse_product(self) -> Node:
        """Factors joined by * / and juxtaposition."""
        raise NotImplementedError

    def parse_power(self) -> Node:
        """A primary with its exponents and postfixes."""
        raise NotImplementedError

    def parse_exponent(self) -> Node:
        """What stands behind ^."""
        raise NotImplementedError

    def parse_primary(self) -> Node:
        """A number, a name, a function, a bracket."""
        raise NotImplementedError

    def starts_factor(self, previous: Node) -> bool:
        """Does a juxtaposed factor follow?"""
        raise NotImplementedError

    def parse_item(self, closers: tuple[str, ...]) -> Node | None:
        """One item of a list; None where it only qualifies the others."""
        raise NotImplementedError

    def parse_items(self, closers: tuple[str, ...]) -> tuple[list[Node], set[str], bool]:
        """Items up to a closer, their separators, and whether ';' grouped them into tuples."""
        raise NotImplementedError

    def at_modulus(self) -> bool:
        """Does the bare modulus of a congruence follow?"""
        raise NotImplementedError

    def parse_list(self, opener: str) -> Node:
        """What follows an opening bracket, up to and with its closing one."""
        raise NotImplementedError

    def parse_environment(self, token_text: str) -> Node:
        """What follows a LaTeX environment's beginning, up to and with its end."""
        raise NotImplementedError


def product_of(factors: list[Node]) -> Node:
    """One factor as it is, several as a product."""
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
