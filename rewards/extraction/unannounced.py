"""The answer of a completion that announces none: its conclusion, else its last maths.

Closing remarks and checks are skipped. A number is extracted with the words that change its value
('at least 5', '5 million', '5 or 6'), without which it would be a different answer.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rewards.extraction.aftermath import MAX_SENTENCE, TAIL, without_remarks
from rewards.extraction.boxes import MAX_BOX_CHARS
from rewards.extraction.languages import with_ascii_digits
from rewards.extraction.wording import (
    SO,
    asked_value,
    is_aside,
    is_value,
    num_prose_words,
    stated,
)

MAX_WHOLE_CHARS = 200
MAX_NUMBER_CHARS = 400

_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.])[-−+]?\s?[$€£]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:\s?/\s?\d[\d,]*)?(?:\s?\\?%)?|(?<![A-Za-z0-9_.])-?\.\d+"
)
_DIGITS = frozenset("0123456789")
_NUMBER_CHARS = frozenset("0123456789.,/$€£%\\-−+ \t\n")
_LEAD_IN = re.compile(
    rf"^(?:(?:∴|⇒|=>|→|⟹)\s*|(?:(?:{SO}),?|it's|it is|it equals|that's|that makes"
    r"|(?:we|i) get|this gives)\s+(?!that\b|is\b|are\b))+",
    re.IGNORECASE,
)
_REPEATED_QUESTION = re.compile(r"^(?:what|how)\b[^?\n]{1,150}\?\s+(?=\S)", re.IGNORECASE)
_FOREIGN_LETTER = r"[^\W\d_\x00-\x7fͰ-Ͽ∀-⋿]"
_FOREIGN_WORD = re.compile(
    rf"{_FOREIGN_LETTER}(?:{_FOREIGN_LETTER}|[A-Za-z])|[A-Za-z]{_FOREIGN_LETTER}|[\u0400-\u2fff\u3040-\uffff]\d"
)
_FOREIGN_NOT = (
    *"不是 不等于 不 ではなく 아니라".split(),
    *(" не", " no es", " nicht", " pas", " non"),
)
_COMMAND = re.compile(r"\\[a-z]+\{[^}]*\}")
_PROSE = re.compile(r"[A-Za-z]{3,} +[A-Za-z]{2,}")  # between two dollar signs: not a formula
_BOLD = re.compile(r"\*\*([^*\n]{1,400})\*\*")
_BOLD_LABEL = re.compile(r"^[A-Za-z][A-Za-z ]{0,40}[:=]\s*(?=[-$\d\\(])")
_HEADER = re.compile(r"(?:step|part|case|problem|solution|example|method)\b", re.IGNORECASE)
_JUDGED = re.compile(
    r"\b(?:statement|claim|assertion|proposition|conjecture|it|this|that|hypothesis)\s+is\s+"
    r"(?:(?:therefore|thus|indeed|always|also|clearly|hence)\s+)*\**(?P<not>not\s+(?:necessarily "
    r"|always )?)?\**(?P<word>true|false|correct|incorrect|valid|invalid)\b",
    re.IGNORECASE,
)
_REASON = re.compile(r"\**[,;:]?\s+(?:since|because|as)\b")
_YES_NO = re.compile(
    rf"[\s*_(]*(?:\W*(?:{SO})\W+)?(?P<word>yes|no|true|false)\b(?=\**\s*[,.;:!—–-]|\**\s*$)",
    re.IGNORECASE,
)
_LEADING_WORDS = re.compile(
    r"\b(?:negative|minus|at least|at most|over|under|above|below|half(?: of)?|twice|double|triple"
    r"|(?:no )?(?:more|less|fewer|greater|larger|smaller) than|a (?:third|quarter) of|not|never"
    r"|except|but|anything but|(?:square|cube|multiples?|factors?|power|root)s? of|plus or minus"
    r"|± ?|(?<!add )(?<!adds )(?<!comes )up to|(?:not|never|cannot|can't|n't)\s+(?:be|equal))\s+$",
    re.IGNORECASE,
)
_LEADING_ENDS = frozenset(
    "negative minus least most than over under above below half of twice double triple not never"
    " except but to ± be equal".split()
)
_TRAILING_WORDS = re.compile(
    r"\s+(?:(?:squared|cubed|hundred|thousand|million|billion|trillion|dozen|percent|choose|or more"
    r"|or less|or so|or fewer|and a (?:half|third|quarter)|factorial|in base|mod)\b"
    r"|times\s+(?=[\d$\\]))"
)
_REFUSING_WORDS = re.compile(
    r"\**(?:\s+[a-z]+)?\s+(?:(?:is|are|was)\s+(?:wrong|incorrect|false|too|impossible|invalid"
    r"|extraneous|rejected|not\s+(?:valid|right|correct|possible|allowed|an?|the))"
    r"|(?:isn't|does not|doesn't|do not|don't|did not|didn't|cannot|can't)\s+(?:work|satisfy|fit"
    r"|hold|count|be|right|correct)|fails)\b",
)
# "given in step 5": the number refers to a place in the text.
_PLACES = (
    "step part equation eq section line case page chapter figure table problem question exercise"
    " lemma theorem example".split()
)
_PLACE = re.compile(
    r"\b(?:given|shown|derived|found|obtained|computed|calculated|stated|explained|seen?|from|by|using"
    rf"|follows|per)\b[^.\n]{{0,20}}\b(?:{'|'.join(_PLACES)})s?\.?\s+\(?$",
    re.IGNORECASE,
)
_CONDITIONS = ("if", "If", "uppos", "ssum", "nless")
_SUPPOSED = re.compile(
    r"(?:^|[.!?,\n]\s*)(?:if|suppos(?:e|ing)|assum(?:e|ing)|unless)\b(?!.*\bthen\b)[^.,;:\n]*$",
    re.IGNORECASE,
)
# A number after an operator is part of a sum: 7 + 2 states neither 2 nor + 2.
_OPERATORS = ("+", "-", "−", "*", "/", "×", "·", "x", "\\times", "\\cdot")
_OPERATOR_BEFORE = re.compile(r"[\d)\]}]\s*(?:[-+*/×·−]|x|\\times|\\cdot)\s*$")
_SUM_BEFORE = re.compile(r"(?:[\d.,()+*/×·−x\s-]|\\times|\\cdot)*$")
_UNFINISHED = re.compile(r"\s*(?:=|\\approx|[-+*/×·−])\s*$")
# A last line such as 1 = -1.
_EQUATED = re.compile(r"(?:^|\n)\s*(?P<left>[-−]?\d{1,30})\s*=\s*(?P<right>[-−]?\d{1,30})[\s.]*$")
_ALTERNATIVE = re.compile(
    r"(?:between\s+)?(?:\$-?\d[\d.,]*\$|[-−]?[$€£]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?)(?:\s[a-z]+)?"
    r"(?:\s*,?\s*(?:(?:or|and/or|или|oder|ou|o)\s+|或者?|または|또는)"
    r"(?:(?:maybe|perhaps|possibly|even|else|it's|it is"
    r"|it (?:could|might|may) (?:also )?be)\s)*|\s?[–-]\s?)$"
)
_OR = re.compile(r"or|或|или|oder| ou | o |または|또는|[-–]\s*$")
_BETWEEN = re.compile(r"\bbetween\s+[$\d.,/-]+\s+and\s+$", re.IGNORECASE)
_CURRENCY = re.compile("[$€£]")
_EARNED = re.compile(
    r"\b(?:earn|pay|paid|cost|spen[dt]|save|make|made|owe|receive|charge|get|got|raise|sold|sell"
    r"|lose|lost|ha[sd]|donate|collect)\w*\s+(?P<money>\\?[$€£]\s?\d[\d,]*(?:\.\d+)?)\s+"
    r"(?:in|for|over|after|during|within|per|each|every|on|from|by)\s+[^.\d]{0,30}\d+(?:\.\d+)?\s+"
    r"[^.\d]*[.!]?\s*$",
    re.IGNORECASE,
)
_SOLUTIONS = re.compile(
    r"\b(?:solutions|roots|zeros|zeroes)(?: of [^.]{1,60}?| for [^.]{1,60}?)?\s+are:?\s+"
    r"(?P<values>(?!.*\b(?:so|sum|product|thus|hence|which|of these)\b).+)$",
    re.IGNORECASE | re.DOTALL,
)
_EXPLAINING = re.compile(
    r",\swhich (?:is|was|are) \S{1,20} (?:more|less|fewer|greater|higher|lower|times|percent)\b"
    r"|,?\s(?:since|because|(?:from|by|after|when|while) \w+ing|including|excluding)\b"
)
_ASIDE = re.compile(r"\s\((?P<remark>[^()]{1,200})\)[\s.!]*$")
_CONCLUDING = re.compile(
    r"=|\b(?:so|thus|leaving|leaves|is|are|was|has|have|had|gives|makes|total|remain\w*|get|gets"
    r"|which)\b"
)
_ALIGNED = re.compile(
    r"\\begin\{(align\*?|aligned|gather\*?|split|eqnarray\*?)\}(.*?)\\end\{\1\}", re.DOTALL
)
_LABELLED = re.compile(r"\s*([A-Za-z](?:_\{?\w\}?)?)\s*&?\s*=\s*&?\s*([^=]+)$")


def unannounced(text: str) -> tuple[str, bool] | None:
    """(answer, is it bold) of a text without an announcement; None if there is no answer."""
    text, start = without_remarks(with_ascii_digits(text))
    judged = _judgement(text[start : start + MAX_SENTENCE])
    if judged is not None:
        return judged, False
    text = _without_aside(text, start)
    if "*" in text and (bold := _last_bold(text)) is not None:
        return bold, True
    if "\\" in text and (rows := _last_rows(text)) is not None:
        return rows, False
    answer = _whole(text) or _solutions(text[start:]) or _last_value(_without_clause(text, start))
    if answer is None and "*" in text:
        contents = _BOLD.findall(text)
        return (contents[-1].strip(), True) if contents else None
    return None if answer is None else (answer, False)


def _judgement(sentence: str) -> str | None:
    """'False' for 'the statement is not true'; 'No, it diverges' as it is; None otherwise."""
    judged = _JUDGED.search(sentence) if " is " in sentence else None
    if judged is not None and not _NUMBER.search(_without_reason(sentence, judged)):
        is_true = judged["word"].lower() in ("true", "correct", "valid")
        return "True" if is_true != bool(judged["not"]) else "False"
    opening = _YES_NO.match(sentence)
    if opening is None:
        return None
    sentence = sentence[opening.start("word") :].strip()
    return sentence if _NUMBER.search(sentence) else stated(sentence) or None


def _without_reason(sentence: str, judged: re.Match[str]) -> str:
    """The sentence without the reason that follows its judgement."""
    is_plain = judged["word"].lower() in ("true", "false")
    has_reason = is_plain and _REASON.match(sentence, judged.end())
    return sentence[: judged.end()] if has_reason else sentence


def _solutions(sentence: str) -> str | None:
    """The values in a last sentence such as 'the solutions are x = 1 and x = 2'."""
    if " are" not in sentence or len(sentence) > MAX_SENTENCE:
        return None
    match = _SOLUTIONS.search(sentence)
    answer = stated(match["values"]) if match is not None else ""
    return answer if is_value(answer) else None


def _without_aside(text: str, start: int) -> str:
    """Drop a parenthesis at the end of the last sentence that explains the value before it."""
    if ")" not in text[-9:]:
        return text
    aside = _ASIDE.search(text, max(start, len(text) - MAX_SENTENCE))
    if aside is None or not is_aside(aside["remark"]) or _CONCLUDING.search(aside["remark"]):
        return text
    has_value = any(c.isdigit() for c in text[start : aside.start()])
    return text[: aside.start()] if has_value else text


def _without_clause(text: str, start: int) -> str:
    """Drop a clause at the end of the last sentence that explains the value before it."""
    for clause in _EXPLAINING.finditer(text, start):
        is_last_word = _CONCLUDING.search(text, clause.end()) is None
        if is_last_word and any(c.isdigit() for c in text[start : clause.start()]):
            return text[: clause.start()]
    return text


def _last_bold(text: str) -> str | None:
    """The last value in bold type, without its label."""
    for content in reversed(_BOLD.findall(text)[-40:]):
        if _HEADER.match(content):
            continue
        value = stated(_BOLD_LABEL.sub("", content))
        if is_value(value):
            return value
    return None


def _last_rows(text: str) -> str | None:
    """The result of an aligned computation at the end of the text: its last row or values."""
    if text.rfind("\\begin{") < 0:
        return None
    blocks = list(_ALIGNED.finditer(text[-TAIL:]))
    if not blocks or num_prose_words(text[-TAIL:][blocks[-1].end() :]):
        return None
    rows = [row.strip() for row in blocks[-1][2].split("\\\\") if row.strip(" \n&")]
    if not rows:
        return None
    last = rows[-1].replace("&", " ").strip(" .,")
    is_continued = last.startswith(("=", "\\approx", "\\implies", "\\Rightarrow"))
    values: dict[str, str] = {}
    for row in () if is_continued else reversed(rows):
        match = _LABELLED.match(row.replace("&", ""))
        if match is None or match[1] in values:
            break
        values[match[1]] = f"{match[1]} = {match[2].strip(' .,')}"
    if values:
        return ", ".join(reversed(values.values()))
    sides = [side.strip() for side in last.split("=")]
    is_turned = len(sides) > 1 and len(sides[-1]) == 1 and sides[-1].isalpha()  # 18 = x
    return sides[-2] if is_turned else sides[-1]


def _whole(text: str) -> str | None:
    """A completion that is only a formula or a few words."""
    text = text.strip()
    if not text or len(text) > MAX_WHOLE_CHARS or "\n" in text:
        return None
    if _FOREIGN_WORD.search(text):
        return None
    text = _REPEATED_QUESTION.sub("", text)
    text = _LEAD_IN.sub("", text) or text
    value = asked_value(text.rstrip("."))
    if value != text.rstrip("."):
        return value
    if text[0:1] in "*_" and text[-1:] == text[0:1]:
        text = text.strip("*_")
    if not any(character.isalnum() for character in text):
        return None
    num_words = num_prose_words(text)
    if num_words > 3 or (num_words and re.search(r"\$|\\[(\[]", text)):
        return None
    return text


class Found(NamedTuple):
    """A formula with its delimiters, or a number: text[start:end]."""

    start: int
    end: int
    content: str
    is_formula: bool


def last_maths(text: str) -> Found | None:
    """The last formula or number."""
    formula, number = _last_formula(text), last_number(text)
    if formula is not None and (number is None or formula.end >= number.end):
        return formula
    return number


def _last_formula(text: str) -> Found | None:
    """The last `$..$`, `\\(..\\)` or `\\[..\\]` that reads as a formula."""
    best: Found | None = None
    if "$" not in text and "\\" not in text:
        return None
    for opening, closing in (("\\(", "\\)"), ("\\[", "\\]"), ("$", "$")):
        end = text.rfind(closing)
        if opening == "$" and end > 0 and text[end - 1] == "$":
            opening, closing, end = "$$", "$$", end - 1
        start = text.rfind(opening, 0, max(end, 0))
        content = text[start + len(opening) : end]
        if start < 0 or not content.strip() or len(content) > MAX_BOX_CHARS:
            continue
        if opening[0] == "$" and _PROSE.search(_COMMAND.sub("", content)):
            continue
        if best is None or end > best.end:
            best = Found(start, end + len(closing), content, True)
    return best


def last_number(text: str) -> Found | None:
    """The last number, with its sign, percent sign or denominator."""
    is_last = text[-1:] in _DIGITS
    end = len(text) if is_last else max(text.rfind(digit) for digit in "0123456789") + 1
    if end == 0:
        return None
    start, low = end - 1, max(end - MAX_NUMBER_CHARS, 0)
    while start > low and text[start - 1] in _NUMBER_CHARS:
        start -= 1
    matches = list(_NUMBER.finditer(text, start, min(end + 3, len(text))))
    return Found(*matches[-1].span(), matches[-1].group(), False) if matches else None


def _last_value(text: str) -> str | None:
    """The last formula or number that is not rejected, with the words that change its value."""
    for _ in range(4):
        found = last_maths(text)
        if found is None:
            return None
        start, end, content, is_formula = found
        if not is_formula:
            if _UNFINISHED.match(text, end) or _is_false_equation(text):
                return None  # 7 = ..., and the text ends
            content = _with_sum(text, end, content)
            start = end - len(content)
        is_refused = _REFUSING_WORDS.match(text, end) is not None
        if not (is_refused or _is_supposed(text, start) or _is_place(text, start)):
            return _widened(text, start, end, content.strip())
        text = text[:start]
    return None


def _is_false_equation(text: str) -> bool:
    """Does the text end with an equation between two different integers?"""
    low = max(len(text) - MAX_WHOLE_CHARS, 0)
    match = _EQUATED.search(text, low) if text.rfind("=", low) >= 0 else None
    if match is None:
        return False
    left, right = (int(match[name].replace("−", "-")) for name in ("left", "right"))
    return left != right


def _with_sum(text: str, end: int, number: str) -> str:
    """The number that ends at `end`, with the sum or product that it is the last operand of."""
    digits = number.lstrip("-−+ ")
    before = text[max(end - len(digits) - MAX_NUMBER_CHARS, 0) : end - len(digits)]
    is_operand = before.rstrip().endswith(_OPERATORS)
    if not is_operand or _OPERATOR_BEFORE.search(before) is None:
        return number
    found = _SUM_BEFORE.search(before)
    return (before[found.start() :] if found is not None else "").lstrip() + digits


def _is_supposed(text: str, end: int) -> bool:
    """Is the value at `end` part of a condition such as 'if the answer is 5'?"""
    before = text[max(end - 120, 0) : end]
    return any(hint in before for hint in _CONDITIONS) and _SUPPOSED.search(before) is not None


def _is_place(text: str, end: int) -> bool:
    words = text[max(end - 14, 0) : end].rstrip(" (").split()
    if not words or words[-1].strip(".").lower().removesuffix("s") not in _PLACES:
        return False
    return _PLACE.search(text, max(end - 60, 0), end) is not None


def _widened(text: str, start: int, end: int, content: str) -> str:
    """The value between start and end, with the adjacent words that change it."""
    before = text[max(start - 120, 0) : start]
    if _CURRENCY.search(before):
        money = _EARNED.search(text[max(start - 120, 0) : end + 120])
        if money is not None:
            return money["money"]
    if f" {before}".rstrip().endswith(_FOREIGN_NOT):
        return f"not {content}"
    first = _words_before(before)
    after = _TRAILING_WORDS.match(text, end)
    if first is None and after is None:
        return content
    opening = start if first is None else start - (len(before) - first.start())
    return text[opening : end if after is None else after.end()].strip()


def _words_before(before: str) -> re.Match[str] | None:
    """The words at the end of `before` that change the value after them."""
    words = before.rsplit(None, 1)
    found = None
    if words and words[-1].lower() in _LEADING_ENDS:
        found = _LEADING_WORDS.search(before, max(len(before) - 25, 0))
    if found is None and _OR.search(before[-30:]):
        found = _ALTERNATIVE.search(before)
    if found is None and "and" in before[-6:]:
        found = _BETWEEN.search(before)
    return found
