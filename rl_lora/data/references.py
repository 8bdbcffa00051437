"""Gold answers with alternatives: several texts in one reference, any of which counts.

A list of answers in a data set is read by `layouts`; what comes of it travels as one text,
``1/2 ||| 0.5``, through prompts, records and files, and is taken apart where it is graded. A text
may end in its tolerance, ``2.5 m [tolerance 0.1]``: the largest difference that counts as right,
which `rewards.rules.split_tolerance` reads.
"""

from __future__ import annotations

from collections.abc import Sequence

SEPARATOR = " ||| "


def join_alternatives(golds: Sequence[str]) -> str:
    """One reference. Example: ["1/2", "0.5"] -> "1/2 ||| 0.5"."""
    return SEPARATOR.join(golds)


def alternatives(reference: str) -> list[str]:
    """The texts of a reference, at least one. Example: "1/2 ||| 0.5" -> ["1/2", "0.5"]."""
    return reference.split(SEPARATOR)


def with_tolerance(reference: str, tolerance: str) -> str:
    """Each alternative with the tolerance. Example: "2.5", "0.1" -> "2.5 [tolerance 0.1]"."""
    return join_alternatives(
        [f"{gold} [tolerance {tolerance}]" for gold in alternatives(reference)]
    )


def without_tolerance(gold: str) -> str:
    """One alternative without its tolerance."""
    return gold.partition(" [tolerance ")[0]
