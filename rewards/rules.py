"""What counts as the same answer: one frozen GradingRules per data set.

The default is symmetric: swapping gold and answer never changes the verdict, except for the
precision of two printed decimals. A data set's own rules only state what its gold answers mean.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True, slots=True)
class GradingRules:
    """Rules of equality beyond exact mathematical equality.

    Example::

        GradingRules(name="aime", rounding="none", answer_range=(0, 999))
    """

    name: str = "default"
    # A printed decimal may stand for an exact value that rounds to it: if it is the gold ("gold"),
    # on either side ("either"), or never ("none").
    rounding: Literal["none", "gold", "either"] = "either"
    # Significant digits that a rounded decimal must show: 6.67 = 20/3, but 6.7 does not. "either"
    # asks for one more for a common fraction (0.3333 = 1/3) and for an irrational number.
    min_significant_digits: int = 3
    # Values that agree to this many decimals are equal (absolute). None: only rounding counts.
    tolerance_decimals: int | None = None
    # Values that differ by at most this are equal (absolute, in the gold's unit). A reference
    # that ends in "[tolerance 0.1]" sets its own (`split_tolerance`).
    tolerance: float | None = None
    # 28% always equals 0.28; with "either", 28% also equals 28.
    percent: Literal["value", "either"] = "either"
    # Read 2,5 as 2.5. If off, only what cannot be a list of numbers is: 0,5 and 1000,99.
    decimal_comma: bool = False
    # Compare lists of answers as multisets ("any") or item by item ("gold").
    list_order: Literal["any", "gold"] = "any"
    # "lenient": either side may omit its unit, but two units must agree (after conversion).
    # "strict": if the gold has a unit, the answer must have one.
    units: Literal["lenient", "strict"] = "lenient"
    # 9 + 1 for 10: unevaluated arithmetic where the gold is a plain number.
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
    # Integer answers outside this inclusive range are wrong.
    answer_range: tuple[int, int] | None = None

    @property
    def largest_difference(self) -> Fraction | None:
        """Between equal values; None if only rounding counts."""
        if self.tolerance is not None:
            return Fraction(str(self.tolerance))
        decimals = self.tolerance_decimals
        return None if decimals is None else Fraction(1, 2 * 10**decimals)


RULES: dict[str, GradingRules] = {
    "default": GradingRules(),
    # Word problems: a rounded amount is right if the gold is one; there are no symbols to rename.
    "gsm8k": GradingRules(
        name="gsm8k", rounding="gold", min_significant_digits=2, rename_bound=False
    ),
    # Competition golds are exact: a rounded decimal for \frac{1}{3} or \pi is wrong.
    "math": GradingRules(name="math", rounding="gold"),
    # MATH plus yes/no, true/false and multiple choice, which need no separate rules.
    "deepmath": GradingRules(name="deepmath", rounding="gold"),
    # Integers from 0 to 999. Leading zeros belong to the answer sheet, not to the value.
    "aime": GradingRules(name="aime", rounding="none", percent="value", answer_range=(0, 999)),
}


_TOLERANCE = re.compile(r"\s*\[tolerance (\d{1,30}(?:\.\d{1,30})?(?:[eE][-+]?\d{1,2})?)\]$")


def split_tolerance(reference: str, rules: GradingRules) -> tuple[str, GradingRules]:
    """Gold answer and rules of a reference that may state its own tolerance.

    Example: "2.5 m [tolerance 0.1]" is the gold "2.5 m" under `rules` with tolerance=0.1.
    """
    match = _TOLERANCE.search(reference)
    if match is None:
        return reference, rules
    return reference[: match.start()], replace(rules, tolerance=float(match[1]))


def load_rules(name: str) -> GradingRules:
    """The rules called `name`. Raises ValueError with the closest known name."""
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown rules {name!r}: did you mean {near[0]!r}? Known: {', '.join(RULES)}"
        )
    return RULES[name]
