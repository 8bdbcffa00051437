"""Numerals: decimals, recurring decimals, mixed numbers, other bases, degrees and minutes."""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.parsing.cursor import Cursor
from rewards.parsing.nodes import LimitExceeded, Node, ParseError, divide, number_node
from rewards.parsing.tokens import Token
from rewards.parsing.vocabulary import NUMBER_WORDS

MAX_PRINTED_EXPONENT = 3000  # with MAX_DIGITS, below the 4,300 digits that int() accepts


class NumeralParser(Cursor):
    """Parses everything made of digits."""

    def _read_minutes(self, degrees: Node) -> Node:
        r"""60^\circ 42' 30'', parsed up to its degrees."""
        total = [degrees]
        for size in (60, 3600):
            mark = self.following if self.at("num") else None
            if mark is None or mark.kind != "op" or mark.text != "'":
                break
            total.append(divide(self._read_number(self.next().text), number_node(size)))
            while self.accept("op", "'"):
                pass
        return Node("deg", (degrees if len(total) == 1 else Node("add", tuple(total)),))

    def _read_base(self, digits: Node) -> Node:
        name = self.read_subscript()
        name = str(NUMBER_WORDS.get(name, name))
        if name == "10" and digits.name != "decimal":
            return digits
        if not name.isdigit() or not 2 <= int(name) <= 36:
            raise ParseError
        return Node("base", (number_node(int(name)),), str(digits.number))

    def _read_number(self, text: str) -> Node:
        mantissa, _, exponent = text.replace(",", "").lower().partition("e")
        whole, _, decimals = mantissa.partition(".")
        value = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
        shift = int(exponent) if exponent else 0
        if abs(shift) > MAX_PRINTED_EXPONENT:
            raise LimitExceeded
        name = "decimal" if decimals or shift < 0 else ""
        value *= Fraction(10) ** shift
        return Node("num", (), name, value, max(len(decimals) - shift, 0))

    def _parse_number(self, token: Token) -> Node:
        if self.at("cmd", "overline", "dot") and not self.token.is_spaced and "." in token.text:
            return self._parse_recurring(token.text)
        node = self._read_number(token.text)
        if node.name == "" and "," not in token.text:
            fraction = self._read_mixed_part()
            if fraction is not None:
                return Node("num", number=node.number + fraction)
        return node

    def _parse_recurring(self, text: str) -> Node:
        """0.1\\overline{6} = 0.1 + 6/90, exactly."""
        digits = ""
        while self.accept("cmd", "overline", "dot"):
            is_braced = self.accept("open", "{")
            digits += self.expect("num").text
            if is_braced:
                self.expect("close", "}")
        if not digits.isdigit():
            raise ParseError
        whole, _, decimals = text.partition(".")
        start = Fraction(int((whole + decimals) or "0"), 10 ** len(decimals))
        tail = Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** len(decimals))
        return number_node(start + tail)

    def _read_mixed_part(self) -> Fraction | None:
        r"""The \frac{1}{2} of 1\frac{1}{2}, the 1/2 of "1 1/2"; None if there is none."""
        rest = self.tokens[self.index : self.index + 8]
        pattern = "".join({"num": "0", "end": "."}.get(t.kind, t.text) for t in rest)
        match = re.match(r"frac(\{0\}|0)(\{0\}|0)?|0/0", pattern)
        if match is None or (pattern[0] == "0" and not rest[0].is_spaced):
            return None
        numbers = [t.text for t in rest if t.kind == "num"]
        if match[0] == "0/0":
            num_tokens = 3
        elif match[2] is None:  # \frac12: both digits in one token
            if len(numbers[0]) != 2 or match[1] != "0":
                return None
            numbers, num_tokens = list(numbers[0]), 2
        else:
            if match[1] == "0" and len(numbers[0]) > 1:
                return None
            num_tokens = 1 + len(match[1]) + len(match[2])
        if not all(text.isdigit() for text in numbers[:2]):
            return None
        top, bottom = int(numbers[0]), int(numbers[1])
        if not 0 < top < bottom:
            return None
        self.index += num_tokens
        return Fraction(top, bottom)
