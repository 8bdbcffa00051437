"""Boxes of a completion: balanced ``\\boxed{}`` and similar commands, from the end."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_JOINED_BOXES = 64  # last boxes that may be joined
MAX_OPENERS = 4096  # last openings of a box that are checked
MAX_BOX_CHARS = 4096  # of a box that may be joined to the next
MAX_BETWEEN = 120  # characters between two boxes of one sentence
_PREFIX_CHARS = len("\\beginb")  # before "oxed"

# "\b" read as an escape sequence leaves a backspace character and "oxed{".
_BOX = re.compile(
    r"(?:\\(?:boxed|fbox|beginboxed|answer(?=\{)|framebox(?:\s*\[[^\[\]{}]{0,20}\]){0,2})"
    r"|\x08oxed|(?<![A-Za-z\\])b?oxed)(?:\s*\{|\s+(?=[-+\d])(?P<bare>[-+]?\d[\d,.]*)|(?P<digit>\d))"
)
_BRACE = re.compile(r"\\[{}\\]|[{}]")
_JOINT = re.compile(
    r"[\s,;.$&()\[\]:\\]*(?:\\text\{)?\s*(?:[a-z]+\s+)?(?:(?:and|or)\b)?[\s,;$&()\[\]\\}]*"
    r"(?:\\q?quad)?[\s$\\]*(?:(?:\\text\{)?\s*(?:and|or)\s*\}?)?[\s,;$&()\[\]\\]*(?:\\q?quad)?[\s$]*"
)
_CONNECTOR = re.compile(r",|;|\band\b|\bor\b")
_LIST_CONNECTOR = re.compile(r",|;|&|\n|\band\b|\bor\b|\bwhile\b|\balternatively\b")
_OR = re.compile(r"\bor\b|\balternatively\b")
# Between two boxes: the second one replaces the first, or is computed from it.
_NEW_ATTEMPT = re.compile(
    r"\b(?:final\w*|then|wait|no|not|instead|actually|correct\w*|better|now|attempts?|try|rather|but"
    r"|revised?|recheck)\b|=>|\\R?ightarrow",
    re.IGNORECASE,
)
_NO_LIST = re.compile(r"[.!?]\s|\n\s*\n|[+*/^<>]|(?<![_\d])\d(?!\d*\})", re.IGNORECASE)
_ABANDONED_BEFORE = re.compile(
    r"(?:\b(?:not|never|instead of|rather than|(?:wrong|incorrect|mistaken)ly|mistake was)|n't"
    r"|\b(?:wrong|incorrect|mistaken|first|initial|previous|earlier|old|original)\s+(?:attempt|try|guess|answer|result|thought)"
    r"|\bat first,?\s+(?:i|we))"
    r"(?:\s+(?:was|is|be|it|i|we|got|had|answer|value|result|gave|said|wrote|the|as|of"
    r"|equal to)\b)*[\s:,$*(\\\[]*$",
    re.IGNORECASE,
)
# Every match of that pattern contains one of these, which are faster to search for.
_HINTS = (
    *("not", "n't", "never", "instead", "rather", "wrong", "incorrect", "mistake", "first"),
    *("initial", "previous", "earlier", "old ", "original"),
)
_ABANDONED_AFTER = re.compile(
    r"[\s$*)\\\].]*(?:which\s+)?(?:is|was|would be|turns out to be|looks)\s+"
    r"(?:clearly |obviously |also )?(?:wrong|incorrect|not (?:right|correct|the answer)|a mistake"
    r"|too (?:big|small|large)|my (?:first|initial|earlier|previous))",
    re.IGNORECASE,
)
_PLACEHOLDER = re.compile(
    r"[\s.?…_]*|(?:\\text\s*\{)?\s*(?:your |the |final )*answer(?: here)?\s*\}?|\\[lc]?dots\s*"
)
_OTHER_ANSWER = (
    r"(?P<other>\$[^$\n]{1,80}\$|[-+]?\\?[$€£]?\d[\d.,/]*|\(?\b[A-J]\b\)?|\\frac\S{1,40})"
)
_OR_AFTER = re.compile(
    r"[\s$)\\\].,*]*(?:\\text\s*\{)?[\s(,]*or\s+(?:maybe |perhaps |possibly |else |even )?\}?\s*"
    + _OTHER_ANSWER
)
_OR_BEFORE = re.compile(_OTHER_ANSWER + r"[\s,*)]*(?:\\text\s*\{)?\s*or\s*\}?[\s$(\\\[*]*$")


@dataclass(frozen=True, slots=True)
class BoxGroup:
    """The last box and those joined to it.

    `boxes`: contents that are offered together, the answer last; empty if every box is empty or
    rejected. `is_either`: they are alternatives or a plain list ("\\boxed{1} and \\boxed{2}"),
    not just boxes in one sentence. `is_formatted`: the last box is a non-empty ``\\boxed{}``.
    `end`: where the last box ends.
    """

    boxes: tuple[str, ...]
    is_either: bool
    is_formatted: bool
    end: int


def opener(text: str) -> re.Match[str] | None:
    """The opening of the first box, closed or not."""
    return _BOX.search(text)


def last_opening(text: str) -> int:
    """Position of the last text that could open a box, or -1."""
    return _last_name(text, 0, len(text))


def find_boxes(text: str, last: int) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last balanced boxes, in text order; `last` is `last_opening`.

    Searches only the part that can contain boxes joined to the last one, unless the last one was
    never closed.
    """
    if last < 0:
        return []
    start = last
    only = _only_box(text, last)
    if only is not None:
        return [only]
    for _ in range(MAX_JOINED_BOXES - 1):
        position = _last_name(text, max(start - MAX_BOX_CHARS, 0), start)
        if position < 0:
            break
        start = position
    boxes = _balanced_boxes(text, max(start - _PREFIX_CHARS, 0))
    if not boxes or boxes[-1][1] < last:
        boxes = _balanced_boxes(text, 0)
    return boxes[-MAX_JOINED_BOXES:]


