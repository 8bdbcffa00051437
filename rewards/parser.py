"""Parser for whole answers: lists, relations, intervals, sets, matrices, labels, units, words."""

from __future__ import annotations

from typing import NamedTuple

from rewards.clean import clean
from rewards.nodes import Node, ParseError, has_kind, number_node
from rewards.structures import StructureParser
from rewards.tokens import tokenize
from rewards.vocabulary import (
    FILLER_WORDS,
    NUMBER_WORDS,
    QUALIFIER_WORDS,
    SCALE_WORDS,
    SEPARATOR_WORDS,
)
from rewards.words import unit_scale

_ALL_REALS = frozenset({"all real numbers", "all reals", "any real number", "real numbers"})
_VERBS = frozenset({"is", "are", "equals", "was", "be"})
_NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "if", "unless", "whether"})
_ALTERNATIVE_WORDS = frozenset({"else", "otherwise", "or", "if", "unless", "not"})


class Parsed(NamedTuple):
    """A tree and the symbols that the answer itself quantifies ("for some integer t")."""

    node: Node
    bound: frozenset[str]


def parse(text: str) -> Parsed:
    """Parse one answer. Raises ParseError, LimitExceeded."""
    parser = AnswerParser(tokenize(clean(text)))
    node = parser.parse_answer()
    return Parsed(node, frozenset(parser.bound))


