"""What counts as the same answer: one frozen GradingRules per data set.

The default is symmetric (swapping gold and answer never changes the verdict, but for the
precision of two printed decimals). A data set's rules state only what its golds mean.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class GradingRules:
    """Rules of equality beyond exact mathematical equality.

    Example::

        GradingRules(name="aime", rounding="none", answer_range=(0, 999))
    """

    name: str = "default"
    # A printed decimal may stand for an exact value that rounds to it: where it is the gold
    # ("gold"), on either side ("either"), or never ("none").
    rounding: Literal["none", "gold", "either"] = "either"
    # Digits a rounded decimal must show: 6.67 = 20/3, but 6.7 does not. Under "either" one more for
    # a fraction that everyone writes as one (0.3333 = 1/3) and for an irrational number.
    min_significant_digits: int = 3
    # Values that agree to this many decimals are equal (absolute); None: only rounding decides.
    tolerance_decimals: int | None = None
    # Values that differ by no more than this are equal (absolute, in the gold's unit). A reference
    # that ends in "[tolerance 0.1]" sets it for itself (`split_tolerance`).
    tolerance: float | None = None
    # 28% equals 0.28 whatever the rules; "either": 28% = 28 as well.
    percent: Literal["value", "either"] = "either"
    # 2,5 is 2.5; else only what no list of numbers looks like is read so: 0,5 and 1000,99.
    decimal_comma: bool = False
    # Answer lists compare as multisets ("any") or item by item ("gold").
    list_order: Literal["any", "gold"] = "any"
    # "lenient": a unit that one side leaves out is no error, two units must agree (converted);
    # "strict": a gold's unit must be given.
    units: Literal["lenient", "strict"] = "lenient"
    # 9 + 1 for 10: a sum left to do where the gold is a plain number (see `equality.unevaluated`).
    accept_sums: bool = False
    # 4/6 for 2/3.
    accept_unreduced: bool = True
    # `x = 5` for 5, `5 = x`, and labelled lists (`w=16, d=3` for `16, 3`).
    accept_labels: bool = True
    # `n \pi` for `k \pi`, f(z) = z for f(x) = x.
    rename_bound: bool = True
    # Any free symbol may be renamed: f(x) is f(y).
    rename_free: bool = False
    # `x < 5` for `(-\infty, 5)`, `x \in [0, 1]` for `0 \le x \le 1`.
    relations_as_sets: bool = True
    # An angle in degrees equals the same angle in radians: 30^\circ = \pi/6.
    degrees_as_radians: bool = True
    # "Petya" for "Petya will receive the last token".
    accept_short_text: bool = True
    # Integer answers outside this range are wrong; both ends included.
    answer_range: tuple[int, int] | None = None


RULES: dict[str, GradingRules] = {
    "default": GradingRules(),
    # Word problems: a rounded amount is right where the gold is one; no symbols to rename.
    "gsm8k": GradingRules(
        name="gsm8k", rounding="gold", min_significant_digits=2, rename_bound=False
    ),
    # Competition golds are exact: a rounded decimal for \frac{1}{3} or \pi is wrong.
    "math": GradingRules(name="math", rounding="gold"),
    # Adds Yes/No, True/False and multiple choice to MATH; those need no rule of their own.
    "deepmath": GradingRules(name="deepmath", rounding="gold"),
    # Integers 0-999; leading zeros are part of the answer sheet, not of the value.
    "aime": GradingRules(name="aime", rounding="none", percent="value", answer_range=(0, 999)),
}


_TOLERANCE = re.compile(r"\s*\[tolerance (\d{1,30}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,2})?)\]$")


def split_tolerance(reference: str, rules: GradingRules) -> tuple[str, GradingRules]:
    """Gold answer and rules of a reference that may state its tolerance.

    Example: "2.5 m [tolerance 0.1]" is the gold "2.5 m" under `rules` with tolerance=0.1.
    """
    match = _TOLERANCE.search(reference)
    if match is None:
        return reference, rules
    return reference[: match.start()], replace(rules, tolerance=float(match[1]))


def load_rules(name: str) -> GradingRules:
    """The rules of that name. Raises ValueError naming the nearest one."""
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown policy {name!r}: did you mean {near[0]!r}? Known: {', '.join(RULES)}"
        )
    return RULES[name]


def to_wire(rules: GradingRules) -> dict[str, Any]:
    """The departures from the default, as JSON values."""
    default = asdict(GradingRules())
    return {key: value for key, value in asdict(rules).items() if value != default[key]}


def from_wire(fields: dict[str, Any]) -> GradingRules:
    """The rules of what `to_wire` wrote."""
    if fields.get("answer_range") is not None:
        low, high = fields["answer_range"]
        fields = {**fields, "answer_range": (low, high)}
    return replace(GradingRules(), **fields)
