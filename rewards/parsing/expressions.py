r"""Precedence-climbing parser for scalar expressions, in LaTeX or plain text. Evaluates nothing.

From loosest to tightest: + - \pm; * / and juxtaposition; unary sign; ^; postfix ! % degree.
"""

from __future__ import annotations

import itertools

from rewards.parsing.cursor import product_of
from rewards.parsing.functions import FunctionParser
from rewards.parsing.nodes import (
    INFINITY,
    MINUS_ONE,
    PI,
    Node,
    ParseError,
    divide,
    function,
    negative,
)
from rewards.parsing.tokens import Token
from rewards.parsing.units import is_unit
from rewards.parsing.vocabulary import PERCENT_WORDS

_CALLED = frozenset("fghFGH")
_COMPARISONS = ("<", ">", "<=", ">=", "=")
_SET_KINDS = frozenset({"set", "union", "inter", "minus", "builder"})
_STARTS_FACTOR = frozenset({"num", "sym", "const", "func", "cmd", "open"})


class ExpressionParser(FunctionParser):
    """Reads sums, products, powers and primaries."""

    def parse_sum(self) -> Node:
        left = self.parse_product()
        terms = [left]
        while self.at("op", "+", "-", "+-", "-+"):
            sign = self.next().text
            term = self.parse_product()
            is_set = left.kind in _SET_KINDS or (term.kind == "set" and left.kind == "sym")
            if sign == "-" and is_set:
                terms[-1] = Node("minus", (terms[-1], term))
            elif sign == "-":
                terms.append(negative(term))
            else:
                terms.append(term if sign == "+" else Node("pm", (term,), sign))
        return terms[0] if len(terms) == 1 else Node("add", tuple(terms))

    def parse_product(self) -> Node:
        factors = [self.parse_signed()]
        while self.token.kind not in ("end", "close"):
            if self.at("op", "*"):
                self.next()
                factors.append(self.parse_signed())
            elif self.at("op", "/"):
                if self.following.kind == "word":
                    break  # 18/day
                self.next()
                divisor = self.parse_signed()
                if divisor.kind in ("percent", "deg"):  # 1/2% is half a percent
                    quotient = divide(product_of(factors), divisor.args[0])
                    factors = [Node(divisor.kind, (quotient,))]
                else:
                    factors.append(Node("pow", (divisor, MINUS_ONE)))
            elif self.at("op", "mod"):
                self.next()
                left = product_of(factors)
                factors = [Node("open", (left, self.parse_signed()), "mod")]
            elif factors[-1].kind == self.following.kind == "num" and self.at("sym", "C", "P"):
                factors[-1] = self.parse_selection(factors[-1])  # 10C3
            elif self.starts_factor(factors[-1]):
                factor = self.parse_power()
                if factor.kind == "open" and factor.name == "mod" and len(factor.args) == 1:
                    factors = [factor._replace(args=(product_of(factors), *factor.args))]
                elif factor.kind == "rel":  # "(k \in \mathbb{Z})" after a formula
                    self.bind(factor)
                else:
                    factors.append(factor)
            else:
                break
        return product_of(factors)

    def bind(self, condition: Node) -> None:
        """Record a condition in parentheses after a formula."""
        if condition.name == "in" and condition.args[0].kind == "sym":
            self.bound.add(condition.args[0].name)
        elif "=" in condition.name.split(" "):
            raise ParseError  # "2 (x = 1)" is not a product
        else:
            self.conditions.append(condition)  # 2x (x > 0)

    def starts_factor(self, previous: Node) -> bool:
        """Does a juxtaposed factor follow?"""
        token = self.token
        if token.kind not in _STARTS_FACTOR and token.kind not in ("op", "env"):
            return False
        if token.kind == "op":
            if token.text == "|(":
                return True
            return token.text == "|" and not self.num_open_bars and not self.is_bar_separator
        if token.kind == "num" and previous.kind in ("num", "base"):
            raise ParseError  # "1 2" is neither a product nor one number
        if token.kind == "num" and token.is_spaced and previous.kind == "sym":
            if previous.name in ("h", "d", "m") and is_unit(self.following.text):
                return False  # 3 h 20 min
        if token.kind == "env":
            return token.text.startswith("\\begin")
        if token.text in ("{", "(") and self.following.kind in ("word", "text"):
            return False  # 800{ml}, 5 (five)
        if token.text in ("C", "F") and token.kind == "sym":
            degrees = previous.args[-1] if previous.kind == "mul" else previous
            return degrees.kind != "deg"  # a temperature
        if token.text == "U" and previous.kind in ("seq", "union"):
            return False  # a union
        return token.text != "(" or not self.at_modulus()

    def parse_signed(self) -> Node:
        self.enter()
        if self.accept("op", "-"):
            node = negative(self.parse_signed())
        elif self.accept("op", "+"):
            if self.at("op", "-") and not self.token.is_spaced:
                self.next()
                node = Node("pm", (self.parse_signed(),), "+-")  # +-7
            else:
                node = self.parse_signed()
        elif self.at("op", "+-", "-+"):
            sign = self.next().text
            node = Node("pm", (self.parse_signed(),), sign)
        else:
            node = self.parse_power()
        self.depth -= 1
        return node

    def parse_power(self) -> Node:
        base = self.parse_postfix(self.parse_primary())
        while self.at("op", "^"):
            self.next()
            if self._accept_mark("circ", "degree"):
                base = self._read_minutes(base)
            elif self._accept_mark("th", "st", "nd", "rd"):
                pass  # 12^{th} is 12 by the labels of HardVerify-Math
            elif self.at("end") or self.at("close"):
                break  # "90^" lost its degree sign
            else:
                exponent = self.parse_exponent()
                if base.kind == "sym" and "_" not in base.name and self.accept("op", "_"):
                    base = base._replace(name=base.name + "_{" + self.read_subscript() + "}")
                base = Node("pow", (base, exponent))  # v^2_0 is v_0^2
            base = self.parse_postfix(base)
        return base

    def _accept_mark(self, *names: str) -> bool:
        """Skip a mark such as \\circ or th, bare or in braces."""
        texts = [token.text for token in self.tokens[self.index : self.index + 4]]
        if self.token.kind in ("op", "word", "text") and texts[0] in names:
            size = 1
        elif texts[0] == "{" and "}" in texts and "".join(texts[1 : texts.index("}")]) in names:
            size = texts.index("}") + 1
        else:
            return False
        self.index += size
        return True

    def parse_exponent(self) -> Node:
        self.enter()
        if self.accept("op", "-"):
            node = negative(self.parse_exponent())
        elif self.accept("op", "+"):
            node = self.parse_exponent()
        else:
            node = self.parse_primary()
            if self.accept("op", "^"):
                node = Node("pow", (node, self.parse_exponent()))
        self.depth -= 1
        return node

    def parse_postfix(self, node: Node) -> Node:
        while self.token.kind in ("op", "word"):
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
                break
        return node

    def parse_primary(self) -> Node:
        self.enter()
        token = self.next()
        if token.kind == "num":
            node = self._parse_number(token)
        elif token.kind == "sym":
            node = self.parse_symbol(token)
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
        elif token.kind == "op" and token.text in ("^", "_"):
            node = self.parse_selection(self.parse_argument())  # ^{10}C_3
        else:
            raise ParseError
        self.depth -= 1
        return node

    def _parse_bars(self) -> Node:
        self.num_open_bars += 1
        inner = self.parse_sum()
        self.num_open_bars -= 1
        self.expect("op", "|", "|)")
        if inner.kind == "matrix":
            return Node("open", (inner,), "det")
        return function("abs", inner)

    def parse_symbol(self, token: Token) -> Node:
        name = token.text
        while self.at("op", "'"):
            self.next()
            name += "'"
        if name == "C" and self.at_pair():
            return function("binom", *self.parse_list(self.next().text).args)
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
        return self.parse_call(name) if self._is_call(name) else Node("sym", name=name)

    def _is_call(self, name: str) -> bool:
        r"""At the parenthesis of f(x), J(0), P(X \ge 1)? Other letters before it are factors."""
        if not self.at("open", "(") or self.token.is_spaced:
            return False
        if name[0] in _CALLED or len(name) > 1 or not name.isupper():
            return name[0] in _CALLED
        rest = self.tokens[self.index + 1 :]
        inside = list(itertools.takewhile(lambda token: token.kind not in ("close", "end"), rest))
        is_number = len(inside) == 1 and inside[0].kind == "num"
        return is_number or any(t.kind == "op" and t.text in _COMPARISONS for t in inside)

    def _accept_inverse_mark(self) -> bool:
        """f^{-1}( names the inverse function."""
        rest = [token.text for token in self.tokens[self.index : self.index + 6]]
        if rest == ["^", "{", "-", "1", "}", "("]:
            self.index += 5
            return True
        return False

    def parse_call(self, name: str) -> Node:
        self.expect("open", "(")
        inner = self.parse_list("(")
        is_tuple = inner.kind == "seq"
        if is_tuple and inner.name != "()":
            raise ParseError
        return Node("call", inner.args if is_tuple else (inner,), name)
