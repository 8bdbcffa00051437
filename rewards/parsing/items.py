"""Parser for one item of an answer: its words, labels, units and conditions."""

from __future__ import annotations

import re

from rewards.parsing import phrases
from rewards.parsing.names import is_equation, is_name
from rewards.parsing.nodes import UNNAMED, Node, ParseError, number_node
from rewards.parsing.quantities import compound, quantity_of_product, temperature
from rewards.parsing.structures import StructureParser
from rewards.parsing.units import is_unit, read_unit
from rewards.parsing.vocabulary import (
    CURRENCIES,
    PERCENT_WORDS,
    QUALIFIER_WORDS,
    SCALE_WORDS,
    SEPARATOR_WORDS,
)

_ALL_REALS = frozenset({"all real numbers", "all reals", "any real number", "real numbers"})
_PLAIN_QUALIFIERS = frozenset({"where", "for", "if", "when", "such", "provided", "given"})
_CONDITION_WORDS = (
    *_PLAIN_QUALIFIERS,
    "all",
    "any",
    "every",
    "each",
    "real",
    "that",
    "values",
    "of",
)
_EXCEPT = frozenset({"except", "excluding", "but"})
_OR_EQUAL = [["or", "equal"], ["or", "greater"], ["or", "less"]]
_DEGREES_OF = ("C", "F", "Celsius", "celsius", "Fahrenheit", "fahrenheit")
_ALTERNATIVE_WORDS = frozenset({"else", "otherwise", "or", "if", "unless", "not"})
_INCH = re.compile(r"(?:(?<=^square )|(?<=^cubic )|^)in(?=$|\^)")


