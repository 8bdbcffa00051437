r"""Numerals (mixed, recurring, in other bases), and functions and commands with their arguments."""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.parsing.cursor import Cursor, product_of
from rewards.parsing.nodes import (
    HALF,
    MINUS_ONE,
    LimitExceeded,
    Node,
    ParseError,
    divide,
    function,
    negative,
    number_node,
)
from rewards.parsing.tokens import Token
from rewards.parsing.vocabulary import NUMBER_WORDS, OPEN_FUNCTIONS

MAX_PRINTED_EXPONENT = 3000  # with MAX_DIGITS, below the 4,300 digits that int() accepts
MARKS = ("overline", "hat", "tilde", "dot", "ddot")
_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan", "cot": "acot", "sec": "asec"}
_INVERSE |= {"csc": "acsc", "sinh": "asinh", "cosh": "acosh", "tanh": "atanh"}


class FunctionParser(Cursor):
    """Parses numerals, functions, fractions, roots, and tasks (integrals, sums; not evaluated)."""

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

    def parse_function(self, name: str) -> Node:
        if name == "sqrt":
            return Node("pow", (self.parse_argument(), HALF))
        base = exponent = None
        while self.at("op", "^", "_"):
            if self.next().text == "_":
                base = self._parse_subscript_value(name)
            else:
                exponent = self.parse_exponent()
        if exponent == MINUS_ONE and name in _INVERSE:
            name, exponent = _INVERSE[name], None
        argument = self._parse_function_argument()
        if argument.kind == "seq" and argument.name not in ("()", "[]"):
            raise ParseError
        args = argument.args if argument.kind in ("seq", "set") else (argument,)
        if name in OPEN_FUNCTIONS:
            node = Node("open", args if base is None else (*args, base), name)
        elif name == "cbrt":
            node = function("root", argument, number_node(3))
        elif name == "lg":
            node = function("log", argument, number_node(10))
        elif name == "log" and base is not None:
            node = function("log", argument, base)
        elif base is not None:
            raise ParseError
        else:
            node = function(name, argument)
        return node if exponent is None else Node("pow", (node, exponent))

    def _parse_subscript_value(self, name: str) -> Node:
        if name in OPEN_FUNCTIONS:  # lim_{x \to 0}
            return Node("sym", name=self.read_subscript())
        return self.parse_argument()

    def _parse_function_argument(self) -> Node:
        if self.at("open", "(", "{", "[", "\\{"):
            return self.parse_list(self.next().text)
        sign = -1 if self.accept("op", "-") else 1
        factors = [self.parse_power()]
        while self.starts_factor(factors[-1]) and not self.at("func") and not self.at("open", "("):
            factors.append(self.parse_power())
        return product_of(factors) if sign > 0 else negative(product_of(factors))

    def parse_argument(self) -> Node:
        r"""One argument of \sqrt or \log_: an optional sign and a primary."""
        if self.at("op", "-"):
            self.next()
            return negative(self.parse_argument())
        return self.parse_primary()

    def _parse_frac_argument(self) -> Node:
        token = self.token
        if token.kind == "num" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.index] = token._replace(text=token.text[1:], is_spaced=False)
            return number_node(int(token.text[0]))
        return self.parse_argument()

    def parse_command(self, name: str) -> Node:
        if name == "frac":
            return self._parse_fraction()
        if name == "binom":
            top = self._parse_frac_argument()
            return function("binom", top, self._parse_frac_argument())
        if name == "sqrt":
            return self._parse_root()
        if name in ("integral", "sum", "product"):
            return self._parse_big_operator(name)
        if name == "emptyset":
            return Node("set")
        if name == "angle":  # \angle ABC is a name
            letters = []
            while self.at("sym"):
                letters.append(self.next().text)
            if not letters:
                raise ParseError
            return Node("sym", name="\\angle " + "".join(letters))
        if name in MARKS:
            return self._parse_marked(name)
        raise ParseError

    def _parse_marked(self, mark: str) -> Node:
        r"""\bar{x} and \hat{p}_1 are new names; \hat{i} is the unit vector i."""
        letter = self.read_subscript()
        if mark == "hat" and letter in ("i", "j", "k"):
            return Node("const", name="i") if letter == "i" else Node("sym", name=letter)
        name = f"\\{mark} {letter}"
        if self.accept("op", "_"):
            name += "_{" + self.read_subscript() + "}"
        return Node("sym", name=name)

    def _parse_fraction(self) -> Node:
        start = self.index
        top = self._parse_frac_argument()
        middle = self.index
        bottom = self._parse_frac_argument()
        first = [t.text for t in self.tokens[start:middle] if t.kind == "sym"][:1]
        second = [t.text for t in self.tokens[middle : self.index] if t.kind == "sym"]
        if first and first[0] in ("d", "\\partial") and second[:1] == first and len(second) > 1:
            if not self.starts_factor(bottom):
                return Node("open", (top, bottom), "derivative")
            return Node("open", (top, bottom, self.parse_product()), "derivative")
        return divide(top, bottom)

    def _parse_root(self) -> Node:
        degree = None
        if self.at("open", "["):
            self.next()
            degree = self.parse_sum()
            self.expect("close", "]")
        elif [token.text for token in self.tokens[self.index : self.index + 3]] == ["{", "}", "{"]:
            self.index += 2  # \sqrt{}{3}
        radicand = self.parse_argument()
        if degree is None:
            return Node("pow", (radicand, HALF))
        return function("root", radicand, degree)

    def _parse_big_operator(self, name: str) -> Node:
        bounds = {"_": "", "^": ""}
        while self.at("op", "_", "^"):
            mark = self.next().text
            bounds[mark] = self.read_subscript()
        body = self.parse_product()
        limits = tuple(Node("sym", name=f"{mark}{text}") for mark, text in bounds.items())
        return Node("open", (body, *limits), name)

    def parse_selection(self, top: Node) -> Node:
        """Combinations (C) or permutations (P) of `top` things."""
        kind = self.expect("sym", "C", "P").text
        self.accept("op", "_")
        bottom = self.parse_argument()
        if kind == "C":
            return function("binom", top, bottom)
        rest = Node("add", (top, negative(bottom)))
        return divide(function("factorial", top), function("factorial", rest))

    def at_pair(self) -> bool:
        """At the (10, 3) of C(10, 3)?"""
        group = self.tokens[self.index : self.index + 5]
        return [token.text if token.kind != "num" else "0" for token in group] == list("(0,0)")

    def _read_combinations(self) -> Node | None:
        """The binomial coefficient of C_n^3; None for C_1, which is a name."""
        start = self.index
        self.next()
        top = self.parse_argument()
        if self.accept("op", "^"):
            return function("binom", top, self.parse_argument())
        self.index = start
        return None
