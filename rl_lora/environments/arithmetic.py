"""Exact arithmetic on a short text that a model has written, in bounded time.

Values are fractions. Text, nesting and the size of every value are limited, and a power is only
computed once its size is known; nothing is evaluated by Python.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_CHARS = 200
_MAX_DEPTH = 20  # of brackets and powers within each other
_MAX_BITS = 256  # of a numerator or denominator
_MAX_DECIMALS = 20  # with more, a value is written as a fraction
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d*)?|\.\d+)|(\*\*|[-+*/^()×÷]))")
_SAME = {"×": "*", "÷": "/", "**": "^"}


def evaluate(text: str) -> Fraction:
    """The value of numbers, + - * / ^ and brackets, as in 12*(3 + 1/2).

    Raises:
        ValueError: anything else, a division by zero, or a limit; a short message without the text.
    """
    if len(text) > MAX_CHARS:
        raise ValueError(f"more than {MAX_CHARS} characters")
    tokens = _tokens(text.strip())
    parser = _Parser(tokens)
    value = parser.sum()
    if parser.place < len(tokens):
        raise ValueError("not arithmetic")
    return value


def as_text(value: Fraction) -> str:
    """An integer, a decimal number if it is one of a few digits, or a fraction in lowest terms."""
    twos = fives = 0
    rest = value.denominator
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    decimals = max(twos, fives)
    if rest > 1 or decimals > _MAX_DECIMALS or not decimals:
        return str(value)
    digits = str(abs(value) * 10**decimals).rjust(decimals + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-decimals]}.{digits[-decimals:]}"


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None:
            raise ValueError("not arithmetic")
        token = found[1] or found[2]
        tokens.append(_SAME.get(token, token))
        place = found.end()
    return tokens


class _Parser:
    """Recursive descent; `place` is the next token's."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self.place, self._depth = tokens, 0, 0

    def sum(self) -> Fraction:
        value = self._product()
        while sign := self._taken("+", "-"):
            other = self._product()
            value = _checked(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while sign := self._taken("*", "/"):
            other = self._signed()
            if sign == "/" and not other:
                raise ValueError("division by zero")
            value = _checked(value * other if sign == "*" else value / other)
        return value

    def _signed(self) -> Fraction:
        is_negative = False
        while sign := self._taken("+", "-"):
            is_negative ^= sign == "-"
        value = self._power()
        return -value if is_negative else value

    def _power(self) -> Fraction:
        base = self._atom()
        if not self._taken("^"):
            return base
        self._enter()
        exponent = self._signed()  # to the right first: 2^3^2 is 2^9
        self._depth -= 1
        if exponent.denominator != 1:
            raise ValueError("an exponent that is not an integer")
        if not base and exponent < 0:
            raise ValueError("division by zero")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if bits * abs(exponent) > 2 * _MAX_BITS:
            raise ValueError("too large")
        return _checked(Fraction(base**exponent.numerator))

    def _atom(self) -> Fraction:
        if self._taken("("):
            self._enter()
            value = self.sum()
            self._depth -= 1
            if not self._taken(")"):
                raise ValueError("brackets that do not match")
            return value
        if self.place == len(self._tokens) or not self._tokens[self.place][-1:].strip("-+*/^()"):
            raise ValueError("not arithmetic")
        self.place += 1
        return _checked(Fraction(self._tokens[self.place - 1].rstrip(".")))

    def _taken(self, *wanted: str) -> str:
        """The next token if it is one of these, which is then done; else the empty string."""
        if self.place == len(self._tokens) or self._tokens[self.place] not in wanted:
            return ""
        self.place += 1
        return self._tokens[self.place - 1]

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError("too deeply nested")


def _checked(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise ValueError("too large")
    return value
