"""Where a completion announces its answer: 'the answer is 5', '#### 5', '<answer>5</answer>', ...

Each finder scans from the end and checks a bounded number of places, so its time is linear in the
length of the text. It yields Statements; `extract` ranks them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from rewards.extraction.languages import (
    ALL_LABELS,
    ANNOUNCEMENTS,
    ASCII_LABELS,
    NEGATION,
    starts_a_word,
)
from rewards.extraction.wording import MAX_STATED, SO, VALUE, is_value, stated

Method = Literal["boxed", "hashes", "tag", "phrase", "bold", "math", "none"]

MAX_LOOKED_AT = 2000
MAX_PLACES = 16  # occurrences of a keyword that are checked, counted from the end
MAX_TAIL = 2048  # characters at the end that are searched for other languages than English
MAX_BEFORE = 240  # characters before a keyword that are checked


@dataclass(frozen=True, slots=True)
class Statement:
    """An answer announced in the text, and its span.

    `is_value`: a bare value, which overrules an earlier box; a sentence does not.
    `is_supposed`: about another case than the one asked ("else it would be 5"); overrules nothing.
    """

    start: int
    end: int
    answer: str
    method: Method
    is_value: bool
    is_supposed: bool = False


_TITLE = (
    r"(?:final|correct|right|required|desired|overall|actual|only|exact|numerical|numeric|best"
    r"|simplified)"
)
_COPULA = (
    r"(?:is|are|was|equals|becomes|would be|will be|should be|must be|has to be"
    r"|comes out (?:to be|to|as)|turns out to be)\b"
)
_EMPTY_BOX = r"[\"'`$]*\\boxed\{\s*\}[\"'`$]*"
# Between 'the answer' and the answer itself.
_FORMULA = r"\\\((?:[^\\\n]|\\(?!\))){1,150}\\\)|\$[^$\n]{1,150}\$"
_FORWARD = re.compile(
    rf"s?\b(?:\s*\([^()\n]{{1,30}}\))?(?:(?:\s+in\s+{_EMPTY_BOX})?[\s*_\"'`)\]}}]*"
    rf"(?:\b{_COPULA}|=|:|→|⇒|\\[rR]ightarrow\b|(?<=\s)[–—-](?=\s))"
    rf"|\s+(?:to|of|for|from)\s(?:{_FORMULA}|\\(?!\()|[^.:\n$=\\]){{0,80}}?"
    rf"(?:\s+in\s+{_EMPTY_BOX})?[\s*_\"'`)\]}}]*(?:\b{_COPULA}|:))[\s*_:\"'`}}]*"
    rf"(?:in\s+)?(?:{_EMPTY_BOX}\s*(?:is\b|:|=)[\s:]*)?",
    re.IGNORECASE,
)
_HEADING_BEFORE = re.compile(rf"(?:^|\n)[\s#*_>\d.)]*(?:the\s+)?(?:{_TITLE}\s+)?$", re.IGNORECASE)
_AFTER_ANS = re.compile(r"\s?[.:=)]+\s*|\s+(?=[\d$\\-])")
_HEADING_AFTER = re.compile(r"s?[*_# \t]*\n\s*")
# Before 'the answer': words that make it a hypothesis, or someone else's answer.
_HYPOTHESIS = re.compile(
    r"\b(?:if|suppose|supposing|assume|assuming|whether|unless|say|imagine|provided|is|could|can|would"
    r"|might|maybe|perhaps|possibly|not|isn't|until|how)\s+(?:that\s+)?(?:the|my|our|your|an?)?\s*"
    rf"(?:{_TITLE}\s+)?$"
    r"|\b(?:this|each|every|any|another|an|no|wrong|incorrect|first|initial|previous|earlier|old"
    r"|student'?s?|students'|their|his|her|whose|possible|partial|intermediate|original|common)\s+"
    r"(?:\w+\s+)?$",
    re.IGNORECASE,
)
# "If x were 3, the answer would be 5" is about another case than the one asked.
_WOULD = re.compile(
    r"(?:\s+to [^.\n]{0,60}?)?\s+(?:would|could|might)\s+(?:\w+\s+)?(?:be|have been|become)\b",
    re.IGNORECASE,
)
_OTHER_CASE = re.compile(
    r"(?:^|[.!?;:\n,(]\s*)(?:but |and |while |whereas )?(?:if|had|were|should|suppos(?:e|ing)"
    r"|assuming|unless|with|without|otherwise|else|in that case|for (?:example|instance)"
    r"|for comparison|instead)\b[^.!?\n]*$",
    re.IGNORECASE,
)
# 'The answer is correct', 'the answer is found by' state no value.
_REFUSED = re.compile(
    r"(?:in)?correct\b|right\b|wrong\b|verified\b|as follows|formatted|expressed|written|rounded"
    r"|found\b|given\b|obtained\b|shown\b|derived\b|stated\b|computed\b|calculated\b|in the\b"
    r"|reasonable|valid\b|clear\b|unique\b|below\b|above\b|consistent|simply$|(?:an?|the) (?:number"
    r"|integer|value|sum|product|difference|ratio|letter|option|one|same|following)\b",
    re.IGNORECASE,
)
_VALUE = rf"(?:\\\([^\n]{{1,200}}?\\\)|{VALUE})"
_ENDS_IN_VALUE = re.compile(rf"(?:^|[^\w.,/$])({_VALUE})(?:\s[a-z]+){{0,2}}[\s,*]*$")
_IS_THE = re.compile(
    r"\s(?:is|are)(?:\s+(?:therefore|thus|hence|indeed|then|clearly|also))?\s+(?:the|our|my)\s+"
    rf"(?:{_TITLE}\s+){{0,2}}$",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\s+(?:can(?:not|'t| not)|could(?:n't| not)|isn't|is unlikely to|won't|will not|must not"
    r"|should not"
    r"|shouldn't|would not|wouldn't|does not|doesn't|was not|wasn't)(?:\s+(?:be|equal))?\s",
    re.IGNORECASE,
)
_OF_VALUE = re.compile(rf"s?\s+of\s+(?={_VALUE}(?![\w^]))")
_LETTER = r"(?:\*\*|\$|\\text(?:bf)?\{|\\mathbf\{|\(){0,3}(?P<letter>[A-J])(?:\}|\*\*|\$|\)){0,3}"
_LONE_LETTER = re.compile(
    rf"[\s*_]*(?:(?i:{SO}|∴)[\s,:]+)?"
    r"(?:(?i:it's|it is|it must be|(?:i|i'd|i would|we|i'll) (?:pick|choose|say|go with"
    rf"|select))\s+)?(?:(?i:option|choice)\s+)?{_LETTER}(?:,?\s(?:because|since|as)\s.*|[\s.*_]*)"
)
_HAS_VALUE = re.compile(r"\d|\$|\\")
_LETTER_IS = re.compile(
    rf"(?:^|[\s*])(?P<not>not\s+)?{_LETTER}(?:\s*[:.)]\s*[^.\n]{{1,60}}?)?\s+is"
    r"(?:\s+(?:therefore|thus|indeed|the))*[\s*]*$"
)
_LETTER_AFTER = re.compile(
    rf"(?:\s+(?:is|option|choice|answer|letter|one))*\s*:?\s+{_LETTER}(?=\s*(?:[.!*\n,:;]|$))"
)
_FINAL_THING = re.compile(
    r"final\s+(?:result|value|solution|total|number|amount|count|sum|output|expression|probability"
    r"|price|cost)\b"
)
_HEADER = re.compile(
    r"\d+[.)]\s+\D|(?:step|part|case|problem|solution|example|method|approach)\b", re.IGNORECASE
)
_TAGS = ("<answer>", "<final_answer>", "<final answer>", "<ans>", "[answer]")
_OPTIONS_FOLLOW = re.compile(r"[^\n]*\n\s*\(?B[.:)]")


def lower(text: str) -> str:
    """Lower case of the same length: `str.lower` turns the dotted capital I into two characters."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else "".join(c.lower()[:1] for c in text)


