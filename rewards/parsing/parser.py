"""Parser for whole answers: lists of items, and domains of their symbols."""

from __future__ import annotations

from typing import NamedTuple

from rewards.parsing.clean import clean
from rewards.parsing.items import ItemParser
from rewards.parsing.nodes import Node, ParseError
from rewards.parsing.quantities import compound
from rewards.parsing.tokens import tokenize


class Parsed(NamedTuple):
    """A tree and the symbols that the answer quantifies ("for some integer t")."""

    node: Node
    bound: frozenset[str]


def parse(text: str) -> Parsed:
    """Parse one answer. Raises ParseError, LimitExceeded."""
    text = clean(text)
    if text.endswith("?"):
        text = text.rstrip("? ")
    parser = AnswerParser(tokenize(text))
    node = parser.parse_answer()
    return Parsed(node, frozenset(parser.bound))


class AnswerParser(ItemParser):
    """Parses a whole answer."""

    def parse_answer(self) -> Node:
        """All tokens as one node; a list node if there are several items."""
        items, separators, has_groups = self.parse_items(())
        if not self.at("end") or not items:
            raise ParseError
        if len(items) == 1:
            return items[0]
        name = "or" if "or" in separators else "and" if "and" in separators else ","
        return Node("list", tuple(items), "groups" if has_groups else name)

    def parse_items(self, closers: tuple[str, ...]) -> tuple[list[Node], set[str], bool]:
        """Items up to a closing bracket; with both ',' and ';', groups between ';' are tuples."""
        groups: list[list[Node]] = [[]]
        separators: set[str] = set()
        while not self._at_closer(closers):
            if self._at_separator():
                separator = self.next().text
                separators.add(separator)
                operators = {item.kind == "rel" and item.name for item in groups[-1]}
                is_solution = len(groups[-1]) > 1 and operators == {"="}  # x = 1, y = 2 or ...
                if separator == ";" or (separator == "or" and is_solution):
                    groups.append([])
                continue
            item = self.parse_item(closers)
            if item is not None:
                groups[-1].append(item)
                if self.conditions:
                    names = item.symbols()
                    groups[-1] += [c for c in self.conditions if names & c.symbols() and c != item]
                    self.conditions.clear()
            if not (self._at_closer(closers) or self._at_separator()):
                raise ParseError
        if len(groups[0]) == 1 == len(groups):
            return groups[0], separators, False
        groups = [_spread(self._without_domains(group)) for group in groups]
        groups = [group for group in groups if group]
        if len(groups) > 1 and any(len(group) > 1 for group in groups):
            points = [Node("seq", tuple(g), "()") if len(g) > 1 else g[0] for g in groups]
            return points, separators, True
        return [item for group in groups for item in group], separators, False

    def _without_domains(self, items: list[Node]) -> list[Node]:
        r"""Drop "k \in \mathbb{Z}" next to other items, and bind k."""
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
                self.domains[item.args[0].name] = item
            else:
                kept.append(item)
        return kept


def _spread(items: list[Node]) -> list[Node]:
    r"""x \ne 1, 2 as x \ne 1, x \ne 2; 3 hours and 20 minutes as one quantity."""
    first = items[0] if items else None
    if first is None or len(items) < 2:
        return items
    if first.kind == "rel" and first.name == "!=":
        name = first.args[0]
        others = [item.kind not in ("rel", "text", "label") for item in items[1:]]
        if all(others):
            return [first, *[Node("rel", (name, item), "!=") for item in items[1:]]]
    last = items[-1]
    if last.kind == "open" and last.name == "mod" and first.kind == "rel" and first.name == "===":
        values = [first.args[1], *items[1:-1], last.args[0]]  # n = 1, 3 mod 4
        return [Node("congruence", (first.args[0], value, last.args[1])) for value in values]
    whole = compound(first, items[1]) if len(items) == 2 else None
    return items if whole is None else [whole]
