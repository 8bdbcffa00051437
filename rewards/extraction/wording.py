"""The value in a statement, without clauses, remarks, corrections and endings around it.

All texts here have at most MAX_STATED characters. Only a closed list of things is dropped: words
that change the value (negative, half of, at least, squared, not) are kept, and so is a clause that
offers another value.
"""

from __future__ import annotations

import re

from rewards.extraction.languages import (
    COUNTERS,
    FOREIGN_TAIL,
    PARTICLES,
    SENTENCE_END,
    with_ascii_digits,
)
from rewards.parsing.units import is_unit

MAX_STATED = 2000
MAX_VALUE = 300  # characters of a stated value
SO = "so|thus|hence|therefore"
# A formula, bold text, a number with its currency or percent sign, or an option's letter.
VALUE = (
    r"\$[^$\n]{1,200}\$|\*\*[^*\n]{1,100}\*\*"
    r"|[-+−]?(?:\\?[$€£])?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?|\(?\b[A-J]\b\)?"
)

_SENTENCE_END = re.compile(
    r"(?<!\bvs)(?<!\bSt)(?<!\.)\.(?=\s+[A-Z\"'(]|\s*$)|(?<![\d)])[!?](?=\s+[A-Z\"'(])"
    r"|(?<=[\d)][!?])(?=\s+[A-Z\"'(])|\n|</[a-z_]+>"
)
_SYMBOLS = re.compile(r"[\u2190-\u21ff\u2600-\u27bf\u2b00-\u2bff\ufe0f\U0001f000-\U0001faff✓✔☑]+")
_OPENING = {")": "(", "}": "{", "]": "["}
_DECORATION = " \t\r\n*_`\"'“”‘’«»"

