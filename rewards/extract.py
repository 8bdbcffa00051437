"""Find the final answer in a completion, from the right, in time linear in its length.

Order: after the thinking part, the last balanced ``\\boxed{}``, `#### x`, `<answer>x</answer>`,
'the answer is x', `**x**`, the last formula or number. Boxes are never merged here: those that
stand beside the last one, joined by a comma, 'and' or 'or', are only reported.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Literal

Method = Literal["boxed", "hashes", "tag", "phrase", "bold", "math", "none"]

# Further boxes than this, counted from the last, are not looked at.
MAX_JOINED_BOXES = 64
MAX_OPENERS = 4096  # boxes looked at, counted from the last
MAX_BOX_CHARS = 4096  # of a box that may be joined to the next
_BOX_PREFIXES = ("\\beginb", "\\b", "\x08", "b", "")  # before "oxed"
BOX_PREFIX_CHARS = 7
MAX_NUMBER_CHARS = 400


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was found. `joined` holds two or more boxes joined by ',', 'and', 'or', in text order.

    Example for "so \\boxed{1} and \\boxed{2}."::

        Extraction(answer="2", method="boxed", has_format=True, joined=("1", "2"))
    """

    answer: str | None
    method: Method
    has_format: bool = False
    joined: tuple[str, ...] = ()


NOTHING = Extraction(answer=None, method="none")

