"""Errors that name the thing and the fix.

The command line prints a `UserError` as one line and exits with code 2; every other exception is a
defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input (config, data, checkpoint, model directory): the message is one line."""


class StaleAdapterError(RuntimeError):
    """The sampler does not sample from the adapter that the learner published."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint "did you mean 'x'?" for a mistyped word, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
