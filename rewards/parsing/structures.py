"""Parser for relations, ratios, sets, brackets and environments."""

from __future__ import annotations

from rewards.parsing.expressions import ExpressionParser
from rewards.parsing.nodes import UNNAMED, LimitExceeded, Node, ParseError, function
from rewards.parsing.tokens import Token

MAX_ATTEMPTS = 8
_RELATIONS = frozenset({"=", "<", ">", "<=", ">=", "!=", "~=", "===", "in", "notin", "subset"})
_HEAD_RELATIONS = frozenset({"=", "~=", "<", "<=", ">", ">="})
_CLOSERS: dict[str, tuple[str, ...]] = {
    "(": (")", "]"),
    "[": (")", "]"),
    "{": ("}", "\\}"),
    "\\{": ("\\}", "}"),
}
_CLOSERS |= {"<": (">",), "lfloor": ("rfloor",), "lceil": ("rceil",)}
_SET_OPERATIONS = {"cup": "union", "cap": "inter", "setminus": "minus", "U": "union"}
_DETERMINANTS = frozenset({"vmatrix", "Vmatrix"})
_MATRICES = frozenset("matrix pmatrix bmatrix Bmatrix smallmatrix array".split()) | _DETERMINANTS


class StructureParser(ExpressionParser):
    """Parses relations, sets and environments; subclasses parse their items."""

    _head = -1  # where the current relation begins
    num_attempts = 0  # at reading braces as a set-builder

    def parse_relation(self) -> Node:
        self._head = self.index
        # "< 5" is about an unknown without a name.
        is_bare = self.token.kind == "op" and self.at("op", "<", ">", "<=", ">=", "!=")
        operands = [UNNAMED if is_bare else self.parse_set_operation()]
        operators: list[str] = []
        while self.at("op") and self.token.text in _RELATIONS:
            operators.append(self.next().text)
            operands.append(self.parse_set_operation())
        if not operators:
            return operands[0]
        if operators[-1] == "===":
            congruence = self._congruence(operands)
            if congruence is not None:
                return congruence
        return Node("rel", tuple(operands), " ".join(operators))

    def _congruence(self, operands: list[Node]) -> Node | None:
        r"""a \equiv b \pmod{m}, or followed by a bare (m); None without a modulus."""
        last = operands[-1]
        if len(operands) == 2 and last.kind == "open" and last.name == "mod":
            return Node("congruence", (operands[0], *last.args))
        if len(operands) == 2 and self.at_modulus():
            self.next()
            modulus = self.parse_primary()
            self.next()
            return Node("congruence", (*operands, modulus))
        return None

    def at_modulus(self) -> bool:
        r"""At the bare (5) of x \equiv 2 (5)?"""
        group = self.tokens[self.index : self.index + 3]
        return (
            len(group) == 3
            and group[2].text == ")"
            and [token.text for token in group[::2]] == ["(", ")"]
            and group[1].kind in ("num", "sym")
            and any(t.text == "===" for t in self.tokens[max(self.index - 3, 0) : self.index])
            and self.tokens[self.index + 3].kind == "end"
        )

    def parse_symbol(self, token: Token) -> Node:
        if self.index - 1 == self._head and self._is_called_head(token.text):
            return self.parse_call(token.text)
        return super().parse_symbol(token)

    def _is_called_head(self, name: str) -> bool:
        """`T(10) = 2`: a letter with parentheses before a relation sign is a function value."""
        if self.token.text != "(":
            return False
        depth, end = 1, self.index
        while depth:
            end += 1
            if self.tokens[end].kind == "end":
                return False
            depth += {"open": 1, "close": -1}.get(self.tokens[end].kind, 0)
        content, follower = self.tokens[self.index + 1 : end], self.tokens[end + 1]
        is_plain = all(t.kind in ("sym", "num") or t.text in (",", "-") for t in content)
        is_relation = follower.kind == "op" and follower.text in _HEAD_RELATIONS
        return is_relation and is_plain and all(t.text != name for t in content)

    def parse_set_operation(self) -> Node:
        left = self.parse_ratio()
        while self.at("op", *_SET_OPERATIONS) or (
            self.at("sym", "U") and left.kind in ("seq", "union")
        ):
            name = _SET_OPERATIONS[self.next().text]
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
        if opener not in _CLOSERS:
            raise ParseError
        closers = _CLOSERS[opener]
        saved = self.num_open_bars, self.is_bar_separator
        self.num_open_bars, self.is_bar_separator = 0, opener in ("\\{", "{")
        items = self._parse_set_items(closers)
        self.num_open_bars, self.is_bar_separator = saved
        if not self.at("close", *closers):
            raise ParseError
        closer = self.next().text
        return _bracketed(opener, closer, items)

    def _parse_set_items(self, closers: tuple[str, ...]) -> list[Node]:
        if not (self.is_bar_separator and self._has_bar()):
            return self.parse_items(closers)[0]
        self.num_attempts += 1
        if self.num_attempts > MAX_ATTEMPTS:
            raise LimitExceeded  # each nested attempt doubles the work
        start = self.index
        try:
            first = self.parse_relation()
        except ParseError:
            self.index = start
            first = None
        if first is not None and self.at("op", "|", ":"):
            self.next()
            self.is_bar_separator = False
            conditions, separators, _ = self.parse_items(closers)
            if not conditions:
                raise ParseError
            if first.kind == "sym" and first.name in self.domains:
                first = self.domains[first.name]  # {n | n \in N, n < 4}
            joint = "or" if "or" in separators else "and"
            condition = (
                conditions[0] if len(conditions) == 1 else Node("list", tuple(conditions), joint)
            )
            return [Node("builder", (first, condition))]
        self.index = start
        return self.parse_items(closers)[0]

    def _has_bar(self) -> bool:
        """Does this bracket contain a bar or colon, outside nested brackets?"""
        depth = 0
        for token in self.tokens[self.index :]:
            depth += {"open": 1, "close": -1}.get(token.kind, 0)
            if depth < 0:
                return False
            if depth == 0 and token.kind == "op" and token.text in ("|", ":"):
                return True
        return False

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
            elif self.at("word", "otherwise", "else") and rows[-1]:
                rows[-1].append(Node("text", name=self.next().text))
            elif name == "cases":
                if self.at("word", "if", "for", "when", "where") and rows[-1]:
                    self.next()
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
        if name not in _MATRICES or len({len(row) for row in rows}) != 1:
            raise ParseError
        matrix = Node("matrix", tuple(Node("seq", tuple(row), "row") for row in rows))
        return Node("open", (matrix,), "det") if name in _DETERMINANTS else matrix


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
        raise ParseError  # only an interval may have two kinds of brackets
    if len(items) == 1:
        return items[0]
    name = "<>" if opener == "<" else opener + closer
    return Node("seq", tuple(items), name)
