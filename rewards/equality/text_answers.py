"""Answers in words: options, yes/no, names, short phrases."""

from __future__ import annotations

import re

from rewards.parsing.nodes import Node

_ARTICLES = frozenset({"the", "a", "an"})
_NOTHING = frozenset({"none", "empty set", "does not exist", "dne"})
_OPTION = re.compile(r"(?:option|choice)\s+\(?([a-j])\)?", re.IGNORECASE)
_NONE_EXIST = re.compile(
    r"(?:there (?:is|are|exists?) )?(?:no|0|zero) (?:such |real |integer |possible |valid )?"
    r"(?:solutions?|values?|numbers?|integers?|answers?|roots?)(?: (?:exists?|found|possible))?"
)
_INFINITE = frozenset({"infinitely many", "infinite", "infinity", "infinitely many solutions"})
_JUDGEMENTS = frozenset(
    "odd even yes no true false prime composite rational irrational convergent divergent"
    " increasing decreasing positive negative".split()
)
_NEGATIONS = frozenset({"not", "no", "never", "neither", "nor", "without", "isn", "doesn"})
_SECOND_THOUGHTS = frozenset(
    "yes no true false wait actually maybe perhaps but except unless hmm sorry rather or".split()
)
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
    """The normalised text of words, a letter, an empty set or infinity; None for other nodes."""
    if node.kind == "text":
        option = _OPTION.fullmatch(node.name)
        if option is not None:
            return option[1].lower()
        words = words_of(_ANSWER_IS.sub("", node.name))
        if len(words) == 2 and words[0] in ("option", "choice"):
            words = words[1:]
        text = " ".join(words)
        if text in _NOTHING or _NONE_EXIST.fullmatch(text):
            return "none"
        return "infinity" if text in _INFINITE else text
    if node.kind == "unit" and node.name.startswith("solution"):
        is_none = node.args[0].kind == "num" and node.args[0].number == 0
        return "none" if is_none else None
    if node.kind in ("sym", "const") and len(node.name) == 1:
        return node.name.lower()
    if node == Node("const", name="inf"):
        return "infinity"
    if node == Node("set"):
        return "none"
    return None


def equal_texts(gold: Node, answer: Node) -> bool:
    """Same words, ignoring case, articles and punctuation?"""
    left, right = text_of(gold), text_of(answer)
    return bool(left) and left == right


def is_short_form(sentence: str, answer: str) -> bool:
    """Is `answer` a one-word summary of a gold sentence?

    Either the name that the sentence begins with ("Petya will receive the last token"), or its only
    judgement ("The function is odd"). A negated sentence has no short form.
    """
    words = re.findall(r"[A-Za-z]+", sentence)
    short = words_of(answer)
    opening = re.match(r"\W*(yes|no|true|false)\s*[,.;:]", sentence, re.IGNORECASE)
    lowered = {word.lower() for word in words}
    if opening is not None and len(short) == 1:
        rest = {word.lower() for word in re.findall(r"[A-Za-z]+", sentence[opening.end() :])}
        return short[0] == opening[1].lower() and not rest & _SECOND_THOUGHTS
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
