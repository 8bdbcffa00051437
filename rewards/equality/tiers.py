"""The tiers in order: string, plain number, typed and numeric comparison, or left open."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from rewards.equality.compare import Comparison
from rewards.equality.exact import Undecided
from rewards.equality.interpret import Reading, read, read_gold
from rewards.equality.relations import Contradiction
from rewards.equality.scalars import TooLarge
from rewards.equality.text_answers import is_short_form, text_of
from rewards.equality.unevaluated import has_unevaluated_sum, is_literal
from rewards.extraction.extract import extract
from rewards.parsing.clean import clean
from rewards.parsing.nodes import LimitExceeded, Node, ParseError
from rewards.parsing.parser import Parsed
from rewards.parsing.tokens import tokenize
from rewards.rules import GradingRules
from rewards.types import Status, Tier, Verdict

_PLAIN = re.compile(
    r"(?P<whole>[-+]?(?:\d{1,3}(?:,\d{3})+|\d+))(?P<decimals>\.\d+)?(?:/(?P<bottom>\d+))?"
    r"|(?P<sign>-?)\\[dt]?frac\{(?P<over>-?\d+)\}\{(?P<under>\d+)\}"
)
_DECIMAL_COMMA = re.compile(r"^(\s*\$?\s*-?\d+),(\d+)(?=\s*\$?\s*$)")
_INTEGER = re.compile(r"-?\d{1,18}")
_NO_DIGIT = re.compile(r"\D+")
MAX_PLAIN_CHARS = 400
MAX_OFFERED = 4  # spellings of one answer that may be offered together
LastResort = Callable[[Node, Node], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict; `is_open` if a worker has to decide."""

    verdict: Verdict
    is_open: bool = False


RIGHT_STRING = Outcome(Verdict(True, "ok", "string"))
RIGHT_EXACT = Outcome(Verdict(True, "ok", "exact"))
WRONG_EXACT = Outcome(Verdict(False, "ok", "exact"))


def decide(
    gold: str,
    answer: str,
    rules: GradingRules,
    joined: tuple[str, ...] = (),
    last_resort: LastResort | None = None,
) -> Outcome:
    """Is `answer` equal to the gold? `joined`: answers offered together, including this one."""
    outcome = _plain_outcome(gold, answer, rules) if not joined else None
    if outcome is not None:
        return outcome
    if rules.decimal_comma:
        gold, answer = (_DECIMAL_COMMA.sub(r"\1.\2", text) for text in (gold, answer))
    wanted = read_gold(gold)
    has_several = any(
        parsed.node.kind in ("list", "set") and len(parsed.node.args) > 1
        for parsed in wanted.candidates[:1]
    )
    if not joined and "oxed" in answer:
        joined = extract(answer).joined
    if len(set(joined)) > 1 and not has_several:
        outcomes = [
            _typed_outcome(gold, wanted, item, rules, last_resort) for item in joined[:MAX_OFFERED]
        ]
        if len(joined) <= MAX_OFFERED and all(outcome.verdict.correct for outcome in outcomes):
            return outcomes[-1]  # the same value twice: 1/2 or 0.5
        return Outcome(Verdict(False, "contradictory", "typed"))
    outcome = _typed_outcome(gold, wanted, answer, rules, last_resort)
    if joined and has_several and not outcome.verdict.correct:
        return _typed_outcome(gold, wanted, ", ".join(joined), rules, last_resort)
    return outcome


def _plain_outcome(gold: str, answer: str, rules: GradingRules) -> Outcome | None:
    """The outcome for strings and plain numbers, the most common answers; None for others."""
    gold, answer = gold.strip(), answer.strip()
    if not gold:
        raise ValueError("the gold answer is empty: pass the prompt's reference")
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        number = int(answer)
        if number == int(gold):
            return RIGHT_EXACT if _in_range(number, rules) else WRONG_EXACT
        return WRONG_EXACT if rules.largest_difference is None else None
    if gold == answer and rules.answer_range is None:
        return RIGHT_STRING
    if max(len(gold), len(answer)) > MAX_PLAIN_CHARS:
        return None
    left = _plain_number(gold)
    right = None if left is None else _plain_number(answer)
    if left is None or right is None or rules.largest_difference is not None:
        return None
    if left[0] == right[0]:
        is_integer = right[0].denominator == 1
        is_settled = rules.accept_unreduced or is_integer
        if is_settled and (rules.answer_range is None or is_integer):
            return RIGHT_EXACT if _in_range(int(right[0]), rules) else WRONG_EXACT
        return None
    may_round = left[1] or right[1]  # a printed decimal may round
    may_be_list = "," in gold or "," in answer
    return None if may_round or may_be_list else WRONG_EXACT


def _in_range(number: int, rules: GradingRules) -> bool:
    low_high = rules.answer_range
    return low_high is None or low_high[0] <= number <= low_high[1]


