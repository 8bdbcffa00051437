"""Splits hostile text into segments that a page can show without parsing any of them.

A segment is a string (shown as it is), {"h": escape, "n": times} for a hidden character,
{"cut": number of characters left out}, or {"f": index} for a formula.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from rl_lora.report.maths import find_formulas, to_tree
from rl_lora.report.tables import HIDDEN_CATEGORIES
from rl_lora.report.transcripts import CutText

Segment = str | dict[str, Any]

MAX_FORMULAS = 6000  # distinct ones converted per report; the others are shown as text

_RUNS = re.compile(r"[ -~\n\t]+|(.)\1*", re.DOTALL)  # of plain ASCII, or of one other character


class Formulas:
    """The distinct formulas of a report, each converted once."""

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []  # {"src": ..., "tree": ..., "display": bool}
        self._index: dict[str, int | None] = {}

    def index(self, source: str, latex: str, is_displayed: bool) -> int | None:
        """The formula's index in the table; None: it is shown as text."""
        if source not in self._index:
            tree = to_tree(latex) if len(self._index) < MAX_FORMULAS else None
            self._index[source] = None if tree is None else len(self.table)
            if tree is not None:
                self.table.append({"src": source, "tree": tree, "display": is_displayed})
        return self._index[source]


def segments(text: CutText, formulas: Formulas) -> list[Segment]:
    """The text's segments, formulas included."""
    result = _with_formulas(text.head, formulas)
    if text.num_cut:
        result += [{"cut": text.num_cut}, *_with_formulas(text.tail, formulas)]
    return result


def _with_formulas(text: str, formulas: Formulas) -> list[Segment]:
    result: list[Segment] = []
    position = 0
    for start, end, latex, is_displayed in find_formulas(text):
        source = text[start:end]
        if len(visible(source)) != 1:  # a formula with hidden characters is shown as text
            continue
        index = formulas.index(source, latex, is_displayed)
        if index is not None:
            result += visible(text[position:start])
            result.append({"f": index})
            position = end
    return result + visible(text[position:])


def visible(text: str) -> list[Segment]:
    """Plain strings, and hidden characters as marked escapes; line feeds and tabs stay."""
    result: list[Segment] = []
    plain = ""
    for run in _RUNS.finditer(text):
        if run[1] and unicodedata.category(run[1]) in HIDDEN_CATEGORIES:
            result += [plain] if plain else []
            result.append({"h": f"U+{ord(run[1]):04X}", "n": len(run[0])})
            plain = ""
        else:
            plain += run[0]
    return [*result, plain] if plain else result
