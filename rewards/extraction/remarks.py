"""Closing remarks and checks, which follow the conclusion of a text."""

from __future__ import annotations

import re

from rewards.extraction.wording import SO, is_value, stated

MAX_REMARKS = 12  # closing sentences that are skipped
MAX_SENTENCE = 1000
TAIL = 6000  # characters at the end that are searched for a check

_REMARK = re.compile(
    r"\W*(?:would you|do you|did you|want me|shall i|should i|can i|may i|let me know|feel free"
    r"|i hope"
    r"|hope|please|good luck|thank|you're welcome|happy to|note\b(?!.*=)|nb\b|p\.?s\.?\b"
    r"|remember\b|tip\b"
    r"|fun fact|check\b|check:|double[- ]check|verification|verify|verified|is there anything"
    r"|i can help|i'm here|any (?:more|other|further))",
    re.IGNORECASE,
)
_QUESTIONS = re.compile(r".*\b(?:more|other|further|any) questions\b", re.IGNORECASE)
_CHECK = re.compile(
    r"(?:\n|[.!?]\s|\$\s|\\\]\s)[\s*_#(]*(?:(?:let(?:'s| us| me)|we can|to|now|quick|sanity"
    r"|i'll)\s+)*"
    r"(?:check|checking|double[- ]check(?:ing)?|verify|verifying|verification|proof)\b[\s*_]*"
    r"(?::|\.|,|\n|the answer|the result|the solution|this|that|our|by|with|it\b|if)",
    re.IGNORECASE,
)
_EXPLANATION = re.compile(
    r"^(?P<value>[^\n]{1,120})\n\s*[*_#\s]*(?:explanation|reasoning|justification|here's why"
    r"|why)\b",
    re.IGNORECASE,
)
_CONCLUSION = re.compile(rf"\b(?:{SO}|in total|altogether|finally)\b", re.IGNORECASE)


def without_remarks(text: str) -> str:
    """The text without its closing remarks to the reader and its closing check."""
    body = text.strip()
    explained = _EXPLANATION.match(body) if "\n" in body[:121] else None
    if explained is not None and is_value(stated(explained["value"])):
        return explained["value"]
    for _ in range(MAX_REMARKS):
        start = last_sentence(body)
        if start == 0 or not _is_remark(body[start : start + MAX_SENTENCE]):
            break
        body = body[:start].rstrip()
    offset = max(len(body) - TAIL, 0)
    if not any(body.rfind(hint, offset) >= 0 for hint in ("heck", "erif", "roof")):
        return body if any(c.isalnum() for c in body) else text
    concluded = max((match.start() for match in _CONCLUSION.finditer(body, offset)), default=-1)
    for check in _CHECK.finditer(body, offset):
        if check.end() > concluded and any(c.isdigit() for c in body[offset : check.start()]):
            return body[: check.start() + 1]
    return body if any(c.isalnum() for c in body) else text


def _is_remark(sentence: str) -> bool:
    if _REMARK.match(sentence):
        return True
    return "uestions" in sentence and _QUESTIONS.match(sentence) is not None


def last_sentence(text: str) -> int:
    """Start of the last sentence or line, at most MAX_SENTENCE characters back."""
    stop = len(text) - 1
    low = max(stop - MAX_SENTENCE, 0)
    begins = [
        text.rfind(end, low, stop) + len(end)
        for end in ("\n", ". ", ".) ", ".$ ", "! ", "? ", "$$ ")
    ]
    return max(begin if begin > low + 2 else low for begin in begins)
