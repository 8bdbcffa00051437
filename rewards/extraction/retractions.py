"""Text after a statement that retracts it, corrects it, or offers another answer as well."""

from __future__ import annotations

import re

from rewards.extraction.wording import VALUE

MAX_AFTERMATH = 600  # characters after a statement that are checked
MIN_AFTERMATH = 4  # "or 6"

_VALUE = f"(?P<value>{VALUE})"
_START = r"[\s$*_)\\\].,;!…}]*"
_TAKEN_BACK = re.compile(
    _START + r"(?:(?:oh|hmm+|wait|no|oops|actually|but|sorry|however|hold on)[\s,.!…—–-]+)*"
    r"(?:i think )?(?:that|this|it|which)(?:'s| is| was| seems| looks| can't be| cannot be)\s+"
    r"(?:clearly |obviously |all )?(?:wrong|incorrect|not right|not correct|a mistake|an error)\b"
    r"|" + _START + r"(?:wait|no|oops|actually|hmm+)[\s,.!…—–-]+(?:i made a mistake|wrong)",
    re.IGNORECASE,
)
_CORRECTED = re.compile(
    r"\b(?:wait|actually|oops|sorry|hmm+|correction|scratch that|mistake|wrong|incorrect"
    r"|not right)\b"
    r"[^\n]{0,150}?\b(?:should (?:actually |really |instead )?(?:be|have been)|make that|it(?:'s"
    r"| is)"
    r"|i mean[,:]?|answer is|(?:i|we) get)\s+" + _VALUE + r"(?=[.*\s]*(?:[!\n]|$|\.\s))",
    re.IGNORECASE,
)
_NO_WAIT = re.compile(
    r"\b(?:no,? wait|wait,? no|scratch that|correction|i mean|i meant|actually)"
    r"(?:[\s,:;.!…—–]|-(?!\d))+" + _VALUE + r"(?=[.*\s]*(?:[!\n]|$|\.\s))",
    re.IGNORECASE,
)
_OFFERED = re.compile(
    _START + r"(?:(?:or|alternatively)\b[\s,]*(?:maybe|perhaps|possibly|it(?:'s| is))?"
    r"|(?:(?:but|or|and)\s+)?(?:it|the answer)\s+(?:could|might|may)\s+(?:also |instead )?be"
    r"|maybe|perhaps|possibly)[\s,]+" + _VALUE,
    re.IGNORECASE,
)
# Every match of the patterns before _OFFERED contains one of these, which are faster to find.
_HINTS = (
    *("wait", "actually", "oops", "sorry", "hmm", "correction", "scratch", "mistake", "wrong"),
    *("incorrect", "not right", "not correct", "error", "i mean"),
)
_HEDGE = re.compile(r"\b(?:maybe|perhaps|possibly|might|could|(?-i:may))\b", re.IGNORECASE)
_CONDITION = re.compile(r"\b(?:if|when|unless|otherwise|else)\b", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def revision(text: str, end: int, answer: str) -> tuple[str | None, str | None]:
    """(answer, another) after the text after `end`: revised or None; offered as well or None."""
    rest = text[end : end + MAX_AFTERMATH]
    if len(rest) < MIN_AFTERMATH or not rest.strip(" .$*)}\n\\]"):
        return answer, None
    lowered = rest.lower()
    if any(hint in lowered for hint in _HINTS):
        corrections = [*_CORRECTED.finditer(rest), *_NO_WAIT.finditer(rest)]
        if corrections:
            last = max(corrections, key=lambda match: match.start("value"))
            return last["value"].strip("*"), None
        if _TAKEN_BACK.match(rest):
            return None, None
    offered = _OFFERED.match(rest)
    return answer, None if offered is None else offered["value"].strip("*")


def hedged_values(answer: str) -> tuple[str, ...]:
    """The numbers of an answer that wavers: 5 and 6 for '5, but it could be 6'."""
    if not _HEDGE.search(answer) and len(_CONDITION.findall(answer)) < 2:
        return ()
    numbers = tuple(dict.fromkeys(_NUMBER.findall(answer)))
    return numbers if len(numbers) > 1 else ()
