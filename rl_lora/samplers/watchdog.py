"""Notices a call that makes no progress any more, and breaks it off."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator

_GRACE_S = 30.0  # from the exception to the end of the process
_EXIT_CODE = 3  # of a run that had to stop


class Hang(BaseException):
    """Raised within a call that hangs. Not an Exception: what handles those must not swallow it."""


@contextlib.contextmanager
def watched(progress: Callable[[], object], timeout_s: float) -> Iterator[None]:
    """Raises Hang in the block once `progress()` has returned the same value for `timeout_s`.

    That interrupts Python code. Where it does not help, as in native code, the process ends half a
    minute later with exit code 3. Native code that never releases the interpreter's lock is not
    noticed. Time in which the process is stopped (SIGSTOP, a suspended job) does not count.

    Args:
        progress: called about once a second, in another thread.
        timeout_s: seconds.
    """
    done, caller = threading.Event(), threading.get_ident()
    watchdog = threading.Thread(
        target=_watch, args=(progress, timeout_s, caller, done), name="watchdog", daemon=True
    )
    watchdog.start()
    try:
        yield
    finally:
        try:
            done.set()
            watchdog.join()
            _raise_in(caller, None)  # one that has not arrived yet
        finally:
            done.set()  # Hang may have arrived in the line that does it


def _watch(
    progress: Callable[[], object], timeout_s: float, caller: int, done: threading.Event
) -> None:
    tick_s = min(1.0, timeout_s / 10)
    last, quiet_s = progress(), 0.0
    while quiet_s < timeout_s:
        if done.wait(tick_s):
            return
        now = progress()
        quiet_s = quiet_s + tick_s if now == last else 0.0  # of a stopped process, one tick
        last = now
    _raise_in(caller, Hang)
    if not done.wait(_GRACE_S):
        # Past Python's own streams, whose locks the caller may hold.
        os.write(
            2,
            f"rl-lora: the run stopped: the sampler gave no token for {timeout_s:g} s "
            "(sampling.timeout_s) and hangs in native code, where only the end of the process helps"
            "; continue from what was saved last (train: --resume)\n".encode(),
        )
        os._exit(_EXIT_CODE)


def _raise_in(thread: int, exception: type[BaseException] | None) -> None:
    """Raises it in the thread, at its next step in Python code; None: takes it back."""
    raised = ctypes.py_object() if exception is None else ctypes.py_object(exception)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)