def _only_box(text: str, position: int) -> tuple[int, int, str] | None:
    """The plain box at `position` if it is the only one, as in most completions."""
    start, end = position - 2, text.find("}", position)
    if end < 0 or not text.startswith("\\boxed{", max(start, 0)):
        return None
    content = text[start + 7 : end]
    if "{" in content or "\\" in content:
        return None
    if _last_name(text, max(start - MAX_BOX_CHARS, 0), start) >= 0:
        return None
    return start, end + 1, content


def _last_name(text: str, low: int, high: int) -> int:
    """Position of the last command that opens a box in text[low:high], or -1."""
    position = text.rfind("oxed", low, high)
    if text.rfind("\\", low, high) < 0:
        return position
    if text.rfind("box", low, high) > position:  # in "boxed", "box" comes before "oxed"
        position = max(position, text.rfind("\\fbox", low, high))
        position = max(position, text.rfind("\\framebox", low, high))
    return max(position, text.rfind("\\answer{", low, high))


def _balanced_boxes(text: str, start: int) -> list[tuple[int, int, str]]:
    """Balanced boxes from `start` on, in one pass over the braces."""
    openers: dict[int, int] = {}
    found: list[tuple[int, int, str]] = []
    for match in list(_BOX.finditer(text, start))[-MAX_OPENERS:]:
        bare = match["bare"] or match["digit"]
        if bare is not None:
            found.append((match.start(), match.end(), bare.rstrip(".,")))
        else:
            openers[match.end() - 1] = match.start()
    if openers:
        stack: list[int] = []
        for match in _BRACE.finditer(text, min(openers)):
            token = match.group()
            if token == "{":
                stack.append(match.start())
            elif token == "}" and stack:
                opening = stack.pop()
                if opening in openers:
                    found.append((openers[opening], match.end(), text[opening + 1 : match.start()]))
    return sorted(set(found))


def box_group(text: str, last: int) -> BoxGroup | None:
    """The last box that states an answer, with those joined to it; None if there is no box."""
    found = find_boxes(text, last)
    if not found:
        return None
    start, end, content = found[-1]
    is_formatted = text.startswith("\\boxed{", start) and bool(content.strip())
    if _is_placeholder(content):
        return BoxGroup((), False, is_formatted, end)
    stated = [box for box in found if _states(text, box)]
    if not stated:
        return BoxGroup((), False, is_formatted, end)
    start, last_end, content = stated[-1]
    if len(stated) == 1 and "or" not in text[max(start - 100, 0) : last_end + 40]:
        return BoxGroup((content.strip(),), False, is_formatted, last_end)
    following = _OR_AFTER.match(text, last_end)
    group = [content] if following is None else [following["other"], content]
    is_either = following is not None
    for earlier in reversed(stated[:-1]):
        between = text[earlier[1] : start]
        kind = _kind_of_joint(between)
        if kind is None:
            break
        is_either = is_either or kind == "either"
        group.append(earlier[2])
        start = earlier[0]
    before = text[max(start - 100, 0) : start]
    other = _OR_BEFORE.search(before) if "or" in before else None
    if other is not None:
        group.append(other["other"])
        is_either = True
    group.reverse()
    return BoxGroup(tuple(item.strip() for item in group), is_either, is_formatted, last_end)


def _states(text: str, box: tuple[int, int, str]) -> bool:
    """Does a box state an answer? Not if it is empty or called wrong."""
    start, end, content = box
    if not content.strip():
        return False
    before = text[max(start - 80, 0) : start].lower()
    if any(hint in before for hint in _HINTS) and _ABANDONED_BEFORE.search(before):
        return False
    return _ABANDONED_AFTER.match(text, end) is None


def _is_placeholder(content: str) -> bool:
    return (
        len(content) < 40 and not content.isdigit() and _PLACEHOLDER.fullmatch(content) is not None
    )


def _kind_of_joint(between: str) -> str | None:
    """How the text between two boxes joins them: "either", "list", or None."""
    if len(between) > MAX_BETWEEN or _NEW_ATTEMPT.search(between):
        return None
    if between.strip(" $") in ("/", "|"):
        return "either"
    if len(between) <= 40 and _JOINT.fullmatch(between) and _CONNECTOR.search(between):
        return "either"
    if _NO_LIST.search(between) or not _LIST_CONNECTOR.search(between):
        return None
    return "either" if _OR.search(between) else "list"
