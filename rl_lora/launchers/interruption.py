"""Signals that ask a process to end: Ctrl-C, and those of launchers, schedulers and clouds.

The first one raises `Interrupted` in the main thread. In a loop over steps (`steps`) it does so
only where a step can be abandoned without a trace (`abandonable`), and the loop then saves its
state; elsewhere it waits for the next such place. A second one ends the process at once, also
within a write: files are renamed into place.

Of a job's several processes none may leave the steps by itself (`set_several`): in there a signal
is only noted, and `distributed.agree_to_stop` ends all of them together.

A signal that was ignored when the process began (`nohup`) stays so, and a program's own handler is
left alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from rl_lora.errors import UserError

# SIGUSR1: SLURM's notice (--signal=USR1@90); SIGHUP: the terminal or its connection is gone.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
# Launchers and `timeout` pass on what the terminal or the scheduler has sent to all processes.
_SAME_S = 1.0
_CLOSE_S = 10.0  # for engines, threads and files to close, once nothing can be lost any more


class Interrupted(KeyboardInterrupt):
    """A signal has asked this process to end. `except Exception` does not catch it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        super().__init__(f"stopped by {name}")
        self.number = number
        # SIGUSR1 announces a SIGTERM.
        self.code = 128 + (signal.SIGTERM if number == signal.SIGUSR1 else number)
        self.progress = ""  # " after step 12"

    def __str__(self) -> str:
        return f"{self.args[0]}{self.progress}"


def code_and_text(error: BaseException) -> tuple[int, str]:
    """The exit code and the line of an error, as other ranks report it."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, Interrupted):
        return error.code, str(error)
    code = 130 if isinstance(error, KeyboardInterrupt) else 3
    return code, f"{type(error).__name__}: {error}".removesuffix(": ")


@dataclass
class _State:
    received: int | None = None  # the first signal
    received_s: float = 0.0  # when, of time.monotonic
    is_looping: bool = False  # inside `steps`: there is something to save
    is_waiting: bool = False  # a signal waits for an abandonable place
    has_several: bool = False  # processes
    ends_process: bool = False


_state = _State()


@contextlib.contextmanager
def handled(*, ends_process: bool = False) -> Iterator[None]:
    """Inside, the signals raise `Interrupted`. Without effect in other threads than the main one.

    ends_process: nothing but this block matters to the process, which ends within ten seconds after
    a signal, once all is saved, even if something hangs (a reward, say) that it would wait for.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    ours = [number for number, handler in before.items() if handler in _DEFAULTS]
    if not _is_main_thread() or not ours:
        yield
        return
    _state.ends_process = ends_process
    for number in ours:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is _on_signal:  # not ignored meanwhile
                signal.signal(number, before[number])
        _state.received = None


@contextlib.contextmanager
def steps(save: Callable[[], None]) -> Iterator[None]:
    """A loop over steps, which a signal ends only inside `abandonable` or by `check`.

    save: called then, before anything is closed.
    """
    try:
        with _mode(is_looping=True, is_waiting=True):
            yield
    except Interrupted as error:
        save()
        _close_soon(error)
        raise


@contextlib.contextmanager
def abandonable() -> Iterator[None]:
    """What is done inside changes nothing that is saved, so a signal may end it at any point.

    Raises:
        Interrupted: also for a signal that has come before.
    """
    if _state.has_several and _state.is_looping:
        yield
        return
    with _mode(is_looping=_state.is_looping, is_waiting=False):
        check()
        yield


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """What is done inside must not end anywhere: a signal is raised at its end, or by `check`."""
    is_waiting = _state.is_waiting
    with _mode(is_looping=_state.is_looping, is_waiting=True):
        yield
    if _is_main_thread() and not is_waiting:
        check()


def received() -> int | None:
    """The signal that has come, if one has."""
    return _state.received


def check() -> None:
    """Raises Interrupted if a signal has come. Any thread may call it where it can be abandoned."""
    if _state.received is not None:
        raise Interrupted(_state.received)


def set_several() -> None:
    """This process is one of a job's several."""
    _state.has_several = True


@contextlib.contextmanager
def _mode(*, is_looping: bool, is_waiting: bool) -> Iterator[None]:
    """Only of the main thread, where signals are handled."""
    if not _is_main_thread():
        yield
        return
    before = _state.is_looping, _state.is_waiting
    _state.is_looping, _state.is_waiting = is_looping, is_waiting
    try:
        yield
    finally:
        _state.is_looping, _state.is_waiting = before


def _on_signal(number: int, frame: object) -> None:
    now = time.monotonic()
    if _state.received is None:
        _state.received, _state.received_s = number, now
        error = Interrupted(number)
        if not _state.is_looping:
            _close_soon(error)
        if not _state.is_waiting:
            raise error
    elif now - _state.received_s > _SAME_S:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _close_soon(error: Interrupted) -> None:
    """From now on the process ends within _CLOSE_S, if it may; several have a launcher for that."""
    if _state.ends_process and not _state.has_several:
        signal.signal(signal.SIGALRM, partial(_leave, error))
        signal.setitimer(signal.ITIMER_REAL, _CLOSE_S)


def _leave(error: Interrupted, *_: object) -> None:
    what = f"without waiting for what did not end within {_CLOSE_S:.0f} s"
    os.write(2, f"rl-lora: {error}, {what}\n".encode())  # past locks that are held now
    os._exit(error.code)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