# Words that open a clause about the answer, some of them only after punctuation.
_CLAUSE = re.compile(
    r"\s*[,;:.–—-]*\s(?:because|since|as (?:required|expected|desired|needed|shown|stated|we|it"
    r"|there)"
    r"|which|meaning|representing|corresponding to|obtained|rounded|that is|namely|given that"
    r"|assuming|where (?:the|we|it|she|he|each|all)|so (?:the|that|we|it|she|he|there|they)\b"
    r"|according to|thanks to|due to|owing to|after (?:rounding|simplif)|when rounded"
    r"|with equality|attained|achieved|by \w+ing|and (?:it|this|that|we|they|so))\b"
    r"|\s*[,;]\s*(?:which|that(?:'s| is)|this|these|it|they|there|so|hence|thus|therefore|and so"
    r"|and (?:this|that|it|we|the answer|therefore|thus|hence)|making|giving|leaving|showing|but"
    r"|the|we|she|he|as|note|while|with (?:the|a)|matching|confirming|if you|obtained|rounded"
    r"|reached|occurring|by|see|found|verified|checked|done|right|correct)\b"
    r"|[\s,;(]+i\.?\s?e\.|\s—\s|(?<=[a-z]{3}):\s|(?<=\d):\s(?=[a-z]{3})"
    r"|\s(?:altogether|in total|in all|all together|overall)\b"
    r"|\s[-–—]+\s(?=(?:see|the|that|this|which|it|an|since|because|so|we|my|her|his|their)\b)"
    r"|\s*[，；](?=[^\dA-Za-z$\\\s-])",
    re.IGNORECASE,
)
# A remark in brackets; _KEPT_REMARK is a modulus, a base, a condition or another answer.
_REMARK = re.compile(
    r"(?:(?<=[\w}).%\]*])\s*|(?<=\$)\s)(?:[(（](?P<remark>[^()（）]*)[)）]|(?<=\s)\[(?P<note>[^\[\]]*)\])"
)
_KEPT_REMARK = re.compile(
    r"\s*(?:or|mod|base|if|unless|except|when|for|only|and|maybe|possibly|perhaps|approx\w*|about"
    r"|wrong|incorrect|rejected|invalid|extraneous|false|to|in base"
    r"|inclusive|exclusive|at|with|where|per|each|times|squared|cubed|negative)\b",
    re.IGNORECASE,
)
_MAGNITUDE = re.compile(r"\b(?:hundred|thousand|million|billion|dozen|percent)", re.IGNORECASE)
_IN_SCALE = re.compile(r"\s*in (hundred|thousand|million|billion|dozen)s\b")
_LONG_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_HEDGE = re.compile(
    r"\b(?:or|either|maybe|perhaps|possibly|might|(?-i:may)|could|alternatively|unless|except|if|wrong"
    r"|incorrect|mistake)\b|\bnot (?:right|correct|the|sure|certain)\b",
    re.IGNORECASE,
)
_VALUE = re.compile(r"\d|\$|\\[a-z(]")
_NUMBER = (
    r"[-+−]?\$?\\?\(?[-+−]?\$?\d[\d,./]*(?:\\?%|\$)?\)?|\$[^$]{1,80}\$|\(?[A-J]\)?"
    r"|\\[a-z]+\{[^{}]{1,40}\}(?:\{[^{}]{1,40}\})?"
)
_INSTEAD = re.compile(
    r"\s*[,;(–—-]?\s*\b(?:and |but )?(?:not|rather than|instead of|as opposed to|and not)\s+"
    rf"(?:{_NUMBER})(?:\s[a-z]+)?\)?$|\s*,\s*not\s[a-z][a-z ]{{2,30}}$"
)
_TOMBSTONE = re.compile(
    r"\$?\\(?:blacksquare|square|qed|Box|checkmark)(?![A-Za-z])\$?|[∎■□]|\bQED\b"
)
# 'B (12 cm)', 'B, 12 cm': an option and its content.
_OPTION = re.compile(
    r"^\(?(?P<letter>[A-J])\)?(?:,|\s[–—-]+(?=.*[a-z]{2})|(?=\s\())\s+(?!and\b|or\b|not\b)"
    r"\(?(?P<content>[^()]*(?:\d|\$|[a-z]{3})[^()]*)\)?$"
)
_NOT_BUT = re.compile(
    rf"^not\s+(?:{_NUMBER}|[a-z]+)\s*,?\s+but(?:\s+rather)?\s+(?=\S)", re.IGNORECASE
)
_CORRECTION = re.compile(
    r"[\s,;.–—(-]*\b(?:no,? wait|wait,? no|wait|actually|scratch that|correction|i mean|sorry"
    r"|hold on|oops|or rather)\b(?:[\s,:;.!–—]|-(?!\d))*",
    re.IGNORECASE,
)
_FILLER = re.compile(
    r"^(?:(?:therefore|thus|then|hence|simply|just|now|indeed|also|still|clearly|definitely|exactly"
    r"|precisely|only|given by|equal to|found to be|going to be|the (?:option|choice|letter|number"
    r"|value)|(?:option|choice|letter)|as follows:|in fact|of course|equals|to be)[\s:,]+)+",
    re.IGNORECASE,
)
# 'la B', 'a letra B'.
_LETTER_NAME = re.compile(
    r"^(?:(?:la|el|a|o|le|il|die|der)\s)?(?:(?:letra|lettre|lettera|opci[oó]n|op[cç][aã]o|alternativa"
    r"|вариант|буква)\s)?(?=\(?[A-J]\)?\.?$)",
    re.IGNORECASE,
)
# '72 clips altogether in April': words after a counted noun that do not affect the number.
_COUNTED = re.compile(
    r"^(?P<head>(?:\\?[$€£]\s?)?[-+]?\d[\d,.]*(?:/\d+)?(?:\s[A-Za-z]{3,}){1,2}?|[$€£]\s?[\d,.]+)"
    r"(?P<tail>\s(?:altogether|in total|in all|all together|overall|combined|total|left|remaining"
    r"|in|at|on|during|after|from|for|with|among|by|that|who)\b[^\d$\\=<>+*/^|]*)$"
)
_TAIL_WITH_MEANING = re.compile(
    r"\b(?:base|mod(?:ulo)?|squared|cubed|times|or|either|less|more|fewer|half|if|unless|except|not"
    r"|per|each|every|negative|minus|plus|divided|multiplied|hundreds?"
    r"|thousands?|millions?|billions?|dozens?|percent|[b-hj-z])\b"
)
_SUMS = re.compile(
    r"^[\d\s+\-*/×÷·().,$]*[+\-*/×÷·][\d\s+\-*/×÷·().,$]*=[\d\s+\-*/×÷·().,$=]*?\d(?P<noun>\s[a-z]{3,}\.?)$"
)
_PARTS = re.compile(
    r"(?:(?i:so|thus|hence|then|therefore),?\s+)?"
    r"(?:\$?[a-zA-W](?:_\{?\w\}?)?\s*=[^=<>,;]{1,60}?\$?(?:\s*[,;]|\s+and\b)\s*"
    r"(?:(?:and|so|thus|hence|therefore)\b,?\s*)*)+"
)
_ASKED_SUM = re.compile(
    r"\$?(?:\d*[a-wA-W](?:_\{?\w\}?)?\s*[+-]\s*)+\d*[a-wA-W](?:_\{?\w\}?)?\s*="
    r"(?:[^=<>a-zA-Z]{1,80}=)*\s*(?P<value>-?\d[\d,]*)\s*\$?$"
)


