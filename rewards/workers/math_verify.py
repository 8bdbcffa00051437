"""Math-Verify as the judge (optional extra). Runs only in a worker, where time is bounded."""

from __future__ import annotations

from rewards.types import Verdict


def verify_with_math_verify(gold: str, answer: str) -> Verdict:
    """Compare with Math-Verify, both sides boxed: the form it parses most reliably.

    Its own alarm-based timeouts are off; the pool's deadline replaces them.
    """
    from math_verify import parse, verify

    gold_values = parse(_boxed(gold), parsing_timeout=None)
    answer_values = parse(_boxed(answer), parsing_timeout=None)
    if not answer_values:
        return Verdict(False, "unparsable")
    correct = bool(verify(gold_values, answer_values, timeout_seconds=None))
    return Verdict(correct, "ok", "symbolic")


def _boxed(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}"
