"""The possible readings of an answer's text."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import NamedTuple

from rewards.extraction.extract import extract_boxes, phrase_of
from rewards.extraction.unannounced import last_maths, last_number
from rewards.parsing.nodes import LimitExceeded, Node, ParseError
from rewards.parsing.parser import Parsed, parse
from rewards.parsing.phrases import states_value

_COMMA_IN_NUMBER = re.compile(r"\d,\d{3}(?!\d)")
# Nobody writes 0,5 or 1000,99 as a list of numbers; 2,5 may be one.
_DECIMAL_COMMA = re.compile(r"\s*\$?\s*-?(?:0|\d{4,}),\d+\s*\$?\s*")
_GROUPS = re.compile(
    r"\s*-?(?:\d{1,3}(?:\.\d{3}){2,}(?P<comma>,\d+)?|\d{1,3}(?:'\d{3})+(?:\.\d+)?)\s*"
)
_INDIAN = re.compile(r"\s*-?\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?\s*")
_EUROPEAN = re.compile(r"\s*-?\d{1,3}(?:\.\d{3})+,\d+\s*")
_WORD = re.compile(r"(?:^|(?<=[\s(\"']))[A-Za-z]{2,}(?:'[a-z]+)?(?=$|[\s.,;:!?)\"'])")
_HEDGE = re.compile(r"\b(?:or|either|maybe|perhaps|possibly|unless|between)\b", re.IGNORECASE)
_STATED = re.compile(
    r"(?:\b(?:is|are|equals?|be|was|get|to|of|have|has|at|exactly|approximately|about)|[=:≈])"
    r"[\s$€£({\[]*$",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"\b(?:not|n't|never)\s*$", re.IGNORECASE)
_CALLED = re.compile(r"[A-Za-z_.]\($")  # exit(0) does not state 0
_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?(?:\((?P<letter>[A-J])\)|(?P<plain>[A-J])[.:)])\s*\}?"
    r"(?:\\?[\s:.,~]|\\quad)*(?P<content>[^\s\\].*|\\[a-z{].*)"
)
_OPTION = re.compile(r"(?<![A-Za-z])\(?[A-J][).:]|^[\s(]*[A-J][\s).]*$|\bor\b")
_RETHOUGHT = re.compile(
    r"\b(?:answer|option|choice|wrong|incorrect|not correct|wait)\b", re.IGNORECASE
)
MAX_PROSE = 4096


class Reading(NamedTuple):
    """Readings of one answer, most likely first.

    `status` is "limit" if the text exceeds a limit, "unparsable" if it could not be parsed.
    """

    candidates: tuple[Parsed, ...]
    status: str = "ok"


def read(text: str, *, is_gold: bool = False, depth: int = 0) -> Reading:
    """Readings of an answer."""
    if len(text) > MAX_PROSE:
        return Reading((), "limit")
    if "oxed" in text or "\\fbox" in text:
        content = extract_boxes(text, is_gold=is_gold)
        if content is not None:
            return read(content, is_gold=is_gold, depth=depth)
    if _GROUPS.fullmatch(text):
        text = text.replace("'", "") if "'" in text else text.replace(".", "").replace(",", ".")
    try:
        candidates = [parse(text)]
    except ParseError:
        readings = _choice_readings(text)
        if readings:
            return Reading(tuple(readings))
        return _read_prose(text, is_gold, depth)
    except (LimitExceeded, RecursionError):  # the caller's stack may be deep already
        return Reading((), "limit")
    candidates += _parse_all(_variants(text)) + _choice_readings(text)
    return Reading(tuple(candidates))


# Cached because a prompt's rollouts share its gold.
read_gold = functools.lru_cache(maxsize=4096)(functools.partial(read, is_gold=True))


def _choice_readings(text: str) -> list[Parsed]:
    """The letter and the content of `(D) 12`, `D. 12`; nothing for a list of options."""
    match = _CHOICE.fullmatch(text.strip().strip("$"))
    if match is None or _OPTION.search(match["content"]) or _RETHOUGHT.search(match["content"]):
        return []
    return _parse_all([match["letter"] or match["plain"], match["content"]])


def _parse_all(texts: list[str]) -> list[Parsed]:
    """The readings of the texts that can be parsed."""
    readings = []
    for text in texts:
        with contextlib.suppress(ParseError, LimitExceeded, RecursionError):
            readings.append(parse(text))
    return readings


def _variants(text: str) -> list[str]:
    """Other readings of commas: `1,234` as two numbers, `1,22` as a decimal."""
    variants = []
    if _COMMA_IN_NUMBER.search(text):
        variants.append(re.sub(r"(?<=\d),(?=\d)", ", ", text))
    if _EUROPEAN.fullmatch(text):
        variants.append(text.replace(".", "").replace(",", "."))
    if _INDIAN.fullmatch(text):
        variants.append(text.replace(",", ""))
    if _DECIMAL_COMMA.fullmatch(text):
        variants.append(text.replace(",", "."))
    return variants


def is_prose(text: str) -> bool:
    """Are there words or dollar signs around the maths?"""
    bare = re.sub(r"\\[A-Za-z]+(?:\s*\{[^{}]*\})?", r"\\", text)
    return "$" in text or "\\(" in text or _WORD.search(bare) is not None


def _read_prose(text: str, is_gold: bool, depth: int) -> Reading:
    """Readings of a sentence: of its 'the answer is ...', else of its last maths."""
    kind = "text" if is_prose(text) and not re.search(r"[\\_^=]", text) else "raw"
    words = Parsed(Node(kind, name=text.lower() if kind == "text" else text), frozenset())
    if depth > 2:
        return Reading((), "unparsable")
    if not is_prose(text):
        return Reading((words,), "unparsable")
    phrase = phrase_of(text)
    if phrase and len(phrase) < len(text):
        return read(phrase, is_gold=is_gold, depth=depth + 1)
    if _HEDGE.search(text) and not is_gold:
        return Reading((words,), "unparsable")
    found, content = last_maths(text), None
    if found is not None:
        before = text[: found.start]
        is_stated = found.is_formula or (
            not _NEGATED.search(before)
            and not _CALLED.search(before)
            and (is_gold or _STATED.search(before) or last_number(before) is None)
        )
        if is_stated and states_value(before, text[found.end :]):
            content = found.content
    if content is None or content.strip() == text.strip():
        return Reading((words,), "unparsable")
    inner = read(content, is_gold=is_gold, depth=depth + 1)
    return Reading((*inner.candidates, words), inner.status)