def first_sentence(text: str) -> str:
    """The first sentence or line of the text; a formula at its start is kept whole."""
    text = text.strip()
    start = 0
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening):
            end = text.find(closing, len(opening))
            start = end + len(closing) if end > 0 else 0
            break
    ends = [match.start() for match in (_SENTENCE_END.search(text, start),) if match]
    if not text.isascii():
        ends += [match.start() for match in (SENTENCE_END.search(text, start),) if match]
    sentence = text[: min(ends)] if ends else text
    return _undecorated(sentence)


def _undecorated(text: str) -> str:
    """The text without emphasis, quotation marks and final punctuation."""
    text = text.strip(_DECORATION).rstrip(",;")
    if text.endswith("!") and text[-3:-1].isalpha():
        text = text.rstrip("!")  # an exclamation, not a factorial
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1]
    if text.endswith((")", "}", "]")) and text.count(text[-1]) > text.count(_OPENING[text[-1]]):
        text = text[:-1]
    return text.strip(_DECORATION)


def stated(text: str) -> str:
    """The answer in the text after 'the answer is', up to the end of its sentence.

    Example: ``stated("72 clips (36 in each month), as required. Hope it helps.")`` is "72 clips".
    """
    text = text[:MAX_STATED]
    if "\\" in text or not text.isascii() or "QED" in text:
        text = _TOMBSTONE.sub("", text)
    sentence = " ".join(first_sentence(text).split())
    if not sentence.isascii():
        sentence = COUNTERS.sub("", PARTICLES.sub("", _SYMBOLS.sub("", sentence)))
        sentence = FOREIGN_TAIL.sub("", sentence[:MAX_VALUE]) + sentence[MAX_VALUE:]
        sentence = with_ascii_digits(sentence)
    elif "'" in sentence:
        sentence = PARTICLES.sub("", sentence)
    sentence = _LETTER_NAME.sub("", _FILLER.sub("", sentence.strip(_DECORATION)))
    if any(character in sentence for character in " (（"):
        option = _OPTION.match(sentence) if len(sentence) <= MAX_VALUE else None
        if option is not None:
            return f"({option['letter']}) {_undecorated(option['content'])}"
        sentence = _without_clauses(sentence)
    return asked_value(_undecorated(sentence))


def asked_value(text: str) -> str:
    """293 for `m + n = 256 + 37 = 293`: the sum of letters that such a task asks for.

    Also after its parts: `m = 256 and n = 37, so m + n = 293`.
    """
    if "=" not in text or len(text) > MAX_VALUE:
        return text
    parts = _PARTS.match(text)
    match = _ASKED_SUM.match(text, 0 if parts is None else parts.end())
    return text if match is None else match["value"]


def _without_clauses(sentence: str) -> str:
    corrections = list(_CORRECTION.finditer(sentence))
    if corrections and sentence[corrections[-1].end() :].strip():
        sentence = sentence[corrections[-1].end() :]
    sentence = _NOT_BUT.sub("", sentence)
    if any(bracket in sentence for bracket in "(（["):
        sentence = _REMARK.sub(_drop_remark, sentence)
    sentence = _cut(sentence)
    sentence = _INSTEAD.sub("", sentence)
    counted = _COUNTED.match(sentence)
    if counted is not None and not _TAIL_WITH_MEANING.search(counted["tail"].lower()):
        sentence = counted["head"]
    sums = _SUMS.match(sentence) if len(sentence) <= MAX_VALUE else None
    if sums is not None and not is_unit(sums["noun"].strip(" .")):
        sentence = sentence[: sums.start("noun")]
    return sentence


