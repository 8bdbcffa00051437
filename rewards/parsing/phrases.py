"""Words around a value, and how they change it.

A closed list of words is ignored; some are interpreted (negative, half of, squared, at least); with
any other words, a value is not an answer.
"""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.parsing.nodes import UNNAMED, Node, ParseError, function, negative, number_node
from rewards.parsing.vocabulary import FILLER_WORDS, NUMBER_WORDS, SCALE_WORDS

_PARTS = {
    "half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6,
    "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
}  # fmt: skip
_PARTS |= {"hundredth": 100, "thousandth": 1000}
_PARTS |= {name + "s": size for name, size in _PARTS.items() if not name.startswith("hal")}
_COMPARISONS = {
    ">=": "at least|no less than|not less than|no fewer than|not fewer than|no smaller than"
    "|greater than or equal to|more than or equal to|equal to or greater than|a minimum of",
    "<=": "at most|no more than|not more than|no greater than|not greater than|up to|no larger than"
    "|less than or equal to|fewer than or equal to|equal to or less than|a maximum of",
    "<": "less than|fewer than|smaller than|lower than|under|below|strictly less than",
    ">": "more than|greater than|larger than|bigger than|higher than|over|above|exceeding"
    "|strictly greater than",
    "!=": "not equal to|not|different from|other than",
}
_OPERATIONS = {
    "negative": "negative|minus|opposite of|negative of|additive inverse of",
    "same": "positive|plus|value of",
    "square": "square of",
    "cube": "cube of",
    "root": "square root of",
    "cube root": "cube root of",
    "inverse": "reciprocal of|multiplicative inverse of|inverse of|one over",
    "abs": "absolute value of",
    "factorial": "factorial of",
    "double": "twice|double|two times",
    "triple": "triple|thrice|three times",
}
_LEADING = {
    tuple(phrase.split()): name
    for table in (_COMPARISONS, _OPERATIONS)
    for name, phrases in table.items()
    for phrase in phrases.split("|")
}
TRAILING = {"squared": "square", "cubed": "cube", "factorial": "factorial", "doubled": "double"}
OR_MORE = dict.fromkeys(("more", "greater", "higher", "above", "larger"), ">=")
OR_MORE |= dict.fromkeys(("less", "fewer", "lower", "below", "smaller"), "<=")
ORDINALS = ("th", "st", "nd", "rd")
NUMBERED = frozenset("day month floor grade century place row year week position person".split())
ARTICLED = frozenset({*_PARTS, *SCALE_WORDS, "total", "minimum", "maximum"})  # after "a"
VERBS = frozenset({"is", "are", "equals", "was", "were", "be", "equal", "must"})
DENIALS = frozenset(
    "not no never neither nor none without except excluding but isn doesn don won cannot"
    " wrong incorrect false untrue invalid impossible maybe perhaps possibly probably"
    " either or unless whether if anything nothing everything instead rather than unlikely"
    " unknown guess contradiction doubt unsure uncertain hardly nearly almost wait".split()
)
# Next to a value, these change it or make a statement about it.
_LOADED = (
    DENIALS
    | frozenset(_PARTS)
    | frozenset(
        "squared cubed plus minus choose divided multiplied doubled tripled halved"
        " factorial mod modulo base power powers root multiple multiples divisor divisors"
        " factor factors reciprocal inverse opposite more less fewer greater least most"
        " over under above below between exceeding up higher lower larger smaller off pair"
        " pairs couple score gross through until does do did works work fails fail times"
        " digit digits twice double triple thrice to too many much few little"
        " maximum minimum max".split()
    )
    | VERBS
)
_STATING = VERBS | frozenset(
    "has have had gets get got earned earns earn costs cost needs need takes took makes"
    " made make paid pays spent weighs receives received gives gave totals sold remain"
    " remains contains to find finds found obtain obtains conclude yields est es ist lautet"
    " sind son vale".split()
)
_LEADING_TO = frozenset(
    "equal equals amounts comes sums rounds simplifies reduces evaluates".split()
)
MAX_SCALE = 10**12
_ASIDE = re.compile(r"(?<=\d)\s+which\b")
_AFTERWORDS = re.compile(
    r"is (?:the|our|my) (?:final |correct |right )?(?:answer|solution|result|value)"
)


def leading_operations(words: list[str]) -> list[str] | None:
    """The operations of the words before a value, outermost first; None if a word is unknown."""
    found: list[str] = []
    position = 0
    while position < len(words):
        for size in (6, 5, 4, 3, 2, 1):
            name = _LEADING.get(tuple(words[position : position + size]))
            if name is not None and position + size <= len(words):
                found.append(name)
                position += size
                break
        else:
            part = _part_of(words, position)
            if part is not None:
                found.append(part[0])
                position = part[1]
            elif words[position] in FILLER_WORDS:
                position += 1
            else:
                return None
    return found


def _part_of(words: list[str], position: int) -> tuple[str, int] | None:
    """(operation, next position) for "half of", "a third of", "two thirds of"."""
    for size in (1, 2):
        end = position + size
        part_words = words[position:end]
        if size == 1 and part_words[0] in _PARTS:
            part_words = ["one", *part_words]
        fraction = fraction_of(part_words)
        if fraction is not None and words[end : end + 1] == ["of"]:
            return str(fraction), end + 1
    return None