def places(lowered: str, words: tuple[str, ...], floor: int) -> Iterator[tuple[int, str]]:
    """(position, word) of the last MAX_PLACES words at or after `floor`, last one first."""
    last = {word: start for word in words if (start := lowered.rfind(word, floor)) >= 0}
    num_places = 0
    for _ in range(MAX_LOOKED_AT):
        if not last or num_places == MAX_PLACES:
            return
        word = max(last, key=lambda item: (last[item], len(item)))
        position = last[word]
        if starts_a_word(lowered, position):
            num_places += 1
            yield position, word
        for item, found in list(last.items()):
            if found >= position:
                last[item] = lowered.rfind(item, floor, position + len(item) - 1)
                if last[item] < 0:
                    del last[item]


def answers(text: str, lowered: str, floor: int) -> Iterator[Statement]:
    """Statements such as 'the answer is 5', last one first, without hypotheses."""
    for position, _ in places(lowered, ("ans",), floor):
        statement = _answer(text, position)
        if statement is not None:
            yield statement


def choices(text: str, lowered: str, floor: int) -> Iterator[Statement]:
    """'The final result is 5', 'option B is correct', in the last MAX_TAIL characters."""
    for position, word in places(lowered, tuple(_FORMS), max(floor, len(text) - MAX_TAIL)):
        statement = _FORMS[word](text, position)
        if statement is not None:
            yield statement


