"""Runs a study's cells as resumable processes, as many at once as the machine has room for.

A cell is one process, or `study.processes_per_cell`. On a CPU each process has `study.num_threads`
threads, and there are as many as the cores and the free memory allow; on GPUs there are
`study.num_per_gpu` per GPU, and a cell sees only its own GPUs (CUDA_VISIBLE_DEVICES). Processes are
forked from a server that has already imported the libraries. A cell that fails becomes a row like
the others. A study killed at any moment resumes: finished cells come from the table, unfinished
ones continue from their checkpoints.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from rl_lora.errors import UserError
from rl_lora.runs.lock import run_lock
from rl_lora.storage.directories import disk_errors
from rl_lora.studies.cell import PRELOADED, Outcome, run_cell
from rl_lora.studies.config import Cell, StudyConfig, cells_of
from rl_lora.studies.rate_sweep import refined_rates, sweep
from rl_lora.studies.results import (
    GOALS,
    TABLE_FILE,
    append_row,
    make_row,
    read_table,
    results_by_rate,
    write_table,
)

_HEAVY = ("checkpoints", "adapters", "adapter", "probe", "best", "tensorboard", "figures")
_SAVE_S = 15.0  # for cells to write checkpoints when the study is interrupted
_MEMORY_SHARE = 0.8  # of the free memory, for all processes together


# --- the queue ------------------------------------------------------------------------------------


@dataclass
class _Running:
    cell: Cell
    slot: int
    process: ForkServerProcess
    receiver: Connection
    log: Path
    started: float = field(default_factory=time.monotonic)

    def outcome(self) -> Outcome:
        """What the ended process sent; one that was killed sent nothing."""
        self.process.join()
        try:
            outcome: Outcome = self.receiver.recv()
        except EOFError:
            lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = f"{lines[-1][:300] if lines else 'no output'} (see {self.log.name})"
            error = f"exit code {self.process.exitcode}: {last}"
            outcome = {"error": error, "failure": "crashed"}
        return outcome


def num_slots(study: StudyConfig, peak_mb: float | None = None) -> tuple[int, bool]:
    """(cells at once, whether they run on GPUs).

    If the memory of one process is known, free memory limits their number too.

    Raises:
        UserError: fewer GPUs than a cell has processes.
    """
    import torch

    per_cell = study.study.processes_per_cell
    device = str(study.job.get("model", {}).get("device", "auto"))
    if device != "cpu" and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if num_gpus < per_cell:
            raise UserError(
                f"study.processes_per_cell = {per_cell}, and this machine shows {num_gpus} GPU(s), "
                f"one for each process: set it to {num_gpus} or less"
            )
        return num_gpus // per_cell * study.study.num_per_gpu, True
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    slots = max(1, cores // (study.study.num_threads * per_cell))
    if peak_mb:
        cell_bytes = peak_mb * 1e6 * per_cell
        fitting = int(_MEMORY_SHARE * psutil.virtual_memory().available / cell_bytes)
        slots = max(1, min(slots, fitting))
    return slots, False


def run_queue(
    study: StudyConfig,
    cells: Sequence[Cell],
    folder: Path,
    on_end: Callable[[Cell, float, Outcome], None],
    peak_mb: float | None = None,
) -> None:
    """Runs cells of a study in processes, as many at once as `num_slots` says.

    Calls on_end(cell, seconds, outcome) as each ends.
    """
    slots, has_gpus = num_slots(study, peak_mb)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    folder.mkdir(parents=True, exist_ok=True)
    if cells:  # the server imports the libraries with its first process, which is no cell
        first = context.Process(target=int)
        first.start()
        first.join()
    pending, free = deque(cells), deque(range(slots))
    running: list[_Running] = []
    try:
        while pending or running:
            while pending and free:
                cell, slot = pending.popleft(), free.popleft()
                variables = {
                    "OMP_NUM_THREADS": str(study.study.num_threads),
                    "CUDA_VISIBLE_DEVICES": _gpus(slot, cell.num_processes) if has_gpus else "",
                }
                running.append(_start(context, cell, slot, folder, variables))
            wait([one.process.sentinel for one in running])
            for ended in [one for one in running if not one.process.is_alive()]:
                running.remove(ended)
                free.append(ended.slot)
                on_end(ended.cell, time.monotonic() - ended.started, ended.outcome())
    finally:
        _end([one.process for one in running])


def _end(processes: Sequence[ForkServerProcess]) -> None:
    """Ends cells in the middle of their jobs; they have time to write checkpoints."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _SAVE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()


