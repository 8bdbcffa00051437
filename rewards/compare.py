"""Decide whether an answer equals a gold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from rewards.policy import Policy
from rewards.types import Verdict

_PLAIN = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+]?\.\d+")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict; `is_open` where a worker has to decide."""

    verdict: Verdict
    is_open: bool = False


def plain_number(text: str) -> Fraction | None:
    text = text.strip().strip("$").rstrip(".").strip()
    if len(text) > 400 or not _PLAIN.fullmatch(text):
        return None
    if text.endswith("/0"):
        return None
    return Fraction(text.replace(",", ""))


def decide(gold: str, answer: str, policy: Policy, joined: tuple[str, ...] = ()) -> Outcome:
    if gold.strip() == answer.strip():
        return Outcome(Verdict(True, "ok", "string"))
    left, right = plain_number(gold), plain_number(answer)
    return Outcome(Verdict(left is not None and left == right, "ok", "exact"))