_THINK_END = re.compile(r"</think(?:ing)?>|<\|end_of_thought\|>", re.IGNORECASE)
_THINK_START = re.compile(r"<think(?:ing)?>|<\|begin_of_thought\|>", re.IGNORECASE)
_END_TOKEN = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end)\|>|</s>|<eos>|<end_of_turn>"
)
# The lost backslash: "\b" read as an escape leaves a backspace character and "oxed{".
_BOX = re.compile(
    r"(?:\\(?:boxed|fbox|beginboxed)|\x08oxed|(?<![A-Za-z\\])b?oxed)"
    r"(?:\s*\{|\s+(?=[-+\d])(?P<bare>[-+]?\d[\d,.]*)|(?P<digit>\d))"
)
_BRACE = re.compile(r"\\[{}\\]|[{}]")
_JOINT = re.compile(
    r"[\s,;.$&()\[\]:\\]*(?:\\text\{)?\s*(?:[a-z]+\s+)?(?:(?:and|or)\b)?[\s,;$&()\[\]\\}]*"
    r"(?:\\q?quad)?[\s$\\]*(?:(?:\\text\{)?\s*(?:and|or)\s*\}?)?[\s,;$&()\[\]\\]*(?:\\q?quad)?[\s$]*"
)
_HAS_CONNECTOR = re.compile(r",|;|\band\b|\bor\b")
_PHRASE = re.compile(
    r"(?:answers?|option|choice)\b(?:\s+(?:to|of|for)\s[^.:\n$]{0,80}?)?[\s*_:\"']*"
    r"(?:(?:\bis\b|\bare\b|\bequals\b|\bwould be\b|\bwill be\b|=|:)[\s*_:\"']*)(?P<rest>.{1,2000})",
    re.IGNORECASE | re.DOTALL,
)
_PHRASE_WORDS = ("answer", "option is", "choice is")
_NOT_AN_ANSWER = re.compile(
    r"(?:in)?correct\b|right\b|wrong\b|verified\b|as follows", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<!\bvs)(?<!\bSt)\.(?=\s+[A-Z\"'(]|\s*$|\s*\n)|\n\s*\n|\n")
_BOLD = re.compile(r"\*\*([^*\n]{1,400})\*\*")
_NUMBER = re.compile(
    r"(?<![\w.])[-−+]?\s?[$€£]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:\s?/\s?\d[\d,]*)?(?:\s?\\?%)?|(?<![\w.])-?\.\d+"
)
MAX_WHOLE_CHARS = 200
_WORD = re.compile(r"[A-Za-z]{2,}")
_COMMAND = re.compile(r"\\[A-Za-z]+(?:\{[A-Za-z]+\})?")
_FORMULA_WORDS = frozenset("and or where pi sqrt sin cos tan ln log percent pct".split())
_MATH_DELIMITER = re.compile(r"\$|\\[(\[]")


def extract(completion: str) -> Extraction:
    """The final answer of a completion; `answer` is None where there is none."""
    text = after_thinking(completion)
    if text is None:
        return NOTHING
    return (
        _from_final_phrase(text)
        or _from_box(text)
        or _from_hashes(text)
        or _from_tag(text)
        or _from_answer_line(text)
        or _from_phrase(text)
        or _from_bold(text)
        or _from_whole(text)
        or _from_last_maths(text)
        or NOTHING
    )


def after_thinking(completion: str) -> str | None:
    """The part after the thinking delimiter; None where thinking never ended.

    What follows a new, unclosed thinking delimiter or an end-of-text token does not count.
    """
    text = completion
    if "<" in text:
        ends = [match.end() for match in _THINK_END.finditer(text)]
        if ends:
            text = text[ends[-1] :]
        start = _THINK_START.search(text)
        if start is not None:
            text = text[: start.start()]
        token = _END_TOKEN.search(text)
        if token is not None:
            text = text[: token.start()]
        if not text.strip():
            return None
    return text


def _from_box(text: str) -> Extraction | None:
    if "oxed" not in text and "\\fbox" not in text:
        return None
    boxes = find_boxes(text)
    if not boxes:
        return None
    start, _, content = boxes[-1]
    has_format = text.startswith("\\boxed{", start) and bool(content.strip())
    joined = [content]
    for earlier in reversed(boxes[:-1]):
        between = text[earlier[1] : start]
        if len(between) > 40 or not _JOINT.fullmatch(between):
            break
        if not _HAS_CONNECTOR.search(between):
            break
        joined.append(earlier[2])
        start = earlier[0]
    joined.reverse()
    return Extraction(
        answer=content.strip() or None,
        method="boxed",
        has_format=has_format,
        joined=tuple(joined) if len(joined) > 1 else (),
    )


def _gold_boxes(text: str) -> str | None:
    """Boxes of a gold that follow each other with nothing between them are its values."""
    boxes = find_boxes(text)
    if len(boxes) < 2:
        return None
    gaps = [text[a[1] : b[0]].strip(" $") for a, b in itertools.pairwise(boxes)]
    return None if any(gaps) else ", ".join(box[2] for box in boxes)


def extract_boxes(text: str, *, is_gold: bool) -> str | None:
    """Content of the last box in an answer or a gold; a gold's joined boxes become a list.

    A gold's box that was never closed is read to its end; an answer's is no answer.
    """
    if is_gold and (several := _gold_boxes(text)) is not None:
        return several
    found = _from_box(text)
    if found is not None and found.answer is not None:
        return ", ".join(found.joined) if is_gold and found.joined else found.answer
    opener = _BOX.search(text) if is_gold else None
    return text[opener.end() :] if opener is not None else None


def phrase_of(text: str) -> str | None:
    """What the last 'the answer is ...' of a text says."""
    found = _from_phrase(text)
    return None if found is None else found.answer


def find_boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of the last balanced boxes, in text order.

    Only the stretch that can hold boxes joined to the last one is looked at, unless the last one
    was never closed.
    """
    start, last = len(text), -1
    for _ in range(MAX_JOINED_BOXES):
        position = max(text.rfind("oxed", 0, start), text.rfind("\\fbox", 0, start))
        if position < 0 or (last >= 0 and start - position > MAX_BOX_CHARS):
            break
        start, last = position, max(last, position)
    boxes = _balanced_boxes(text, max(start - BOX_PREFIX_CHARS, 0))
    if not boxes or boxes[-1][1] < last:
        boxes = _balanced_boxes(text, 0)
    return boxes[-MAX_JOINED_BOXES:]


def _balanced_boxes(text: str, start: int) -> list[tuple[int, int, str]]:
    """Balanced boxes from `start` on, by one pass over the braces."""
    openers: dict[int, int] = {}
    found: list[tuple[int, int, str]] = []
    for position in _box_positions(text, start)[-MAX_OPENERS:]:
        prefix = next(item for item in _BOX_PREFIXES if text.endswith(item, 0, position))
        match = _BOX.match(text, position - len(prefix))
        if match is None:
            continue
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
                opener = stack.pop()
                if opener in openers:
                    found.append((openers[opener], match.end(), text[opener + 1 : match.start()]))
    return sorted(set(found))


def _box_positions(text: str, start: int) -> list[int]:
    """Where "oxed" or "\\fbox" stands, in text order."""
    positions = []
    for name in ("oxed", "\\fbox"):
        position = text.find(name, start)
        while position >= 0:
            positions.append(position)
            position = text.find(name, position + 4)
    return sorted(positions)


def _from_hashes(text: str) -> Extraction | None:
    position = text.rfind("####")
    if position < 0:
        return None
    line = text[position + 4 :].lstrip("#").lstrip(" :").split("\n", 1)[0].strip()
    return Extraction(line, "hashes") if line else None


def _from_tag(text: str) -> Extraction | None:
    end = text.lower().rfind("</answer>")
    if end < 0:
        return None
    start = text.lower().rfind("<answer>", 0, end)
    if start < 0:
        return None
    content = text[start + len("<answer>") : end].strip()
    return Extraction(content, "tag") if content else None


def _from_answer_line(text: str) -> Extraction | None:
    """A last line of the form 'A: 18'."""
    position = text.rfind("\nA:") if not text.startswith("A:") or "\nA:" in text else -1
    start = position + 3 if position >= 0 else 2
    if position < 0 and not text.startswith("A:"):
        return None
    line = text[start:].strip().split("\n", 1)[0].strip()
    return Extraction(line, "phrase") if line else None


def _from_final_phrase(text: str) -> Extraction | None:
    """'The final answer is 7' behind the last box overrules the box: it was said later."""
    if "final answer is" not in text and "Final answer is" not in text:
        return None
    position = max(text.rfind("final answer is"), text.rfind("Final answer is"))
    if text.find("oxed", position) >= 0 or text.rfind("oxed", 0, position) < 0:
        return None
    match = _PHRASE.match(text, position + len("final "))
    if match is None or not re.match(r"[\s\"']*\\?[\"']?[\d$\\-]", match["rest"]):
        return None
    content = first_sentence(match["rest"])
    return Extraction(content, "phrase") if content else None


def _from_phrase(text: str) -> Extraction | None:
    lowered = text.lower()
    position = len(text)
    for _ in range(8):  # 'I hope my answer is correct' after the answer is passed over
        position = max(lowered.rfind(word, 0, position) for word in _PHRASE_WORDS)
        if position < 0:
            return None
        match = _PHRASE.match(text, position)
        if match is not None and not _NOT_AN_ANSWER.match(match["rest"]):
            content = first_sentence(match["rest"])
            if content:
                return Extraction(content, "phrase")
    return None


def first_sentence(text: str) -> str:
    """Up to the end of the first sentence or line; a formula that opens it is kept whole."""
    text = text.strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening):
            end = text.find(closing, len(opening))
            if end > 0:
                tail = _SENTENCE_END.split(text[end + len(closing) :], maxsplit=1)[0]
                return (text[: end + len(closing)] + tail).strip(" *_\"'")
    return _SENTENCE_END.split(text, maxsplit=1)[0].strip(" *_\"'").rstrip(".")


def _from_whole(text: str) -> Extraction | None:
    """A completion that is nothing but a formula, or a few words."""
    text = text.strip()
    if not text or len(text) > MAX_WHOLE_CHARS or "\n" in text:
        return None
    if not any(character.isalnum() for character in text):
        return None
    words = _WORD.findall(_COMMAND.sub(" ", text))
    num_prose_words = sum(word.lower() not in _FORMULA_WORDS for word in words)
    if num_prose_words > 3 or (num_prose_words and _MATH_DELIMITER.search(text)):
        return None
    return Extraction(text, "math")


def _from_bold(text: str) -> Extraction | None:
    if "**" not in text:
        return None
    contents = [match for match in _BOLD.findall(text) if re.search(r"[\d$\\]", match)]
    return Extraction(contents[-1].strip(), "bold") if contents else None


def last_formula(text: str) -> tuple[int, str] | None:
    """(end, content) of the last `$..$`, `\\(..\\)` or `\\[..\\]` that reads as a formula."""
    best: tuple[int, str] | None = None
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        end = text.rfind(closing)
        if end < 0:
            continue
        double = opening == "$" and end > 0 and text[end - 1] == "$"
        stop = end - 1 if double else end
        start = text.rfind("$$" if double else opening, 0, stop)
        if start < 0:
            continue
        content = text[start + (2 if double else len(opening)) : stop]
        if len(content) > MAX_BOX_CHARS:
            continue
        # Two currency signs with prose between them are no formula.
        if not content.strip() or (
            opening == "$"
            and re.search(r"[A-Za-z]{3,} +[A-Za-z]{2,}", re.sub(r"\\[a-z]+\{[^}]*\}", "", content))
        ):
            continue
        if best is None or end > best[0]:
            best = (end, content)
    return best


def last_number(text: str) -> tuple[int, str] | None:
    """(end, content) of the last number, with its sign, percent sign or denominator."""
    end = max(text.rfind(digit) for digit in "0123456789") + 1
    if end == 0:
        return None
    start = max(end - MAX_NUMBER_CHARS, 0)
    matches = list(_NUMBER.finditer(text, start, min(end + 3, len(text))))
    return (matches[-1].end(), matches[-1].group()) if matches else None


def _from_last_maths(text: str) -> Extraction | None:
    formula = last_formula(text)
    number = last_number(text)
    if formula is not None and (number is None or formula[0] >= number[0]):
        return Extraction(formula[1].strip(), "math")
    if number is not None:
        return Extraction(number[1].strip(), "math")
    return None
