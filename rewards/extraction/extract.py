"""Find the final answer of a completion, from the end, in time linear in its length.

The last explicit statement after the thinking counts: a balanced box, '#### 5',
'<answer>5</answer>', 'the answer is 5' (in many languages), an option's letter on its own line. A
statement after a box overrules it only if it is a bare value; remarks and checks overrule nothing.
Completions without a statement go to `unannounced`. Boxes are never merged here: those joined to
the last one are only reported.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace

from rewards.extraction import announcements
from rewards.extraction.aftermath import hedged_values, revision
from rewards.extraction.boxes import BoxGroup, box_group, find_boxes, last_opening, opener
from rewards.extraction.languages import with_ascii_digits
from rewards.extraction.thinking import ExtraTags, after_thinking
from rewards.extraction.unannounced import unannounced
from rewards.extraction.wording import asked_value, num_prose_words, opens_a_value

MAX_SHORT_WORDS = 3  # of an answer in words, such as 'no real solution'
# Alternatives or a condition: such a sentence must not be reduced to one value.
_SEVERAL = re.compile(
    r"\b(?:or|either|if|unless|otherwise|not|never|maybe|perhaps)\b", re.IGNORECASE
)
# After a box: something that could be a value and overrule it.
_MAY_STATE = re.compile(
    r"\d|\$[^\s.,)]|\\[a-zA-Z]|[A-J]|[Yy]es|[Nn]o|[Tt]rue|[Ff]alse|[^\x00-\x7f]"
)
_ALPHANUMERIC = re.compile(r"[^\W_]")


@dataclass(frozen=True, slots=True)
class Extraction:
    """What was found. `joined`: two or more answers that are offered together, in text order.
    `listed`: the boxes of one sentence, which may answer a gold with as many values.

    Example for "so \\boxed{1} and \\boxed{2}."::

        Extraction(answer="2", method="boxed", has_format=True, joined=("1", "2"))
    """

    answer: str | None
    method: announcements.Method
    has_format: bool = False
    joined: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()


NOTHING = Extraction(answer=None, method="none")


def extract(completion: str, extra_tags: ExtraTags = ()) -> Extraction:
    """The final answer of a completion; `answer` is None if there is none.

    `extra_tags`: (opening, closing) thinking tags in addition to `thinking.TAGS`.
    """
    text = after_thinking(completion, extra_tags)
    if text is None:
        return NOTHING
    last = last_opening(text)
    group = box_group(text, last)
    statement = _last_statement(text, group)
    has_format = group is not None and group.is_formatted and not _is_overruled(text)
    if statement is not None:
        found = Extraction(with_ascii_digits(statement.answer), statement.method, has_format)
        return _revised(found, text, statement.end)
    if group is not None:
        return _revised(_boxed(group, has_format), text, group.end)
    is_truncated = last >= 0 and opener(text) is not None  # a truncated box states nothing
    plain = None if is_truncated else unannounced(text)
    if plain is None:
        return NOTHING
    return Extraction(with_ascii_digits(plain[0]), "bold" if plain[1] else "math")


def _boxed(group: BoxGroup, has_format: bool) -> Extraction:
    """The answer in the last box, with those joined to it."""
    if not group.boxes:
        return Extraction(None, "boxed", has_format)
    answer = with_ascii_digits(asked_value(group.boxes[-1]))
    if len(group.boxes) == 1:
        return Extraction(answer, "boxed", has_format)
    joined, listed = (group.boxes, ()) if group.is_either else ((), group.boxes)
    return Extraction(answer, "boxed", has_format, joined, listed)


def _last_statement(text: str, group: BoxGroup | None) -> announcements.Statement | None:
    """The last statement after the last box that states an answer."""
    floor = group.end if group is not None and group.boxes else 0
    offset = max(floor - announcements.MAX_BEFORE, 0)
    tail, floor = text[offset:], floor - offset
    if not (_MAY_STATE if floor else _ALPHANUMERIC).search(tail, floor):
        return None
    lowered = announcements.lower(tail)
    values: list[announcements.Statement] = []
    sentences: list[announcements.Statement] = []
    supposed: list[announcements.Statement] = []
    for finder in (
        announcements.answers(tail, lowered, floor),
        announcements.choices(tail, lowered, floor),
        announcements.foreign_phrases(tail, lowered, floor),
        announcements.hashes(tail, floor),
        announcements.tags(tail, lowered, floor),
        announcements.answer_line(tail, floor),
        announcements.lone_letter(tail, floor),
    ):
        for item in finder:
            kind = supposed if item.is_supposed else values if item.is_value else sentences
            kind.append(item)
            if kind is values:
                break
    if not values and not sentences and floor + offset == 0:
        values = supposed
    chosen = max(values, key=lambda item: item.start, default=None)
    if sentences and floor + offset == 0:
        last = max(sentences, key=lambda item: item.start)
        chosen = _value_or_sentence(tail, chosen, last)
    if chosen is None:
        return None
    return replace(chosen, start=chosen.start + offset, end=chosen.end + offset)


def _value_or_sentence(
    text: str, value: announcements.Statement | None, sentence: announcements.Statement
) -> announcements.Statement:
    """Without a box: does the last announced value count, or the last sentence?"""
    num_words = num_prose_words(sentence.answer)
    if value is not None:
        is_later = sentence.start > value.start and value.method == "phrase"
        is_short = num_words <= MAX_SHORT_WORDS and not _SEVERAL.search(sentence.answer)
        return sentence if is_later and is_short else value
    is_prose = num_words > MAX_SHORT_WORDS or not sentence.answer.isascii()
    if is_prose and not opens_a_value(sentence.answer):
        plain = None if _SEVERAL.search(sentence.answer) else unannounced(text[sentence.start :])
        if plain is not None:
            return replace(sentence, answer=plain[0])
    return sentence


def _revised(found: Extraction, text: str, end: int) -> Extraction:
    """The answer after what the following text does to it: retract, correct, or add another."""
    if found.answer is None:
        return found
    revised, other = revision(text, end, found.answer)
    if revised != found.answer:
        return Extraction(revised, "phrase", found.has_format)
    if other is not None:
        return replace(found, joined=(*(found.joined or (found.answer,)), other))
    values = hedged_values(found.answer) if found.method == "phrase" else ()
    return replace(found, joined=values) if values else found


def _is_overruled(text: str) -> bool:
    """Do 'the final answer is' and a value follow the last box? Then its format does not count."""
    position = max(text.rfind("final answer is"), text.rfind("Final answer is"))
    if position < 0 or text.find("oxed", position) >= 0:
        return False
    return _FINAL_VALUE.match(text, position + len("final answer is")) is not None


_FINAL_VALUE = re.compile(r"[\s*_:\"']*\\?[\"']?[\d$\\-]")


def extract_boxes(text: str, *, is_gold: bool) -> str | None:
    """Content of the last box in an answer or a gold; joined boxes of a gold become a list.

    An unclosed box in a gold extends to the end of the text; in an answer it does not count.
    """
    last = last_opening(text)
    boxes = find_boxes(text, last)
    gaps = [text[a[1] : b[0]].strip(" $") for a, b in itertools.pairwise(boxes)]
    if is_gold and gaps and not any(gaps):
        return ", ".join(box[2] for box in boxes)
    group = box_group(text, last)
    if group is not None and group.boxes:
        return ", ".join(group.boxes) if is_gold else group.boxes[-1]
    unclosed = opener(text) if is_gold else None
    return text[unclosed.end() :] if unclosed is not None else None


def phrase_of(text: str) -> str | None:
    """The answer in the last 'the answer is ...' of a text."""
    lowered = announcements.lower(text)
    finders = (announcements.answers, announcements.choices, announcements.foreign_phrases)
    found = [next(finder(text, lowered, 0), None) for finder in finders]
    last = max((item for item in found if item), key=lambda item: item.start, default=None)
    return None if last is None else last.answer
