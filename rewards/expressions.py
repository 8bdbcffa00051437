r"""Precedence-climbing parser for scalar expressions: LaTeX and plain, no evaluation.

Binding, loosest first: + - \pm; * / and juxtaposition; unary sign; ^; postfix ! % degree.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.nodes import (
    HALF,
    INFINITY,
    MAX_NESTING,
    MINUS_ONE,
    PI,
    LimitExceeded,
    Node,
    ParseError,
    divide,
    function,
    negative,
    number_node,
)
from rewards.tokens import Token
from rewards.vocabulary import OPEN_FUNCTIONS, PERCENT_WORDS

MAX_PRINTED_EXPONENT = 4000
_CALLED = frozenset("fghFGH")
_SET_KINDS = frozenset({"set", "union", "inter", "minus", "builder"})
_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan", "cot": "acot", "sec": "asec"}
_INVERSE |= {"csc": "acsc", "sinh": "asinh", "cosh": "acosh", "tanh": "atanh"}
_STARTS_FACTOR = frozenset({"num", "sym", "const", "func", "cmd", "open"})


class ExpressionParser:
    """Cursor over the tokens. Subclass `AnswerParser` supplies `parse_list` for brackets."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.index = 0
        self.depth = 0
        self.num_open_bars = 0
        self.is_bar_separator = False  # inside \{x | ...\}, where a bar ends the first part
        self.bound: set[str] = set()  # symbols that the answer itself quantifies

    @property
    def token(self) -> Token:
        return self.tokens[self.index]

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
        if self.depth > MAX_NESTING:
            raise LimitExceeded

    def parse_list(self, opener: str) -> Node:
        raise NotImplementedError

    # --- sums, products, signs -------------------------------------------------------------

    def parse_sum(self) -> Node:
        self.enter()
        left = self.parse_product()
        terms = [left]
        while self.at("op", "+", "-", "+-", "-+"):
            sign = self.next().text
            term = self.parse_product()
            if sign == "-" and left.kind in _SET_KINDS:
                terms[-1] = Node("minus", (terms[-1], term))
            elif sign == "-":
                terms.append(negative(term))
            else:
                terms.append(term if sign == "+" else Node("pm", (term,), sign))
        self.depth -= 1
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def parse_product(self) -> Node:
        self.enter()
        factors = [self.parse_signed()]
        while True:
            if self.at("op", "*"):
                self.next()
                factors.append(self.parse_signed())
            elif self.at("op", "/"):
                self.next()
                divisor = self.parse_signed()
                if divisor.kind in ("percent", "deg"):  # 1/2% is half a per cent
                    quotient = divide(_product(factors), divisor.args[0])
                    factors = [Node(divisor.kind, (quotient,))]
                else:
                    factors.append(Node("pow", (divisor, MINUS_ONE)))
            elif self.at("op", "mod"):
                self.next()
                left = _product(factors)
                factors = [Node("open", (left, self.parse_signed()), "mod")]
            elif self.starts_factor(factors[-1]):
                factor = self.parse_power()
                if factor.kind == "rel":  # "(k \in \mathbb{Z})" behind a formula
                    self.bind(factor)
                else:
                    factors.append(factor)
            else:
                break
        self.depth -= 1
        return _product(factors)

    def bind(self, condition: Node) -> None:
        if condition.args[0].kind != "sym":
            raise ParseError
        self.bound.add(condition.args[0].name)

    def starts_factor(self, previous: Node) -> bool:
        """Does a juxtaposed factor follow?"""
        token = self.token
        if token.kind == "op":
            if token.text == "|(":
                return True
            return token.text == "|" and not self.num_open_bars and not self.is_bar_separator
        if token.kind == "num" and previous.kind in ("num", "base"):
            raise ParseError  # "1 2" is neither a product nor one number
        if token.kind == "env":
            return token.text.startswith("\\begin")
        if token.text == "{" and self.tokens[self.index + 1].kind in ("word", "text"):
            return False  # 800{ml}
        return token.kind in _STARTS_FACTOR

    def parse_signed(self) -> Node:
        self.enter()
        if self.accept("op", "-"):
            node = negative(self.parse_signed())
        elif self.accept("op", "+"):
            node = self.parse_signed()
        elif self.at("op", "+-", "-+"):
            sign = self.next().text
            node = Node("pm", (self.parse_signed(),), sign)
        else:
            node = self.parse_power()
        self.depth -= 1
        return node

    # --- powers and postfixes --------------------------------------------------------------

    def parse_power(self) -> Node:
        self.enter()
        base = self.parse_postfix(self.parse_primary())
        while self.at("op", "^"):
            self.next()
            if self._accept_mark("circ", "degree"):
                base = self._read_minutes(base)
            elif self._accept_word_mark("th", "st", "nd", "rd", "o", "e"):
                pass  # 12^{th}
            elif self.at("end") or self.at("close"):
                break  # "90^": the mark was lost
            else:
                base = Node("pow", (base, self.parse_exponent()))
            base = self.parse_postfix(base)
        self.depth -= 1
        return base

    def _accept_mark(self, *names: str) -> bool:
        if self.accept("op", *names):
            return True
        group = self.tokens[self.index : self.index + 3]
        if (
            len(group) == 3
            and group[0].text == "{"
            and group[1].kind == "op"
            and group[1].text in names
            and group[2].text == "}"
        ):
            self.index += 3
            return True
        return False

    def _accept_word_mark(self, *names: str) -> bool:
        token = self.token
        if token.kind in ("word", "text") and token.text in names and token.text not in "oe":
            self.index += 1
            return True
        group = self.tokens[self.index : self.index + 4]
        texts = "".join(item.text for item in group if item.kind in ("word", "sym", "text"))
        if group and group[0].text == "{":
            end = 2 if len(group) > 2 and group[2].text == "}" else 3
            if len(group) > end and group[end].text == "}" and texts in ("th", "st", "nd", "rd"):
                self.index += end + 1
                return True
        return False

    def _read_minutes(self, degrees: Node) -> Node:
        r"""60^\circ 42' 30'' in degrees."""
        total = [degrees]
        for size in (60, 3600):
            mark = self.tokens[self.index + 1] if self.at("num") else None
            if mark is None or mark.kind != "op" or mark.text != "'":
                break
            total.append(divide(self._read_number(self.next().text), number_node(size)))
            while self.accept("op", "'"):
                pass
        return Node("deg", (degrees if len(total) == 1 else Node("add", tuple(total)),))

    def parse_exponent(self) -> Node:
        self.enter()
        if self.accept("op", "-"):
            node = negative(self.parse_exponent())
        elif self.accept("op", "+"):
            node = self.parse_exponent()
        else:
            node = self.parse_primary()
            if self.at("op", "^") and not self.at("end"):
                self.next()
                node = Node("pow", (node, self.parse_exponent()))
        self.depth -= 1
        return node

    def parse_postfix(self, node: Node) -> Node:
        while True:
            if self.accept("op", "!"):
                name = "factorial2" if self.accept("op", "!") else "factorial"
                node = function(name, node)
            elif self.at("op", "%") or (self.at("word") and self.token.text in PERCENT_WORDS):
                self.next()
                node = Node("percent", (node,))
            elif self.accept("op", "degree", "circ"):
                node = self._read_minutes(node)
            elif self.at("word", "degrees", "degree"):
                self.next()
                node = Node("deg", (node,))
            elif self.at("op", "_") and node.kind == "num" and node.number >= 0:
                self.next()
                node = self._read_base(node)
            elif self.at("op", "choose"):
                self.next()
                node = function("binom", node, self.parse_primary())
            else:
                return node

    def _read_base(self, digits: Node) -> Node:
        name = self.read_subscript()
        if not name.isdigit() or digits.name or not 2 <= int(name) <= 36:
            raise ParseError
        return Node("base", (number_node(int(name)),), str(digits.number))

    # --- primaries -------------------------------------------------------------------------

    def parse_primary(self) -> Node:
        self.enter()
        token = self.next()
        if token.kind == "num":
            node = self._parse_number(token)
        elif token.kind == "sym":
            node = self._parse_symbol(token)
        elif token.kind == "const":
            node = PI if token.text == "pi" else INFINITY
        elif token.kind == "func":
            node = self.parse_function(token.text)
        elif token.kind == "cmd":
            node = self.parse_command(token.text)
        elif token.kind == "open":
            node = self.parse_list(token.text)
        elif token.kind == "env":
            node = self.parse_environment(token.text)
        elif token.kind == "op" and token.text in ("|", "|("):
            node = self._parse_bars()
        else:
            raise ParseError
        self.depth -= 1
        return node

    def parse_environment(self, name: str) -> Node:
        raise NotImplementedError

    def _parse_bars(self) -> Node:
        self.num_open_bars += 1
        inner = self.parse_sum()
        self.num_open_bars -= 1
        self.expect("op", "|", "|)")
        if inner.kind == "matrix":
            return Node("open", (inner,), "det")
        return function("abs", inner)

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
        r"""The \frac{1}{2} of 1\frac{1}{2}, the 1/2 of "1 1/2"; None where there is none."""
        rest = self.tokens[self.index : self.index + 8]
        pattern = "".join({"num": "n", "end": "."}.get(t.kind, t.text) for t in rest)
        match = re.match(r"frac(\{n\}|n)(\{n\}|n)?|n/n", pattern)
        if match is None or (pattern[0] == "n" and not rest[0].is_spaced):
            return None
        numbers = [t.text for t in rest if t.kind == "num"]
        if match[0] == "n/n":
            num_tokens = 3
        elif match[2] is None:  # \frac12: both digits in one token
            if len(numbers[0]) != 2 or match[1] != "n":
                return None
            numbers, num_tokens = list(numbers[0]), 2
        else:
            if match[1] == "n" and len(numbers[0]) > 1:
                return None
            num_tokens = 1 + len(match[1]) + len(match[2])
        if not all(text.isdigit() for text in numbers[:2]):
            return None
        top, bottom = int(numbers[0]), int(numbers[1])
        if not 0 < top < bottom:
            return None
        self.index += num_tokens
        return Fraction(top, bottom)

    def _parse_symbol(self, token: Token) -> Node:
        name = token.text
        while self.at("op", "'"):
            self.next()
            name += "'"
        if name == "C" and self.at("op", "_"):
            combinations = self._read_combinations()
            if combinations is not None:
                return combinations
        if self.accept("op", "_"):
            name += "_{" + self.read_subscript() + "}"
        if name == "e":
            return Node("const", name="e")
        if name == "i":
            return Node("const", name="i")
        if name[0] in _CALLED and self._accept_inverse_mark():
            name += "^{-1}"
        if len(name) == 1 and name.isupper() and self._is_numbered():
            return self.parse_call(name)
        if name[0] in _CALLED and self.at("open", "(") and not self.token.is_spaced:
            return self.parse_call(name)
        return Node("sym", name=name)

    def _is_numbered(self) -> bool:
        """J(0): a capital with a number in brackets is a function's value, not a product."""
        rest = [token.kind for token in self.tokens[self.index : self.index + 3]]
        return rest == ["open", "num", "close"] and self.at("open", "(") and not self.token.is_spaced

    def _accept_inverse_mark(self) -> bool:
        """f^{-1}( names the inverse function."""
        rest = [token.text for token in self.tokens[self.index : self.index + 6]]
        if rest == ["^", "{", "-", "1", "}", "("]:
            self.index += 5
            return True
        return False

    def _read_combinations(self) -> Node | None:
        """C_n^3 is a binomial coefficient; C_1 alone is a name."""
        start = self.index
        self.next()
        top = self.parse_argument()
        if self.accept("op", "^"):
            return function("binom", top, self.parse_argument())
        self.index = start
        return None

    def parse_call(self, name: str) -> Node:
        self.expect("open", "(")
        inner = self.parse_list("(")
        is_tuple = inner.kind == "seq" and inner.name == "()"
        return Node("call", inner.args if is_tuple else (inner,), name)

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

    # --- functions and commands ------------------------------------------------------------

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
        args = argument.args if argument.kind in ("seq", "set") else (argument,)
        if name in OPEN_FUNCTIONS:
            node = Node("open", args, name)
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
        self.enter()
        sign = -1 if self.accept("op", "-") else 1
        factors = [self.parse_power()]
        while self.starts_factor(factors[-1]) and not self.at("func") and not self.at("open", "("):
            factors.append(self.parse_power())
        self.depth -= 1
        return _product(factors) if sign > 0 else negative(_product(factors))

    def parse_argument(self) -> Node:
        r"""One argument of \frac, \sqrt, \log_: a group, a digit of a longer number, a primary."""
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
        if name in ("overline", "dot"):
            return Node("sym", name="\\overline " + self._read_group_text())
        raise ParseError

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
        elif self.at("open", "{") and self.tokens[self.index + 1].text == "}":
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


def _product(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))