def _statement(text: str, start: int) -> Statement | None:
    """The statement that begins at `start`."""
    rest = text[start : start + MAX_STATED]
    answer = stated(rest)
    if answer.lower().startswith(("wrong", "incorrect", "not right", "not correct")):
        return Statement(start, start, answer, "phrase", False)
    if not answer or _REFUSED.match(answer):
        return None
    position = rest.find(answer)
    end = start + position + len(answer) if position >= 0 else start
    return Statement(start, end, answer, "phrase", is_value(answer))


def _answer(text: str, position: int) -> Statement | None:
    """'The answer is 5', 'Ans: 5', '5 is our answer', and 'Answer' as a heading."""
    if text[position + 3 : position + 6].lower() != "wer":
        match = _AFTER_ANS.match(text, position + len("ans"))
        return None if match is None else _statement(text, match.end())
    before = text[max(position - MAX_BEFORE, 0) : position]
    end = position + len("answer")
    heading = _HEADING_AFTER.match(text, end)
    if heading is not None and _HEADING_BEFORE.search(before):
        return _statement(text, heading.end())
    is_the = _IS_THE.search(before)
    if is_the is not None:
        value = _ENDS_IN_VALUE.search(before[: is_the.start()])
        start = max(position - MAX_BEFORE, 0) + value.start(1) if value is not None else 0
        if value is not None:
            return Statement(start, end, stated(value[1]), "phrase", True)
    if _HYPOTHESIS.search(before[-60:]):
        return None
    denied = _DENIED.match(text, end)
    if denied is not None:
        return _denied(text, position, denied.end())
    forward = _FORWARD.match(text, end) or _OF_VALUE.match(text, end)
    statement = None if forward is None else _statement(text, forward.end())
    is_supposed = _WOULD.match(text, end) is not None and _OTHER_CASE.search(before) is not None
    return replace(statement, is_supposed=True) if statement and is_supposed else statement


def _denied(text: str, start: int, end: int) -> Statement:
    """'The answer cannot be 5' as the answer 'not 5', which is never right, rather than 5."""
    answer = stated("not " + text[end : end + MAX_STATED].lstrip())
    return Statement(start, end, answer, "phrase", is_value(answer))


def _option(text: str, position: int) -> Statement | None:
    """'The correct option is (B)', 'option: B'."""
    before = text[max(position - MAX_BEFORE, 0) : position]
    end = position + len("option")
    forward = _FORWARD.match(text, end)
    if forward is None or text[end : end + 1] == "s" or _HYPOTHESIS.search(before[-60:]):
        return None
    return _statement(text, forward.end())


def _final(text: str, position: int) -> Statement | None:
    """'The final result is 5'."""
    thing = _FINAL_THING.match(text[position : position + 40].lower())
    forward = None if thing is None else _FORWARD.match(text, position + thing.end())
    return None if forward is None else _statement(text, forward.end())