class ItemParser(StructureParser):
    """Parses a value with the words around it."""

    def _at_closer(self, closers: tuple[str, ...]) -> bool:
        return self.at("end") or (bool(closers) and self.at("close", *closers))

    def _at_separator(self) -> bool:
        return self.at("op", ",", ";") or self.at("word", *SEPARATOR_WORDS)

    def parse_item(self, closers: tuple[str, ...]) -> Node | None:
        if self.at("sym", "a", "A") and self.following.text in phrases.ARTICLED:
            self.next()  # a third of 5
        if self.at("word") or self.at("text"):
            words = self._read_words()
            if self._at_closer(closers) or self._at_separator():
                return self._parse_open_end(_text_or_number(words))
            if self.token.text == "(" and self.following.kind == "num":
                return self._parse_repeated(words)
            if words[-1] in _EXCEPT and " ".join(words[:-1]) in _ALL_REALS:
                items, _, _ = self.parse_items(closers)
                return Node("minus", (Node("sym", name="\\mathbb{R}"), Node("set", tuple(items))))
            is_denied = not phrases.DENIALS.isdisjoint(words)
            if not is_denied and self.at("num") and self.following.text == ":":
                words.append(self.next().text)
            if not is_denied and self.accept("op", ":", "="):
                return self._labelled(words, closers)
            if words[0] in QUALIFIER_WORDS:
                self._skip_qualifier(closers)
                return None
            if not is_denied and words[-1] in phrases.VERBS:
                return self._labelled(words[:-1] or words, closers)
            operations = phrases.leading_operations(words)
            if operations is None or (is_denied and not operations):
                raise ParseError  # "not equal to 5" is an answer, other denials are not
            return phrases.apply(operations, self._parse_value(closers))
        unit = self._accept_currency()
        node = self.parse_relation()
        node = self._parse_suffix(node, closers)
        return Node("unit", (node,), unit) if unit and node.kind != "unit" else node

    def _accept_currency(self) -> str:
        """The unit of a currency sign before a number, or an empty string."""
        if self.at("op", "-") and self.following.text in CURRENCIES:
            following = self.following
            self.tokens[self.index + 1] = self.token  # -$5 is $-5
            self.tokens[self.index] = following
        if self.token.kind == "op" and self.token.text in CURRENCIES:
            return CURRENCIES[self.next().text]
        return ""

    def _labelled(self, words: list[str], closers: tuple[str, ...]) -> Node:
        return Node("label", (self._parse_value(closers),), " ".join(words).lower())

    def _parse_value(self, closers: tuple[str, ...]) -> Node:
        value = self.parse_item(closers)
        if value is None:
            raise ParseError
        return value

    def _read_words(self) -> list[str]:
        words: list[str] = []
        while self.at("word") or self.at("text"):
            is_joint = self.at("word", *SEPARATOR_WORDS) and words
            if is_joint and not phrases.joins_number(
                words[-1], [self.token.text, self.following.text]
            ):
                break
            token = self.next()
            words.append(token.text if token.kind == "text" else token.text.lower())
            if words[-1] in ("than", "to") and [self.token.text, self.following.text] in _OR_EQUAL:
                words += [self.next().text, self.next().text]
            while self.at("op", "'", "-", '"') and self.following.kind == "word":
                self.next()
        return words

    def _skip_qualifier(self, closers: tuple[str, ...]) -> None:
        """Skip "where n is an integer"; the symbols in it count as bound.

        A condition that can be parsed, such as "for x > 0", is kept with the formula.
        """
        start, is_plain = self.index, self.token.text.lower() in _PLAIN_QUALIFIERS
        if is_plain and self._read_condition(closers):
            skipped = self.tokens[start : self.index]
            self.bound |= {token.text for token in skipped if token.kind == "sym"}
            return
        while not self._at_closer(closers):
            token = self.next()
            if token.text.lower() in _ALTERNATIVE_WORDS:
                raise ParseError  # "42 if n is even, else 43" is not one value
            if token.kind == "num" and not is_plain:
                raise ParseError  # 5 by 7
            if token.kind == "sym":
                self.bound.add(token.text)

    def _skip_condition(self, value: Node, closers: tuple[str, ...]) -> None:
        """Skip the qualifier after a value. Raises ParseError for "5 if x > 0"."""
        is_case = self.token.text.lower() in ("if", "when", "unless")
        num_before, start = len(self.conditions), self.index
        self._skip_qualifier(closers)
        if not is_case:
            return
        skipped = self.tokens[start : self.index]
        is_statement = any(
            token.kind == "word" and token.text in phrases.VERBS for token in skipped
        )
        if is_statement or len(self.conditions) > num_before:
            names = {token.text for token in skipped if token.kind == "sym"}
            if names and not names & value.symbols():
                raise ParseError

    def _read_condition(self, closers: tuple[str, ...]) -> bool:
        start = self.index
        while self.at("word", *_CONDITION_WORDS):
            self.next()
        try:
            condition = self.parse_relation()
        except ParseError:
            condition = None
        is_end = self._at_closer(closers) or self._at_separator()
        if condition is None or condition.kind != "rel" or is_equation(condition) or not is_end:
            self.index = start
            return False
        self.conditions.append(condition)
        return True

    def _parse_suffix(self, node: Node, closers: tuple[str, ...]) -> Node:
        """Apply units, ordinals, qualifiers and end marks after a value."""
        if self.token.kind == "end":
            return node
        if self.token.kind == "op" and self.token.text in CURRENCIES:
            node = Node("unit", (node,), CURRENCIES[self.next().text])
        if self.at("word", "or", "and"):
            return self._parse_open_end(node)
        if self.token.text in _DEGREES_OF and not self.at("word", "and", "or"):
            warm = temperature(node, self.token.text[:1].upper())
            if warm is not None:
                self.next()
                node = warm
        if self.at("num"):
            return self._parse_rest(quantity_of_product(node), closers)
        is_bracketed = self.token.text in "{(" and self.following.kind in ("word", "text")
        is_rate = self.at("op", "/")
        if not (self.at("word") or self.at("text") or is_bracketed or is_rate):
            return node
        if self._at_separator():
            return node
        if self.at("word", *phrases.VERBS) and is_name(node):
            return self._parse_statement(node, closers)
        if self.token.text.lower() in QUALIFIER_WORDS:
            self._skip_condition(node, closers)
            return node
        is_ordinal = self.token.text in phrases.ORDINALS
        words = self._read_suffix(closers)
        if is_ordinal and not {word.lower() for word in words} <= phrases.NUMBERED:
            raise ParseError  # the 5th prime
        if is_ordinal and not words:
            return Node("text", name=f"{node.number}th")  # not 5; but the 5th day is day 5
        while words and words[0].lower() in SCALE_WORDS:
            node = Node("mul", (node, number_node(SCALE_WORDS[words.pop(0).lower()])))
        while words and words[0].lower() in phrases.TRAILING:
            node, words = phrases.apply([phrases.TRAILING[words[0].lower()]], node), words[1:]
        if not words:
            return node
        if words[0] == "(" and words[-1] == ")":
            spelled = phrases.number_of([word.lower() for word in words[1:-1]])
            if spelled is not None and not spelled[1]:
                if node != number_node(spelled[0]):
                    raise ParseError
                return node  # 5 (five)
        name = " ".join(words).replace(" ^ ", "^").replace(" / ", "/")
        name = _INCH.sub("inch", name)
        if phrases.is_loaded(words) and read_unit(name) is None:
            raise ParseError
        if node.kind in ("sym", "mul") and not node.has("num"):
            if read_unit(name) is None and words[0] not in ("unit", "units"):
                raise ParseError  # "AB wins it all" is a sentence, not a quantity
        node = Node("unit", (node,), name)
        return self._parse_rest(node, closers) if self.at("num") else node

    def _parse_rest(self, first: Node | None, closers: tuple[str, ...]) -> Node:
        """A compound quantity, parsed up to `first`: 3 h 20 min."""
        rest = self.parse_item(closers)
        if rest is not None and rest.kind != "unit":
            rest = quantity_of_product(rest)
        whole = None if first is None or rest is None else compound(first, rest)
        if whole is None:
            raise ParseError
        return whole

    def _read_suffix(self, closers: tuple[str, ...]) -> list[str]:
        """The words after a value, without braces and ordinal suffixes."""
        pieces: list[str] = []
        while not self._at_closer(closers) and not self._at_separator():
            token = self.token
            if token.text.lower() in QUALIFIER_WORDS and token.kind == "word":
                self._skip_qualifier(closers)
                break
            is_mark = token.kind == "op" and token.text in ("^", "/", "*", "-", "'", "%")
            is_letter = token.kind == "sym" and (
                pieces[-1:] in (["/"], ["*"]) or is_unit(token.text)
            )
            is_brace = token.kind in ("open", "close") and token.text in "{}()"
            if not (token.kind in ("word", "text") or is_mark or is_letter or is_brace):
                is_exponent = "^" in pieces[-3:]
                if token.kind == "num" and not is_exponent and pieces:
                    break  # 3 h 20 min
                if not is_exponent:
                    raise ParseError
            self.next()
            pieces.append(token.text)
        return [piece for piece in pieces if piece not in (*phrases.ORDINALS, "{", "}")]

    def _parse_open_end(self, node: Node) -> Node:
        """5 or more; 5 and a half. Anything else after "or" and "and" is another item."""
        words, kinds = [], []
        for token in self.tokens[self.index + 1 : self.index + 4]:
            words.append(token.text.lower())
            kinds.append(token.kind)
        if self.at("word", "or") and kinds[0] == "word":
            operator = phrases.OR_MORE.get(words[0])
            if operator is not None and kinds[1:2] != ["word"]:
                self.index += 2
                return Node("rel", (UNNAMED, node), operator)
        for size in (2, 1):
            fraction = phrases.fraction_of(words[:size])
            if self.at("word", "and") and fraction is not None and node.kind == "num":
                self.index += size + 1
                return Node("num", number=node.number + fraction)
        return node

    def _parse_repeated(self, words: list[str]) -> Node:
        """five (5)."""
        spelled = _text_or_number(words)
        self.next()
        value = self.parse_sum()
        self.expect("close", ")")
        if spelled != value:
            raise ParseError
        return value

    def _parse_statement(self, name: Node, closers: tuple[str, ...]) -> Node:
        """x is 5; n is at least 3."""
        operator = phrases.comparison_of(self._read_words())
        value = None if operator is None else self.parse_item(closers)
        if operator is None or value is None or value.kind in ("rel", "text", "label"):
            raise ParseError
        return Node("rel", (name, value), operator)


def _text_or_number(words: list[str]) -> Node:
    """The number that the words spell, else a text."""
    if " ".join(words) in _ALL_REALS:
        return Node("sym", name="\\mathbb{R}")
    for start in range(min(len(words), 6)):
        operations = phrases.leading_operations(words[:start])
        spelled = phrases.number_of(words[start:])
        if operations is None or spelled is None:
            continue
        value, rest = spelled
        if phrases.is_loaded(rest):
            break
        node = phrases.apply(operations, number_node(value))
        if rest and rest[0] in PERCENT_WORDS:
            node, rest = Node("percent", (node,)), rest[1:]
        return Node("unit", (node,), " ".join(rest)) if rest else node
    return Node("text", name=" ".join(words))
