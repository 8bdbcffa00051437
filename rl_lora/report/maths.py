"""Converts LaTeX in hostile text to bounded trees of MathML, made of names and characters only.

A tree is [tag, {attribute: value}, child, ...], where a child is a tree or a string. Tags and
attributes come from the short lists below, and the page builds elements from them, so no model text
is ever parsed as HTML. What cannot be converted stays text.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import Converter

Tree = list[Any]

MAX_CHARS = 600  # of a formula
MAX_DEPTH = 30  # of braces in a formula, and of its tree
MAX_NODES = 800  # of a tree

_TAGS = frozenset(
    "mrow mi mn mo ms mtext mspace msup msub msubsup mfrac msqrt mroot mover munder munderover "
    "mtable mtr mtd mstyle mpadded mphantom mmultiscripts mprescripts none".split()
)
_PLAIN_ATTRIBUTES = frozenset(
    "accent accentunder columnalign columnlines displaystyle fence form largeop linethickness "
    "mathvariant movablelimits rowlines scriptlevel separator stretchy symmetric".split()
)
_LENGTH_ATTRIBUTES = frozenset("columnspacing lspace rowspacing rspace width".split())
_PLAIN_VALUE = re.compile(r"[A-Za-z0-9.+ -]{1,30}")
_LENGTH_VALUE = re.compile(r"-?[0-3]?(\.\d{1,4})?(em|ex)")  # a few characters wide at most
# Definitions can expand a short formula without bound.
_DEFINES = re.compile(
    r"\\(?:re|provide)?(?:newcommand|command|newenvironment)|\\[egx]?def|\\let|\\Declare"
)
_ENVIRONMENTS = "align|aligned|equation|gather|gathered|multline|array|cases|[pbvBV]?matrix"
# No pattern has nested repetition and each formula is bounded, so matching is linear.
_FORMULA = re.compile(
    rf"""
      \$\$(?P<dollars>[^$]{{1,{MAX_CHARS}}})\$\$
    | \\\[(?P<brackets>.{{1,{MAX_CHARS}}}?)\\\]
    | \\\((?P<parens>.{{1,{MAX_CHARS}}}?)\\\)
    | (?P<environment>\\begin\{{(?P<name>{_ENVIRONMENTS})(?P<star>\*?)\}}
        .{{1,{MAX_CHARS}}}?\\end\{{(?P=name)(?P=star)\}})
    | (?<![\\$])\$(?P<dollar>[^\s$](?:[^$\n]{{0,{MAX_CHARS}}}[^\s$\\])?)\$(?!\d)
    | (?P<boxed>\\boxed\{{)
    """,
    re.VERBOSE | re.DOTALL,
)


def find_formulas(text: str) -> Iterator[tuple[int, int, str, bool]]:
    r"""(start, end, LaTeX without its delimiters, is displayed) of each formula, left to right.

    Recognised are $...$ (by pandoc's rule, which spares prices: no space just inside the dollars,
    no digit after them), $$...$$, \(...\), \[...\], environments, and a bare \boxed{...}.
    """
    position = 0
    while match := _FORMULA.search(text, position):
        end = match.end()
        if match["boxed"]:
            close = _closing_brace(text, end)
            if close is None:
                position = end
                continue
            end = close + 1
            yield match.start(), end, text[match.start() : end], False
        else:
            kind = match.lastgroup or ""  # the outermost
            yield match.start(), end, match[kind], kind in ("dollars", "brackets")
        position = end


def to_tree(latex: str) -> Tree | None:
    """The formula's tree; None: it is too long or deep, defines macros, or is not LaTeX."""
    if len(latex) > MAX_CHARS or _depth(latex) > MAX_DEPTH or _DEFINES.search(latex):
        return None
    try:
        element = Converter().convert_to_element(latex)
    # On malformed input the converter raises a dozen of its own exceptions and others (IndexError,
    # StopIteration); in any case the text is then shown as it is.
    except Exception:  # noqa: BLE001
        return None
    if sum(1 for _ in element.iter()) > MAX_NODES:
        return None
    children = [tree for child in element if (tree := _tree(child, MAX_DEPTH * 2)) is not None]
    return ["mrow", {}, *children] if len(children) == len(element) else None


def _tree(element: Element, depth: int) -> Tree | None:
    attributes = {}
    tag = element.tag
    if tag == "menclose":  # not in MathML Core: the page draws the box of \boxed
        tag = "mrow"
        attributes["class"] = "boxed" if "box" in element.get("notation", "") else "struck"
    if tag not in _TAGS or depth == 0:
        return None
    attributes |= {name: v for name, v in element.attrib.items() if _is_allowed(name, v)}
    tree: Tree = [tag, attributes]
    if element.text:  # the converter writes symbols as character references
        tree.append(html.unescape(element.text))
    for child in element:
        branch = _tree(child, depth - 1)
        if branch is None:
            return None
        tree.append(branch)
    return tree


def _is_allowed(name: str, value: str) -> bool:
    if name in _LENGTH_ATTRIBUTES:
        return _LENGTH_VALUE.fullmatch(value) is not None
    return name in _PLAIN_ATTRIBUTES and _PLAIN_VALUE.fullmatch(value) is not None


def _depth(latex: str) -> int:
    return max(accumulate((c == "{") - (c == "}") for c in latex), default=0)


def _closing_brace(text: str, start: int) -> int | None:
    """The index of the brace closing the one before `start`."""
    depth = 1
    for index in range(start, min(len(text), start + MAX_CHARS)):
        if text[index] in "{}" and text[index - 1] != "\\":
            depth += 1 if text[index] == "{" else -1
            if depth == 0:
                return index
    return None
