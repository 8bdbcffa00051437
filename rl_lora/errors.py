"""Errors.

The command line prints a `UserError` as one line and exits with code 2, and a `RunStoppedError` as
one line with code 3. Any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input (config, data, checkpoint, model): one line that names the thing and a fix."""


class RunStoppedError(RuntimeError):
    """A run that had to stop; what it has written so far stays."""


class StaleAdapterError(RunStoppedError):
    """The sampler is not using the adapter that the learner published."""


class EngineError(RunStoppedError):
    """The sampler's engine failed or hangs: it can only be closed, but a new one may work."""


class KlLimitError(RunStoppedError):
    """The policy is further from the base than the run allows (algorithm.max_kl_to_base)."""


class OtherProcessError(RuntimeError):
    """Another process of the job failed, died or hangs, and so this one ends as well.

    Args:
        text: who, and during what.
        code: the exit code.
    """

    def __init__(self, text: str, *, code: int = 3) -> None:
        super().__init__(text)
        self.code = code


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word: "did you mean 'x'?", or the list of known words."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)