def fraction_of(words: list[str]) -> Fraction | None:
    """The value of half, a third, one half, three quarters; None for other words."""
    if words and words[0] in ("a", "an"):
        words = ["one", *words[1:]]
    if len(words) == 1 and words[0] in ("half", "quarter"):
        words = ["one", words[0]]
    if len(words) != 2 or words[1] not in _PARTS or words[0] not in NUMBER_WORDS:
        return None
    return Fraction(NUMBER_WORDS[words[0]], _PARTS[words[1]])


def apply(operations: list[str], value: Node) -> Node:
    """Apply the operations to a value, last one first. Raises ParseError."""
    for place, name in enumerate(reversed(operations)):
        if value.kind in ("list", "text", "label") or (value.kind == "rel" and name != "same"):
            raise ParseError
        if name in _COMPARISONS:
            if place + 1 < len(operations):
                raise ParseError
            return Node("rel", (UNNAMED, value), name)
        value = _applied(name, value)
    return value


def _applied(name: str, value: Node) -> Node:
    if value.kind == "unit" and name != "same":
        return value._replace(args=(_applied(name, value.args[0]),))
    if name == "same":
        return value
    if name == "negative":
        return negative(value)
    if name in ("abs", "factorial"):
        return function(name, value)
    exponents = {
        "square": Fraction(2), "cube": Fraction(3), "root": Fraction(1, 2), "inverse": Fraction(-1),
    }  # fmt: skip
    if name in exponents:
        return Node("pow", (value, number_node(exponents[name])))
    if name == "cube root":
        return function("root", value, number_node(3))
    factor = {"double": Fraction(2), "triple": Fraction(3)}.get(name)
    return Node("mul", (number_node(Fraction(name) if factor is None else factor), value))


def comparison_of(words: list[str]) -> str | None:
    """The operator of "is", "is at least" between a name and a value; None for other words."""
    while words and words[0] in VERBS:
        words = words[1:]
    found = leading_operations(words)
    if found is None or len(found) > 1:
        return None
    if not found:
        return "="
    return found[0] if found[0] in _COMPARISONS else None


def is_loaded(words: list[str]) -> bool:
    """Does any word after a value change it or comment on it?"""
    return any(word.lower() in _LOADED for word in words)


def number_of(words: list[str]) -> tuple[Fraction, list[str]] | None:
    """(value, remaining words) of "twenty one", "two hundred and five", "three quarters"."""
    for size in (2, 1):
        fraction = fraction_of(words[:size])
        if fraction is not None:
            return fraction, words[size:]
    if words and words[0] in SCALE_WORDS:
        words = ["one", *words]
    if not words or words[0] not in NUMBER_WORDS or words[0] == "none":
        return None
    total, below, position = 0, MAX_SCALE, 0
    while position < len(words):
        part, position = _below_hundred(words, position)
        if part is None:
            break
        while position < len(words) and SCALE_WORDS.get(words[position], below) < below:
            part *= SCALE_WORDS[words[position]]
            position += 1
        total += part
        smallest = SCALE_WORDS.get(words[position - 1])
        if smallest is None or smallest == SCALE_WORDS["dozen"]:
            break
        below = smallest
        is_continued = joins_number(words[position - 1], words[position : position + 2])
        position += is_continued
    return Fraction(total), words[position:]


def _below_hundred(words: list[str], position: int) -> tuple[int | None, int]:
    """(value, next position) of "five", "twenty", "twenty one"; the value is None otherwise."""
    value = NUMBER_WORDS.get(words[position])
    if value is None or words[position] in SCALE_WORDS:
        return None, position
    following = words[position + 1] if position + 1 < len(words) else ""
    if value >= 20 and 0 < NUMBER_WORDS.get(following, 0) < 10:
        return value + NUMBER_WORDS[following], position + 2
    return value, position + 1


def joins_number(before: str, words: list[str]) -> bool:
    """Is this the "and" of a number such as "two hundred and five"?"""
    is_scale = before in ("hundred", "thousand", "million", "billion")
    return is_scale and words[:1] == ["and"] and words[1:] != [] and words[1] in NUMBER_WORDS


def states_value(before: str, after: str) -> bool:
    """Does a sentence just state the value between its two parts?

    Before it: only filler words, or a subject, a verb and filler words. After it: at most words
    that name what is counted. "Half of 5" and "5 is incorrect" do not state 5.
    """
    if after.startswith(ORDINALS) and not set(_words_of(after)[1:]) <= NUMBERED:
        return False  # the 5th prime
    before = _ASIDE.split(before)[-1]  # "it is not 10 which is 20" states 20
    words_before, words_after = _words_of(before), _words_of(after)
    if DENIALS & {*words_before, *words_after}:
        return False
    if words_after and not _AFTERWORDS.match(" ".join(words_after)) and is_loaded(words_after):
        return False
    while words_before and words_before[-1] in FILLER_WORDS and words_before[-1] not in _STATING:
        words_before.pop()
    if words_before[-1:] == ["to"]:
        return len(words_before) > 1 and words_before[-2] in _LEADING_TO
    if not words_before:
        return re.search(r"\d", before) is None  # 4 to 5
    return words_before[-1] in _STATING or re.search(r"[=:≈]\W*$", before) is not None


def _words_of(text: str) -> list[str]:
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\b|\\[a-zA-Z]+", " ", text)
    return re.findall(r"[a-z]+", text.lower())
