"""Answers in words: choices, Yes/No, names, short phrases, and units."""

from __future__ import annotations

import re
from fractions import Fraction

from rewards.nodes import Node
from rewards.vocabulary import UNITS

_ARTICLES = frozenset({"the", "a", "an"})
_NOTHING = frozenset(
    {"no solution", "no solutions", "none", "empty set", "no real solution", "no real solutions"}
    | {"does not exist", "no such numbers exist", "no such number exists", "no integer solutions"}
    | {"there are no solutions", "there is no solution", "there are no such numbers", "dne"}
)
_INFINITE = frozenset({"infinitely many", "infinite", "infinity", "infinitely many solutions"})
_JUDGEMENTS = frozenset(
    "odd even yes no true false prime composite rational irrational convergent divergent"
    " increasing decreasing positive negative".split()
)
_NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "without", "isn", "doesn"})
_NO_NAME = frozenset(
    "the a an any all there it in to if no yes this that these those for let when we by on at and"
    " every each both either only since because so thus then from with".split()
)


_ANSWER_IS = re.compile(r"^(?:the )?(?:final |correct )?answer is:? ", re.IGNORECASE)


def words_of(text: str) -> list[str]:
    """Lower-case words and numbers, without articles and LaTeX commands."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\b|\\[a-zA-Z]+", " ", text)
    words = re.findall(r"[a-z]+|\d+", text.lower())
    return [word for word in words if word not in _ARTICLES] if len(words) > 1 else words


def text_of(node: Node) -> str | None:
    """The word a node stands for: words, a single letter, nothing, infinity; else None."""
    if node.kind == "text":
        words = words_of(_ANSWER_IS.sub("", node.name))
        if len(words) == 2 and words[0] in ("option", "choice"):
            words = words[1:]
        text = " ".join(words)
        if text in _NOTHING:
            return "none"
        return "infinity" if text in _INFINITE else text
    if node.kind in ("sym", "const") and len(node.name) == 1:
        return node.name.lower()
    if node == Node("const", name="inf"):
        return "infinity"
    if node == Node("set"):
        return "none"
    return None


def equal_texts(gold: Node, answer: Node) -> bool:
    """Same words, whatever the case, the articles and the punctuation."""
    left, right = text_of(gold), text_of(answer)
    return bool(left) and left == right


def is_short_form(sentence: str, answer: str) -> bool:
    """Is `answer` the one word that a gold sentence comes down to?

    Either the name that the sentence opens with ("Petya will receive the last token"), or the one
    judgement it passes ("The function is odd"). A negated sentence has no short form.
    """
    words = re.findall(r"[A-Za-z]+", sentence)
    short = words_of(answer)
    opening = re.match(r"\W*(yes|no|true|false)\s*[,.;:]", sentence, re.IGNORECASE)
    if opening is not None and len(short) == 1:
        return short[0] == opening[1].lower()
    lowered = {word.lower() for word in words}
    if len(words) < 3 or len(short) != 1 or lowered & (_NEGATIONS | {"or", "either"}):
        return False
    word = short[0]
    judgements = lowered & _JUDGEMENTS
    if judgements == {word}:
        return True
    name = words[0]
    is_name = name[0].isupper() and name[1:].islower() and name.lower() not in _NO_NAME
    is_only_name = not any(item[0].isupper() for item in words[1:])
    return is_name and is_only_name and len(name) > 2 and word == name.lower()


def same_exponent(left: str, right: str) -> bool:
    """Do two units, known or not, carry the same exponent? One may leave it out."""
    exponents = [re.search(r"\^\s*\{?(\d+)", name) for name in (left, right)]
    found = {match[1] for match in exponents if match is not None}
    return len(found) < 2


def unit_scale(name: str) -> tuple[str, Fraction] | None:
    """(dimension, size) of a unit such as "cm", "square meters", "km/h"; None if unknown."""
    words = re.sub(r"[{}()]", "", name).strip().rstrip(".").split()
    power = 1
    if words and words[0] in ("square", "sq"):
        power, words = 2, words[1:]
    elif words and words[0] == "cubic":
        power, words = 3, words[1:]
    text = " ".join(words).replace(" per ", "/")
    match = re.fullmatch(
        r"([A-Za-z]+)\s*\^?\s*([23])?(?:\s*/\s*([A-Za-z]+)\s*\^?\s*([23])?)?", text
    )
    if match is None:
        return None
    total, dimension = Fraction(1), ""
    parts = [(match[1], int(match[2] or power), 1)]
    if match[3] is not None:
        parts.append((match[3], int(match[4] or 1), -1))
    for unit, exponent, sign in parts:
        known = UNITS.get(unit) or UNITS.get(unit.lower())
        if known is None:
            return None
        total *= Fraction(str(known[1])) ** (exponent * sign)
        dimension += f"{known[0]}{exponent * sign};"
    return dimension, total