class AnswerParser(StructureParser):
    """Adds what stands around scalar expressions."""

    def parse_answer(self) -> Node:
        """The whole token list as one node; a list node where it has several items."""
        items, separators, has_groups = self.parse_items(())
        if not self.at("end") or not items:
            raise ParseError
        if len(items) == 1:
            return items[0]
        name = "or" if "or" in separators else "and" if "and" in separators else ","
        return Node("list", tuple(items), "groups" if has_groups else name)

    def _at_closer(self, closers: tuple[str, ...]) -> bool:
        if self.at("end"):
            return True
        return bool(closers) and self.at("close", *closers)

    def _at_separator(self) -> bool:
        return self.at("op", ",", ";") or self.at("word", *SEPARATOR_WORDS)

    def parse_items(self, closers: tuple[str, ...]) -> tuple[list[Node], set[str], bool]:
        """Items up to a closer; with both ',' and ';', the groups between ';' are tuples."""
        groups: list[list[Node]] = [[]]
        separators: set[str] = set()
        while not self._at_closer(closers):
            if self._at_separator():
                separator = self.next().text
                separators.add(separator)
                if separator == ";" or (separator == "or" and _are_equations(groups[-1])):
                    groups.append([])
                continue
            item = self.parse_item(closers)
            if item is not None:
                groups[-1].append(item)
            if not (self._at_closer(closers) or self._at_separator()):
                raise ParseError
        groups = [self._without_domains(group) for group in groups]
        groups = [group for group in groups if group]
        if len(groups) > 1 and any(len(group) > 1 for group in groups):
            return (
                [Node("seq", tuple(g), "()") if len(g) > 1 else g[0] for g in groups],
                separators,
                True,
            )
        return [item for group in groups for item in group], separators, False

    def _without_domains(self, items: list[Node]) -> list[Node]:
        r"""Drop "k \in \mathbb{Z}" beside other items, and note that it binds k."""
        kept = []
        for item in items:
            is_domain = (
                item.kind == "rel"
                and item.name == "in"
                and item.args[0].kind == "sym"
                and item.args[1].kind == "sym"
                and item.args[1].name.removeprefix("\\mathbb")[:2].strip("{") in tuple("ZNRQC")
            )
            if is_domain and len(items) > 1:
                self.bind(item)
            else:
                kept.append(item)
        return kept

    # --- one item --------------------------------------------------------------------------

    def parse_item(self, closers: tuple[str, ...]) -> Node | None:
        """One item of a list; None where it only qualifies the others."""
        if self.at("word") or self.at("text"):
            words = self._read_words()
            if self._at_closer(closers) or self._at_separator():
                return _text_or_number(words)
            if self.accept("op", ":", "="):
                return self._labelled(words, closers)
            if self.at("num") and self.following.text == ":":
                words.append(self.next().text)
                self.next()
                return self._labelled(words, closers)
            if words[0] in QUALIFIER_WORDS:
                self._skip_qualifier(closers)
                return None
            if words[-1] in _VERBS and not _NEGATIONS & set(words):
                return self._labelled(words[:-1] or words, closers)
            if not all(word in FILLER_WORDS for word in words):
                raise ParseError
        currency = self.at("op", "currency", "€", "£", "¥")
        if currency:
            self.next()
        elif self.at("op", "-") and self.following.text == "currency":
            self.tokens[self.index + 1] = self.token  # -$5 is $-5
            self.index += 1
            currency = True
        node = self.parse_relation()
        node = self._parse_suffix(node, closers)
        return Node("unit", (node,), "dollar") if currency and node.kind != "unit" else node

    def _labelled(self, words: list[str], closers: tuple[str, ...]) -> Node:
        value = self.parse_item(closers)
        if value is None:
            raise ParseError
        return Node("label", (value,), " ".join(words).lower())

    def _read_words(self) -> list[str]:
        words: list[str] = []
        while self.at("word") or self.at("text"):
            if self.at("word", *SEPARATOR_WORDS) and words:
                break
            token = self.next()
            words.append(token.text if token.kind == "text" else token.text.lower())
            while self.at("op", "'", "-", '"') and self.following.kind == "word":
                self.next()
        return words

    def _skip_qualifier(self, closers: tuple[str, ...]) -> None:
        """Pass over "where n is an integer"; the symbols it speaks of count as bound."""
        while not self._at_closer(closers):
            token = self.next()
            if token.text.lower() in _ALTERNATIVE_WORDS:
                raise ParseError  # "42 if n is even, else 43" gives no one value
            if token.kind == "sym":
                self.bound.add(token.text)

    def _parse_suffix(self, node: Node, closers: tuple[str, ...]) -> Node:
        """Units, ordinals, qualifiers and end marks behind a value."""
        if self.accept("op", "currency", "€", "£", "¥"):
            node = Node("unit", (node,), "dollar")
        is_braced = self.token.text == "{" and self.following.kind in ("word", "text")
        if not (self.at("word") or self.at("text") or is_braced) or self._at_separator():
            return node
        if self.token.text.lower() in QUALIFIER_WORDS:
            self._skip_qualifier(closers)
            return node
        pieces: list[str] = []
        while not self._at_closer(closers) and not self._at_separator():
            token = self.token
            if token.text.lower() in QUALIFIER_WORDS and token.kind == "word":
                self._skip_qualifier(closers)
                break
            is_exponent = token.kind == "num" and pieces[-1:] == ["^"]
            is_mark = token.kind == "op" and token.text in ("^", "/", "*", "-", "'", "%")
            is_letter = token.kind == "sym" and pieces[-1:] == ["/"]
            is_brace = token.kind in ("open", "close") and token.text in "{}()"
            if not (token.kind in ("word", "text") or is_mark or is_letter or is_brace):
                if not is_exponent and not (pieces[-2:-1] == ["^"] or pieces[-1:] == ["{"]):
                    raise ParseError
            self.next()
            pieces.append(token.text)
        words = [piece for piece in pieces if piece not in ("th", "st", "nd", "rd", "{", "}")]
        while words and words[0].lower() in SCALE_WORDS:
            node = Node("mul", (node, number_node(SCALE_WORDS[words.pop(0).lower()])))
        if not words:
            return node
        name = " ".join(words).replace(" ^ ", "^").replace(" / ", "/")
        is_option = node.kind == "sym" and len(node.name) == 1 and node.name.isupper()
        if node.kind in ("sym", "mul") and not is_option and not has_kind(node, "num"):
            if unit_scale(name) is None and words[0] not in ("unit", "units"):
                raise ParseError  # "AB wins it all" is a sentence, not a quantity
        return Node("unit", (node,), name)


def _are_equations(items: list[Node]) -> bool:
    """x = 1, y = 2: before an 'or', one solution."""
    return len(items) > 1 and all(item.kind == "rel" and item.name == "=" for item in items)


def _text_or_number(words: list[str]) -> Node:
    """A number word is its number; other words are text."""
    if " ".join(words) in _ALL_REALS:
        return Node("sym", name="\\mathbb{R}")
    values = [NUMBER_WORDS[word] for word in words if word in NUMBER_WORDS]
    if len(words) == 1 and values and words[0] != "none":
        return number_node(values[0])
    if len(words) == 2 and len(values) == 2 and 20 <= values[0] < 100 and 0 < values[1] < 10:
        return number_node(values[0] + values[1])
    if len(words) > 1 and words[0] in NUMBER_WORDS and len(values) == 1:
        return Node("unit", (number_node(values[0]),), " ".join(words[1:]))
    return Node("text", name=" ".join(words))