def _gpus(slot: int, num: int) -> str:
    """The slot's GPUs among those visible to this process, "4,5"; slots get them in turn."""
    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible or [str(index) for index in range(torch.cuda.device_count())]
    first = slot % (len(names) // num) * num
    return ",".join(names[first : first + num])


def _start(
    context: Any, cell: Cell, slot: int, folder: Path, variables: dict[str, str]
) -> _Running:
    run = cell.config.run.model_copy(update={"output_dir": str(folder), "name": cell.key})
    placed = replace(cell, config=cell.config.model_copy(update={"run": run}))
    log = folder / f"{cell.key}.log"
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_cell, args=(placed, log, variables, sender), name=cell.key)
    process.start()
    sender.close()
    return _Running(cell, slot, process, receiver, log)


# --- the study ------------------------------------------------------------------------------------


def pending_cells(cells: Sequence[Cell], done: set[str]) -> list[Cell]:
    """Cells that are not in the table, ordered by seed, so that early results cover every
    condition."""
    left = [cell for cell in cells if cell.key not in done]
    return sorted(left, key=lambda cell: cell.config.run.seed)  # stable: else in the grid's order


def refined_cells(study: StudyConfig, cells: Sequence[Cell], rows: Sequence[Any]) -> list[Cell]:
    """Cells at rates around each condition's best, by the rows of `cells`.

    A condition of which a cell has crashed is not refined yet: with the cell's result the best rate
    may be another one, and a study whose processes are killed would end with other cells.
    """
    keys = {cell.key for cell in cells}
    crashed = {row["cell"] for row in rows if row["status"] == "crashed"}
    waiting = {cell.condition for cell in cells if cell.key in crashed}
    table = results_by_rate([row for row in rows if row["cell"] in keys])
    further: dict[str, Cell] = {}
    for condition, by_rate in table.items():
        result = sweep(by_rate, GOALS[study.study.arm])
        if result is None or condition in waiting:
            continue
        some = {c.config.run.seed: c for c in cells if c.condition == condition}
        for rate in refined_rates(list(by_rate), result.best_rate):
            for cell in some.values():
                moved = cell.with_rate(rate)
                further.setdefault(moved.key, moved)
    return [cell for key, cell in further.items() if key not in keys]


def all_cells(study: StudyConfig, rows: Sequence[Any]) -> list[Cell]:
    """The grids' cells, and those of each refinement round whose earlier rounds are done."""
    cells = cells_of(study)
    done = {row["cell"] for row in rows}
    for _ in range(study.study.refine_rounds):
        if any(cell.key not in done for cell in cells):
            break
        cells += refined_cells(study, cells, rows)
    return cells


def run_study(
    study: StudyConfig,
    *,
    retry: bool = False,
    on_row: Callable[[dict[str, Any], int, int], None] = lambda row, done, total: None,
    peak_mb: float | None = None,
) -> list[dict[str, Any]]:
    """Runs the remaining cells of a study; returns the whole table.

    Crashed cells run again with `retry`. on_row is called with (row, cells done, cells known so
    far) as each cell ends; peak_mb is the memory of one cell, if known.

    Raises:
        UserError: another process is running this study, or the disk is full.
    """
    with disk_errors(study.folder), study_lock(study):
        rows = finished_rows(study)
        for row in rows:  # a kill may have come between the cell's row and this
            _drop_heavy(study.folder / "cells" / str(row["cell"]))
        if retry and rows:
            # Dropped from the table too, so that a retried cell that is killed can resume.
            rows = [row for row in rows if row["status"] != "crashed"]
            write_table(study.folder, rows)
        for _ in range(1 + study.study.refine_rounds):
            cells = all_cells(study, rows)
            left = pending_cells(cells, {row["cell"] for row in rows})

            def on_end(
                cell: Cell, seconds: float, outcome: Outcome, total: int = len(cells)
            ) -> None:
                run_folder, num = study.folder / "cells" / cell.key, study.study.final_steps
                row = make_row(cell, run_folder, num, seconds, **outcome)
                append_row(study.folder, row)
                _drop_heavy(run_folder)
                rows.append(row)
                on_row(row, len(rows), total)

            run_queue(study, left, study.folder / "cells", on_end, peak_mb)
    return rows


def finished_rows(study: StudyConfig) -> list[dict[str, Any]]:
    """The rows so far; none before the first cell ends."""
    return read_table(study.folder) if (study.folder / TABLE_FILE).is_file() else []


def _drop_heavy(run_folder: Path) -> None:
    """Deletes the large parts of a finished cell's run folder."""
    for name in _HEAVY:
        shutil.rmtree(run_folder / name, ignore_errors=True)


def study_lock(study: StudyConfig) -> AbstractContextManager[str | None]:
    """`run_lock` of the study's folder."""
    return run_lock(study.folder, what=f"the study in {study.folder}")
