"""Kills a command line in the middle of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def kill_9_at_line(command: Sequence[str], file: Path, wanted: int, cwd: Path) -> None:
    """Starts the command and kills it once the file has `wanted` lines, if it lives so long."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    while process.poll() is None and (
        not file.exists() or len(file.read_text().splitlines()) < wanted
    ):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
