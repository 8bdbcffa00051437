"""One cell of a study, in its own process, or in the several of one job.

Several processes (`study.processes_per_cell`) are started by torch's elastic launcher, as by
`torchrun --standalone`, but forked from a server that has imported the libraries once. The cell's
own process is then the launcher. All of them end with the study.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rl_lora import distributed
from rl_lora.config import RunConfig
from rl_lora.errors import OtherProcessError, RunStoppedError, UserError
from rl_lora.launchers.environment import launched_rank
from rl_lora.launchers.interruption import Interrupted
from rl_lora.studies.config import Cell, JobConfig

PRELOADED = ["rl_lora.train", "rl_lora.sft.train"]  # by the servers that processes are forked from
Outcome = dict[str, str]  # {"error": what stopped the job, or "", "failure": "", nan or crashed}


def run_cell(cell: Cell, log: Path, environment: dict[str, str], sender: Connection) -> None:
    """Runs a cell's job to its end and sends its `Outcome`; what it prints goes to a log.

    The environment's variables are set before any device is used.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the study's to handle
    os.environ.update(environment)
    _end_with_parent()
    file = log.open("a", buffering=1, encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file.fileno(), stream.fileno())
    if cell.num_processes > 1:
        _launch(cell, sender)
        return
    try:
        sender.send(_run_job(cell.config))
    except Interrupted as error:  # the study ends, too
        print(error)
        sys.exit(error.code)


def _launch(cell: Cell, sender: Connection) -> None:
    """Runs the job in `cell.num_processes` processes."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as scratch:
        launch = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=cell.num_processes,
                run_id=cell.key,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",  # a free port
                local_addr="localhost",
                max_restarts=0,
                start_method="forkserver",
                logs_specs=DefaultLogsSpecs(log_dir=scratch),
            ),
            _run_rank,
        )
        try:
            launch(cell.config, sender)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            found: Any = failure.message  # a dict where the rank has recorded an exception
            text = found["message"] if isinstance(found, dict) else found
            sys.exit(f"rank {rank}: {text}")


def _run_rank(config: JobConfig, sender: Connection) -> None:
    """Runs one process of a job; rank 0 sends the outcome."""
    _end_with_parent()
    send = sender.send if launched_rank() == 0 else lambda outcome: None
    try:
        send(_run_job(config))
    except OtherProcessError as error:
        send({"error": str(error), "failure": "crashed"})
        raise  # so that the launcher ends a process that hangs
    finally:
        distributed.leave()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `tell` ignores it


def _run_job(config: JobConfig) -> Outcome:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from rl_lora.runs.inputs import ChangedInputsError

    try:
        if isinstance(config, RunConfig):
            from rl_lora.train import train

            train(config, resume=True, quiet=True)
        else:
            from rl_lora.sft.train import fine_tune

            fine_tune(config, resume=True, quiet=True)
    except FloatingPointError as error:
        return {"error": str(error), "failure": "nan"}
    except ChangedInputsError as error:
        fix = "restore it, or run the cell from its start with --retry"
        return {"error": f"{error.what}; {fix}", "failure": "crashed"}
    except (UserError, RunStoppedError) as error:
        return {"error": str(error), "failure": "crashed"}
    return {"error": "", "failure": ""}


def _end_with_parent() -> None:
    """Ends this process with its parent, so that no cell still runs when the study starts again."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