def _correct(text: str, position: int) -> Statement | None:
    """'Option B is correct', 'option B is right', but not 'angle B is right'."""
    before = text[max(position - MAX_BEFORE, 0) : position]
    if text[position] in "rR" and not re.search("option|choice", before[-40:], re.IGNORECASE):
        return None
    match = _LETTER_IS.search(before[-120:].rpartition("\n")[2])
    if match is None or match["not"] or text[position - 1] not in " *\n":
        return None
    return Statement(position, position + len("correct"), match["letter"], "phrase", True)


def _chosen(text: str, position: int) -> Statement | None:
    """'We choose (B)'."""
    match = _LETTER_AFTER.match(text, position + len("choose"))
    if match is None:
        return None
    return Statement(match.start("letter"), match.end(), match["letter"], "phrase", True)


_FORMS: dict[str, Callable[[str, int], Statement | None]] = {
    "option": _option,
    "choice": _option,
    "final ": _final,
    "correct": _correct,
    "right": _correct,
    "choose": _chosen,
    "select": _chosen,
}


def foreign_phrases(text: str, lowered: str, floor: int) -> Iterator[Statement]:
    """Announcements in other languages, in the last MAX_TAIL characters."""
    floor = max(floor, len(text) - MAX_TAIL)
    labels = ASCII_LABELS if text.isascii() else ALL_LABELS
    for position, label in places(lowered, labels, floor):
        match = ANNOUNCEMENTS[label].match(text, position)
        if match is None:
            continue
        if NEGATION.search(lowered, position + len(label), match.start("rest")):
            yield _denied(text, position, match.start("rest"))
            continue
        statement = _statement(text, match.start("rest"))
        if statement is not None:
            yield statement


def hashes(text: str, floor: int) -> Iterator[Statement]:
    """Lines such as '#### 5', last one first, without headings."""
    end = len(text) if "#" in text else 0
    for _ in range(MAX_PLACES):
        position = text.rfind("####", floor, end)
        if position < 0:
            return
        end = position
        line = text[position + 4 : position + MAX_STATED].lstrip("#").lstrip(" :").split("\n", 1)[0]
        line = line.strip()
        if not line or _HEADER.match(line):
            continue
        answer = stated(line)
        if answer and (is_value(answer) or _HAS_VALUE.search(answer)):
            kept = line if line.startswith(answer) and len(line) <= len(answer) + 1 else answer
            stop = position + 4 + len(line)
            yield Statement(position, stop, kept, "hashes", is_value(answer))


def tags(text: str, lowered: str, floor: int) -> Iterator[Statement]:
    """Contents of <answer>5</answer>, last one first; an unclosed tag ends with its line."""
    names = _TAGS if "<" in text else _TAGS[-1:] if "[" in text else ()
    for position, tag in places(lowered, names, floor):
        start = position + len(tag)
        end = lowered.find(tag[0] + "/" + tag[1:], start)
        content = text[start:end].strip() if end >= 0 else ""
        if end < 0:
            content = text[start : start + MAX_STATED].strip().split("\n", 1)[0]
            end = start + len(content)
        if content:
            yield Statement(position, end, content, "tag", True)


def answer_line(text: str, floor: int) -> Iterator[Statement]:
    """A last line such as 'A: 18', unless it starts a list of options."""
    position = text.rfind("\nA:", floor) if "\n" in text else -1
    if position < 0 and (floor > 0 or not text.startswith("A:")):
        return
    start = position + 3 if position >= 0 else 2
    rest = text[start : start + MAX_STATED].lstrip()
    line = rest.split("\n", 1)[0].strip()
    if line and not _OPTIONS_FOLLOW.match(rest):
        answer = stated(line)
        yield Statement(start, start + len(line), answer, "phrase", is_value(answer))


def lone_letter(text: str, floor: int) -> Iterator[Statement]:
    """A last line that is only an option's letter, or 'so it is (C)'."""
    end = len(text.rstrip())
    start = max(text.rfind("\n", floor, end) + 1, floor)
    match = _LONE_LETTER.fullmatch(text, start, end) if end - start < MAX_BEFORE else None
    previous = text[:start].rstrip().rpartition("\n")[2] if match is not None else ""
    if match is not None and not _LONE_LETTER.fullmatch(previous[:MAX_BEFORE]):
        yield Statement(match.start("letter"), end, match["letter"], "phrase", True)
