"""Text after a conclusion: it may retract, correct or add to it; remarks and checks do not."""

from __future__ import annotations

import re

from rewards.extraction.wording import SO, VALUE, is_value, stated

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

MAX_REMARKS = 12  # closing sentences that are skipped
MAX_SENTENCE = 1000
TAIL = 6000  # characters at the end that are searched for a check

_REMARK = re.compile(
    r"\W*(?:would you|do you|did you|want me|shall i|should i|can i|may i|let me know|feel free"
    r"|i hope|hope|please|good luck|thank|you're welcome|happy to|note\b(?!.*=)|nb\b|p\.?s\.?\b"
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


def revision(text: str, end: int, answer: str) -> tuple[str | None, str | None]:
    """(answer, other): the answer as the text after `end` revises it, and one offered as well.

    `answer` is None if it is retracted, `other` if there is none.
    """
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


def without_remarks(text: str) -> tuple[str, int]:
    """The text without its closing remarks and check, and where its last sentence starts."""
    body = text.strip()
    explained = _EXPLANATION.match(body) if "\n" in body[:121] else None
    if explained is not None and is_value(stated(explained["value"])):
        return explained["value"], last_sentence(explained["value"])
    start = last_sentence(body)
    for _ in range(MAX_REMARKS):
        if start == 0 or not _is_remark(body[start : start + MAX_SENTENCE]):
            break
        body = body[:start].rstrip()
        start = last_sentence(body)
    offset = max(len(body) - TAIL, 0)
    if any(body.rfind(hint, offset) >= 0 for hint in ("heck", "erif", "roof")):
        ends = [match.start() for match in _CONCLUSION.finditer(body, offset)]
        for check in _CHECK.finditer(body, offset):
            is_last = check.end() > max(ends, default=-1)
            if is_last and any(c.isdigit() for c in body[offset : check.start()]):
                body = body[: check.start() + 1]
                return body, last_sentence(body)
    if any(c.isalnum() for c in body):
        return body, start
    return text, last_sentence(text)


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
