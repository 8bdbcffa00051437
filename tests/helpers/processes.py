"""Jobs of several real processes, started by a launcher as a user would, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.run_files import steady

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 300.0  # for a whole job on a busy machine; one that takes so long is a failure
LAUNCHERS = {
    "torchrun": ["torch.distributed.run"],
    # --multi_gpu: without GPUs it would start only one process.
    "accelerate": [
        "accelerate.commands.launch",
        *"--multi_gpu --num_machines 1 --mixed_precision no --dynamo_backend no".split(),
    ],
}
_MARK = "RL_LORA_TEST_JOB"  # in the environment of every process of a job


@dataclass(frozen=True)
class Job:
    """What a job left.

    Example: Job(code=1, codes={0: 3, 1: -9}, logs=Path("logs"), left=[], launcher="...")
    """

    code: int  # of the launcher
    codes: dict[int, int]  # of the ranks that failed at last, if it has failed; -9: SIGKILL
    logs: Path
    left: list[str]  # command lines of processes that were still there
    launcher: str  # what the launcher has printed

    def printed(self, rank: int, attempt: int = 0, stream: str = "stderr") -> str:
        """What a rank printed; attempt: how often the job had been restarted."""
        (path,) = self.logs.glob(f"*/attempt_{attempt}/{rank}/{stream}.log")
        return path.read_text()

    def lines(self, attempt: int = 0) -> list[tuple[int, str]]:
        """(rank, line) of our own lines about the end, as the command line prints them."""
        return [
            (rank, line.removeprefix("rl-lora: "))
            for rank in range(len(list(self.logs.glob(f"*/attempt_{attempt}/*"))))
            for line in self.printed(rank, attempt).splitlines()
            if line.startswith("rl-lora: ")
        ]


def launch(
    program: Sequence[str],
    logs: Path,
    num_processes: int = 2,
    *,
    launcher: str = "torchrun",
    max_restarts: int = 0,
    notices_s: float = 0.05,
) -> Job:
    """Runs a job to its end.

    Args:
        program: what each rank runs: "-m", module and arguments.
        logs: a new folder for what the ranks print.
        num_processes: how many ranks.
        launcher: of LAUNCHERS.
        max_restarts: how often the launcher starts all ranks again after a failure.
        notices_s: how often the launcher looks whether a rank has ended, and ends the others.

    Raises:
        TimeoutError: it does not end; it is killed.
    """
    mark = uuid.uuid4().hex
    size = "--nproc_per_node" if launcher == "torchrun" else "--num_processes"
    options = [size, str(num_processes), "--max_restarts", str(max_restarts)]
    options += ["--log_dir", str(logs), "--tee", "3", "--monitor_interval", str(notices_s)]
    command = [sys.executable, "-m", *LAUNCHERS[launcher], *options, *program]
    paths = os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, _MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            printed, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired as error:
            kill(processes_of(mark))
            printed, _ = process.communicate()
            raise TimeoutError(f"{command} did not end:\n{printed}") from error
    _, alive = psutil.wait_procs(processes_of(mark), timeout=10)
    left = [command_line(one) for one in alive]
    kill(alive)
    found = re.findall(r"rank\s+: (\d+) .*\n\s*exitcode\s+: (-?\d+)", printed)
    codes = {int(rank): int(code) for rank, code in found}
    return Job(process.returncode, codes, logs, left, printed)


def faulty(command: Sequence[str], faults: str = "") -> list[str]:
    """The program `rl-lora COMMAND` with the faults of tests/helpers/faulty_job.py."""
    return ["-m", "tests.helpers.faulty_job", faults, *command]


def result(run: Path, weights: str = "adapter_model.safetensors") -> dict[str, Any]:
    """What a run's history must not change: metrics but for the machine's, samples, adapter.

    weights: the name of the adapter's file.
    """
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    transcripts = run / "transcripts.jsonl"
    return {
        "metrics": [steady(row) for row in rows],
        "samples": transcripts.read_text() if transcripts.is_file() else "",
        "adapter": (run / "adapter" / weights).read_bytes(),
    }


def processes_of(mark: str) -> list[psutil.Process]:
    """The job's processes: launcher, ranks, and all that they have started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone, or another user's
            if process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return str(process)


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
