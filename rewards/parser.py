"""Parser for whole answers: lists, relations, intervals, sets, matrices, labels, units, words."""

from __future__ import annotations

from typing import NamedTuple

from rewards.clean import clean
from rewards.expressions import ExpressionParser
from rewards.nodes import LimitExceeded, Node, ParseError, function, has_kind, number_node
from rewards.tokens import Token, tokenize
from rewards.vocabulary import (
    FILLER_WORDS,
    NUMBER_WORDS,
    QUALIFIER_WORDS,
    SCALE_WORDS,
    SEPARATOR_WORDS,
)
from rewards.words import unit_scale

_RELATIONS = frozenset({"=", "<", ">", "<=", ">=", "!=", "~=", "===", "in", "notin", "subset"})
_ALL_REALS = frozenset({"all real numbers", "all reals", "any real number", "real numbers"})
MAX_ATTEMPTS = 8
_HEAD_RELATIONS = frozenset({"=", "~=", "<", "<=", ">", ">="})
_VERBS = frozenset({"is", "are", "equals", "was", "be"})
_NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "if", "unless", "whether"})
_ALTERNATIVE_WORDS = frozenset({"else", "otherwise", "or", "if", "unless", "not"})
_CLOSERS: dict[str, tuple[str, ...]] = {
    "(": (")", "]"),
    "[": (")", "]"),
    "{": ("}", "\\}"),
    "\\{": ("\\}", "}"),
}
_CLOSERS |= {"<": (">",), "lfloor": ("rfloor",), "lceil": ("rceil",)}
_MATRIX_NAMES = frozenset({"matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"})


class Parsed(NamedTuple):
    """A tree and the symbols that the answer itself quantifies ("for some integer t")."""

    node: Node
    bound: frozenset[str]


def parse(text: str) -> Parsed:
    """Parse one answer. Raises ParseError, LimitExceeded."""
    parser = AnswerParser(tokenize(clean(text)))
    node = parser.parse_answer()
    return Parsed(node, frozenset(parser.bound))