def is_aside(remark: str) -> bool:
    """Does a remark in brackets only explain the value before it?"""
    if _KEPT_REMARK.match(remark) or _MAGNITUDE.search(remark) or _HEDGE.search(remark):
        return False
    return _LONG_WORD.search(remark) is not None


def _drop_remark(match: re.Match[str]) -> str:
    remark = match["remark"] if match["remark"] is not None else match["note"]
    if match.string.count("$", 0, match.start()) % 2:
        return match.group()  # inside a formula
    scale = _IN_SCALE.match(remark)
    if scale is not None:
        return f" {scale[1]}"
    if is_unit(remark.strip()):
        return f" {remark.strip()}"
    is_value = _VALUE.search(remark) is not None
    if (
        _KEPT_REMARK.match(remark)
        or _MAGNITUDE.search(remark)
        or (is_value and _HEDGE.search(remark))
    ):
        return match.group()
    _, is_equation, last = remark.rpartition("=")
    head = match.string[: match.start()]
    if is_equation and last.strip(" .$") == head.strip(" $"):
        return ""  # 72 (36 + 36 = 72)
    if re.match(r"not\s", remark) or _LONG_WORD.search(remark):
        return ""
    return match.group()


def _cut(sentence: str) -> str:
    """The sentence up to its first clause about the answer, unless that offers another value."""
    for match in _CLAUSE.finditer(sentence):
        head, clause = sentence[: match.start()], sentence[match.start() :]
        is_inside = head.count("$") % 2 or head.count("(") > head.count(")")
        if not head.strip() or is_inside or head.count("{") != head.count("}"):
            continue
        if _VALUE.search(clause) and _HEDGE.search(clause):
            return sentence
        if re.search(r"\b(?:wrong|incorrect)\b", clause):
            return sentence
        return head
    return sentence


_COMMAND = re.compile(r"\\[A-Za-z]+(?:\s*\{[A-Za-z ]+\})?")
_WORD = re.compile(r"[A-Za-z]{2,}")
_FORMULA_WORDS = frozenset(
    "and or where pi sqrt sin cos tan ln log exp percent pct max min gcd lcm mod per square"
    " cubic".split()
)
_OPENS_A_VALUE = re.compile(
    r"[-+−±]?\s?(?:\\?[$€£¥₹]\s?)?[-+−]?\.?\d|\$|\\[A-Za-z({\[]|[A-Za-z]\s?[=<>^_(+*/-]|[(\[{|]|[∞π√]"
    r"|[A-Za-z]$"
)
_JUDGEMENT = re.compile(r"(?:yes|no|true|false)$", re.IGNORECASE)
_NO_VALUE = re.compile(
    r"^(?:not|never|neither|approximately|approx\.?|about|around|roughly|nearly|almost|≈|\\approx)\b"
    r"|\b(?:than|wrong|incorrect|digits?|steps?|parts?|cases?|times as|if|unless)\b"
    r"|^\d+[.)]\s+[A-Za-z]{2}"
)


def num_prose_words(text: str) -> int:
    """Number of words outside formulas."""
    words = _WORD.findall(_COMMAND.sub(" ", text))
    return sum(word.lower() not in _FORMULA_WORDS for word in words)


def is_value(text: str) -> bool:
    """Is this a bare value: a number with its unit, a formula, an option, yes or no?

    Not a rounded or rejected value, nor a numbered heading: these overrule no box.
    """
    if not text or len(text) > MAX_VALUE or _NO_VALUE.search(text):
        return False
    if _JUDGEMENT.match(text):
        return True
    return opens_a_value(text) and num_prose_words(text) <= 3


def opens_a_value(text: str) -> bool:
    """Does the text begin with a number, a formula or an option's letter?"""
    return _OPENS_A_VALUE.match(text) is not None
