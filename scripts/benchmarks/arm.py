"""One arm of the benchmark in its own process: reads commands, writes JSON lines.

`python -m benchmarks.arm NAME` prints {"ready": ...} once it is built, then answers each line on
standard input (`step`, or a command of that arm) with one line, until `end`. A waiting arm uses no
CPU, so arms can take turns.
"""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from typing import Any

from benchmarks.probe import serve
from benchmarks.workload import Size


def main() -> None:
    """Builds the named arm at the size given as key=value arguments."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to standard error
    name, *options = sys.argv[1:]
    kinds: dict[str, Any] = {f.name: type(f.default) for f in fields(Size)}
    pairs = (option.split("=", 1) for option in options)
    size = Size(**{key: kinds[key](value) for key, value in pairs})
    if name == "trl":
        from benchmarks.trl_arm import run

        run(size, out)
    else:
        from benchmarks.our_arms import ARMS

        with ARMS[name](size) as (commands, ready):
            serve(commands, out, ready)


if __name__ == "__main__":
    main()