def _plain_number(text: str) -> tuple[Fraction, bool] | None:
    r"""(value, is it a decimal) of 1,234, -0.5, 3/4 or \frac{3}{4}; None for anything else."""
    match = _PLAIN.fullmatch(text.strip("$").removesuffix(".").strip())
    if match is None:
        return None
    if match["over"] is not None:
        bottom = int(match["under"])
        top = int(match["over"]) * (-1 if match["sign"] else 1)
        return (Fraction(top, bottom), False) if bottom else None
    digits = match["whole"].replace(",", "") + (match["decimals"] or "")
    bottom = int(match["bottom"] or 1)
    if bottom == 0 or (match["decimals"] and match["bottom"]):
        return None
    if match["decimals"] is None:
        return Fraction(int(digits), bottom), False
    num_decimals = len(match["decimals"]) - 1
    return Fraction(int(digits.replace(".", "")), 10**num_decimals), True


def _typed_outcome(
    gold: str, wanted: Reading, answer: str, rules: GradingRules, last_resort: LastResort | None
) -> Outcome:
    given = read(answer)
    if not wanted.candidates or not given.candidates:
        if _same_spelling(gold, answer):
            return RIGHT_STRING
        status: Status = "limit" if given.status == "limit" else "unparsable"
        return Outcome(Verdict(False, status if not given.candidates else "ok"))
    is_open, status = False, "ok"
    tier: Tier = "typed"
    for left, right in _pairs(wanted, given):
        comparison = Comparison(rules, last_resort)
        try:
            if comparison.compare(left, right) and _respects(right, rules):
                is_unevaluated = is_literal(left.node) and has_unevaluated_sum(answer, right.node)
                if rules.accept_sums or not is_unevaluated:
                    return Outcome(Verdict(True, "ok", tier))
                status = "unevaluated"
        except TooLarge:
            status = "limit"
        except Undecided:
            is_open = True
        except Contradiction:
            status = "contradictory"
        except (LimitExceeded, ParseError, RecursionError):
            status = "limit"
    if rules.accept_short_text and (_short_text(gold, given) or _short_text(answer, wanted)):
        return Outcome(Verdict(True, "ok", "typed"))
    if _same_spelling(gold, answer):
        return RIGHT_STRING
    if status == "ok":
        status = _status_of(wanted, given)
    return Outcome(Verdict(False, status, tier), is_open and last_resort is None)


def _pairs(wanted: Reading, given: Reading) -> list[tuple[Parsed, Parsed]]:
    """Pairs of readings, most likely first; two unlikely readings are never paired."""
    first, other = wanted.candidates[0], given.candidates[0]
    pairs = [(first, right) for right in given.candidates if _may_pair(right, other, first)]
    pairs += [(left, other) for left in wanted.candidates[1:] if _may_pair(left, first, other)]
    return pairs[:6]


def _may_pair(reading: Parsed, likeliest: Parsed, opposite: Parsed) -> bool:
    """A comma is a decimal point only if the other side is a decimal with as many digits."""
    node, facing = reading.node, opposite.node
    if node.kind != "num" or likeliest.node.kind == "num" or node.name != "decimal":
        return True
    return facing.name == "decimal" and facing.decimals == node.decimals


def _respects(answer: Parsed, rules: GradingRules) -> bool:
    node = answer.node
    if rules.answer_range is not None and node.kind == "num":
        return node.number.denominator == 1 and _in_range(int(node.number), rules)
    if not rules.accept_unreduced and node.kind == "mul" and len(node.args) == 2:
        top, bottom = node.args
        if top.kind == "num" and bottom.kind == "pow" and bottom.args[0].kind == "num":
            return Fraction(top.number, bottom.args[0].number).denominator == abs(
                bottom.args[0].number
            )
    return True


def _short_text(sentence: str, given: Reading) -> bool:
    """Is one side a one-word summary of the other?"""
    if len(sentence) > MAX_PLAIN_CHARS:
        return False
    text = text_of(given.candidates[0].node)
    return text is not None and is_short_form(sentence, text)


def _status_of(wanted: Reading, given: Reading) -> Status:
    node = given.candidates[0].node
    if node.has("open") and not wanted.candidates[0].node.has("open"):
        return "unevaluated"
    if given.status == "unparsable":
        return "unparsable"
    return "ok"


def _same_spelling(gold: str, answer: str) -> bool:
    """Same tokens, ignoring white space and braces around a single token?

    Other braces have a meaning: 2^{n}-1 is not 2^{n-1}.
    """
    if gold.strip() == answer.strip():
        return True
    if gold.isascii() and answer.isascii() and ":" not in gold + answer:
        if _NO_DIGIT.sub("", gold) != _NO_DIGIT.sub("", answer):
            return False
    return _spelling(gold) == _spelling(answer)


def _spelling(text: str) -> tuple[tuple[str, str], ...] | str:
    try:
        tokens = tokenize(clean(text))
    except (ParseError, LimitExceeded):
        return text.strip()
    spelling: list[tuple[str, str]] = []
    for token in tokens:
        spelling.append((token.kind, token.text))
        if [piece for _, piece in spelling[-3::2]] == ["{", "}"] and spelling[-2][1] not in "{}":
            spelling[-3:] = [spelling[-2]]
    return tuple(spelling)