class AnswerParser(ExpressionParser):
    """Adds what stands around scalar expressions."""

    def parse_answer(self) -> Node:
        """The whole token list as one node; a list node where it has several items."""
        items, separators, has_groups = self._parse_items(())
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

    def _parse_items(self, closers: tuple[str, ...]) -> tuple[list[Node], set[str], bool]:
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

    # --- relations, sets -------------------------------------------------------------------

    def parse_relation(self) -> Node:
        self._mark_called_head()
        operands = [self.parse_set_operation()]
        operators: list[str] = []
        while self.at("op") and self.token.text in _RELATIONS:
            operators.append(self.next().text)
            operands.append(self.parse_set_operation())
        if not operators:
            return operands[0]
        return Node("rel", tuple(operands), " ".join(operators))

    def _mark_called_head(self) -> None:
        """`T(10) = 2`: a letter with brackets before a relation sign is a function's value."""
        index = self.index
        if self.tokens[index].kind != "sym" or self.tokens[index + 1].text != "(":
            self._called_head = -1
            return
        depth = 0
        for position in range(index + 1, len(self.tokens)):
            kind = self.tokens[position].kind
            depth += {"open": 1, "close": -1}.get(kind, 0)
            if depth == 0:
                follower = self.tokens[position + 1]
                content = self.tokens[index + 2 : position]
                is_plain = all(t.kind in ("sym", "num") or t.text in (",", "-") for t in content)
                is_own = any(t.text == self.tokens[index].text for t in content)
                is_relation = follower.kind == "op" and follower.text in _HEAD_RELATIONS
                is_head = is_relation and is_plain and not is_own
                self._called_head = index if is_head else -1
                return
        self._called_head = -1

    _called_head = -1
    num_attempts = 0  # at reading braces as a set-builder

    def parse_symbol(self, token: Token) -> Node:
        if self.index - 1 == self._called_head and self.at("open", "("):
            self._called_head = -1
            return self.parse_call(token.text)
        return super().parse_symbol(token)

    def parse_set_operation(self) -> Node:
        left = self.parse_ratio()
        while self.at("op", "cup", "cap", "setminus"):
            name = {"cup": "union", "cap": "inter", "setminus": "minus"}[self.next().text]
            right = self.parse_ratio()
            if left.kind == name and name != "minus":
                left = Node(name, (*left.args, right))
            else:
                left = Node(name, (left, right))
        return left

    def parse_ratio(self) -> Node:
        parts = [self.parse_sum()]
        while self.at("op", ":") and not self.is_bar_separator:
            self.next()
            parts.append(self.parse_sum())
        return parts[0] if len(parts) == 1 else Node("ratio", tuple(parts))

    def parse_list(self, opener: str) -> Node:
        """What follows an opening bracket, up to and with its closing one."""
        self.enter()
        if opener not in _CLOSERS:
            raise ParseError
        closers = _CLOSERS[opener]
        saved = self.num_open_bars, self.is_bar_separator
        self.num_open_bars, self.is_bar_separator = 0, opener in ("\\{", "{")
        items, _, _ = self._parse_set_items(closers)
        self.num_open_bars, self.is_bar_separator = saved
        if not self.at("close", *closers):
            raise ParseError
        closer = self.next().text
        self.depth -= 1
        return _bracketed(opener, closer, items)

    def _parse_set_items(self, closers: tuple[str, ...]) -> tuple[list[Node], set[str], bool]:
        if not (self.is_bar_separator and self._has_bar()):
            return self._parse_items(closers)
        self.num_attempts += 1
        if self.num_attempts > MAX_ATTEMPTS:
            raise LimitExceeded  # every nested attempt doubles the work
        start = self.index
        try:
            first = self.parse_relation()
        except ParseError:
            self.index = start
            first = None
        if first is not None and self.at("op", "|", ":"):
            self.next()
            self.is_bar_separator = False
            conditions, _, _ = self._parse_items(closers)
            if not conditions:
                raise ParseError
            condition = (
                conditions[0] if len(conditions) == 1 else Node("list", tuple(conditions), "and")
            )
            return [Node("builder", (first, condition))], set(), False
        self.index = start
        return self._parse_items(closers)

    def _has_bar(self) -> bool:
        """Does a bar or colon stand in this bracket itself, not in one inside it?"""
        depth = 0
        for token in self.tokens[self.index :]:
            depth += {"open": 1, "close": -1}.get(token.kind, 0)
            if depth < 0:
                return False
            if depth == 0 and token.kind == "op" and token.text in ("|", ":"):
                return True
        return False

    # --- environments ----------------------------------------------------------------------

    def parse_environment(self, token_text: str) -> Node:
        if not token_text.startswith("\\begin"):
            raise ParseError
        name = token_text.split("{")[1].split("}")[0].rstrip("*")
        rows: list[list[Node]] = [[]]
        while not (self.at("env") and self.token.text.startswith("\\end")):
            if self.accept("op", "row"):
                rows.append([])
            elif self.accept("op", "&"):
                continue
            elif self.at("end"):
                raise ParseError
            elif name == "cases":
                item = self.parse_item((",",))
                self.accept("op", ",")
                if item is not None:
                    rows[-1].append(item)
            else:
                rows[-1].append(self.parse_relation())
        self.next()
        rows = [row for row in rows if row]
        if not rows:
            raise ParseError
        if name == "cases":
            items = tuple(
                row[0] if len(row) == 1 else Node("seq", tuple(row), "case") for row in rows
            )
            return Node("list", items, "and")
        if name not in _MATRIX_NAMES and name not in ("vmatrix", "Vmatrix"):
            raise ParseError
        if len({len(row) for row in rows}) != 1:
            raise ParseError
        matrix = Node("matrix", tuple(Node("seq", tuple(row), "row") for row in rows))
        return Node("open", (matrix,), "det") if name in ("vmatrix", "Vmatrix") else matrix


def _are_equations(items: list[Node]) -> bool:
    """x = 1, y = 2: before an 'or', one solution."""
    return len(items) > 1 and all(item.kind == "rel" and item.name == "=" for item in items)


def _bracketed(opener: str, closer: str, items: list[Node]) -> Node:
    if opener in ("lfloor", "lceil"):
        if len(items) != 1:
            raise ParseError
        return function("floor" if opener == "lfloor" else "ceil", items[0])
    if opener in ("\\{", "{"):
        if len(items) == 1 and items[0].kind == "builder":
            return items[0]
        if opener == "{" and len(items) == 1:
            return items[0]
        return Node("set", tuple(items))
    if (opener == "(") != (closer == ")") and opener != "<" and len(items) != 2:
        raise ParseError  # only an interval may open and close differently
    if len(items) == 1:
        return items[0]
    name = "<>" if opener == "<" else opener + closer
    return Node("seq", tuple(items), name)


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
