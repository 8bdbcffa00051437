"""Gold answers with alternatives: several texts in one reference, any of which is right.

`row_formats` reads a data set's lists of answers. The reference is one text, ``1/2 ||| 0.5``, in
prompts, records and files, and is split for grading. An alternative may end with a tolerance,
``2.5 m [tolerance 0.1]``: the largest difference that counts as right
(`rewards.rules.split_tolerance`).
"""

from __future__ import annotations

SEPARATOR = " ||| "


def alternatives(reference: str) -> list[str]:
    """Splits a reference, into at least one text. Example: "1/2 ||| 0.5" -> ["1/2", "0.5"]."""
    return reference.split(SEPARATOR)


def with_tolerance(reference: str, tolerance: str) -> str:
    """Adds the tolerance to each alternative. Example: "2.5", "0.1" -> "2.5 [tolerance 0.1]"."""
    return SEPARATOR.join(f"{gold} [tolerance {tolerance}]" for gold in alternatives(reference))


def without_tolerance(gold: str) -> str:
    """Removes an alternative's tolerance."""
    return gold.partition(" [tolerance ")[0]
