"""`rl-lora ...` with faults: a rank is killed, hangs or fails where it enters a function.

    python -m tests.helpers.faulty_job '1 rl_lora.train:publish 2 kill' train smoke ...

Starts by the launcher are separated by ";", the faults of one start by ",". A start without a fault
is an ordinary run. Figures are left out, as they take longer than such runs.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from importlib import import_module
from typing import Any

from rl_lora.cli import main
from rl_lora.errors import UserError
from rl_lora.launchers import interruption


def inject(rank: int, where: str, call: int, how: str) -> None:
    """Makes this process fail at a call of a function, if it is that rank.

    Args:
        rank: which one.
        where: "module:function" or "module:Class.method", as its caller looks it up.
        call: which call, from 1 on.
        how: "kill" (SIGKILL), "hang", "mistake" (a UserError) or "defect" (another error);
            "signal" (SIGTERM to this rank only), or "cancel" (to the launcher, whose own to the
            rank is waited for). "setting": `where` is one, which only this rank has.
    """
    if int(os.environ["RANK"]) != rank:
        return
    if how == "setting":
        sys.argv.append(where)
        return
    module, _, path = where.partition(":")
    owner: Any = import_module(module)
    *classes, name = path.split(".")
    for one in classes:
        owner = getattr(owner, one)
    original, calls = getattr(owner, name), itertools.count(1)

    def faulty(*arguments: Any, **options: Any) -> Any:
        if next(calls) == call:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "hang":
                threading.Event().wait()
            elif how == "mistake":
                raise UserError("made to fail")
            elif how == "defect":
                raise RuntimeError("made to fail")
            elif how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            elif how == "cancel":
                os.kill(os.getppid(), signal.SIGTERM)
                while interruption.received() is None:
                    time.sleep(0.01)
        return original(*arguments, **options)

    setattr(owner, name, faulty)


if __name__ == "__main__":
    import rl_lora.train

    rl_lora.train.draw_figures = lambda run_folder: []
    faults = sys.argv[1].split(";")
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for fault in filter(str.strip, faults[start].split(",") if start < len(faults) else []):
        number, place, nth, kind = fault.split()
        inject(int(number), place, int(nth), kind)
    sys.exit(main(sys.argv[2:]))
