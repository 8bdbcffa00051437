"""`rl-lora study`: the plan, the progress, and the table of best rates."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from rl_lora.commands.job_arguments import RERUN_HINT, add_overrides
from rl_lora.errors import UserError
from rl_lora.launchers.environment import is_launched

if TYPE_CHECKING:
    from rl_lora.report.terminal import Display
    from rl_lora.studies.config import StudyConfig
    from rl_lora.studies.plan import Estimate

# Of a plateau, in the result's unit: nats per token, or reward.
PLATEAU_TOLERANCE = {"sft": 0.02, "rl": 0.05}
EXAMPLES = (
    "rl-lora study study_rl_rank --dry-run",
    "rl-lora study study_rl_rank study.seeds=[0,1]",
    "rl-lora study study_rl_rank --table",
    "rl-lora study study_rl_rank --retry",
    "rl-lora report runs/studies/rl_rank --study",
)
AFTER_INTERRUPT = RERUN_HINT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "config",
        type=Path,
        metavar="CONFIG",
        help="a TOML file, or a shipped study's name, e.g. study_rl_rank",
    )
    add_overrides(parser, example="study.seeds=[0,1]")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the cells and estimates of time and memory, then stop",
    )
    parser.add_argument("--retry", action="store_true", help="run crashed cells again")
    parser.add_argument("--table", action="store_true", help="print the results so far, then stop")


# limits: the plan, then the run, step by step
def run(arguments: argparse.Namespace) -> int:
    """Runs or plans a study, or prints its results. Raises UserError for bad settings."""
    from rl_lora.report.terminal import Display
    from rl_lora.studies.config import load_study
    from rl_lora.studies.results import read_table

    study, display = load_study(arguments.config, arguments.overrides), Display()
    if arguments.table:
        _print_results(display, study, read_table(study.folder))
        return 0
    if is_launched():
        raise UserError(
            "a study starts its cells' processes itself, and a launcher has started this one (it "
            "has set RANK or WORLD_SIZE): start it in one process, without the launcher; "
            "study.processes_per_cell divides each cell among several"
        )
    from rl_lora.studies.run import run_study, study_lock

    if not arguments.dry_run:
        with study_lock(study) as taken_over:  # checked before the calibration, which takes a while
            if taken_over is not None:
                display.note(taken_over)
    plan = _plan(display, study, retry=arguments.retry)
    if arguments.dry_run:
        return 0
    rows = run_study(
        study,
        retry=arguments.retry,
        on_row=lambda row, done, total: display.note(row_line(row, done, total)),
        peak_mb=plan.peak_mb or None,
    )
    _print_results(display, study, rows)
    return 0


def _plan(display: Display, study: StudyConfig, *, retry: bool) -> Estimate:
    """Prints the cells left to run and their estimated time and memory."""
    from rl_lora.report.tables import seconds_text
    from rl_lora.runs.checkpoint import checkpoint_steps
    from rl_lora.runs.record import read_record
    from rl_lora.studies.plan import calibrate, estimate
    from rl_lora.studies.run import all_cells, finished_rows, pending_cells

    rows = finished_rows(study)
    if retry:
        rows = [row for row in rows if row["status"] != "crashed"]
    cells = all_cells(study, rows)
    left = pending_cells(cells, {row["cell"] for row in rows})
    for cell in left:
        run_folder = study.folder / "cells" / cell.key
        if checkpoint_steps(run_folder):  # an earlier version's run cannot be resumed
            read_record(run_folder, fix="delete it, and the cell starts again")
    display.note(f"{study.study.name}: {len(cells)} cells, {len(left)} to run; in {study.folder}")
    _make_models(display, left)
    timings = calibrate(study, left, rows)
    plan = estimate(study, left, rows, timings)
    display.table(plan_table(cells, left, rows, timings))
    rounds, per_cell = study.study.refine_rounds, study.study.processes_per_cell
    at_once = f"{plan.slots}" if per_cell == 1 else f"{plan.slots} x {per_cell}"
    where = " on the GPUs" if plan.has_gpus else ""
    display.note(
        f"about {seconds_text(plan.seconds)} for {len(left)} cells on {at_once} processes at once"
        f"{where}, {plan.peak_mb / 1e3:.1f} GB of memory each"
        + (f"; plus {rounds} round(s) of refined rates" if rounds else "")
    )
    return plan


def _make_models(display: Display, cells: Sequence[Any]) -> None:
    """Fetches or makes the models first, so that no two cells do, and none is timed with it."""
    from rl_lora.models.resolve import is_at_hand, resolve_model

    for name, model in {cell.config.model.name: cell.config.model for cell in cells}.items():
        if not is_at_hand(name):
            display.note(f"model {name}: fetched or made once, then kept; a minute or so")
            resolve_model(model)


def _print_results(display: Display, study: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    from rl_lora.studies.results import TABLE_FILE

    display.table(best_table(study.study.arm, rows))
    failed = [row for row in rows if row["error"]]
    for row in failed[:10]:
        display.note(f"{row['status']}: {row_text(row)}: {row['error']}")
    if num_crashed := sum(row["status"] == "crashed" for row in failed):
        refined = ", and refines their sweeps then" if study.study.refine_rounds else ""
        display.note(f"--retry runs the {num_crashed} crashed cells again{refined}")
    display.note(f"the table is {study.folder / TABLE_FILE}")


def plan_table(
    cells: Sequence[Any],
    left: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    timings: Mapping[str, Any],
) -> Table:
    """A row per condition: rates, cells, how many are left, seconds per cell."""
    from rl_lora.studies.plan import cell_seconds
    from rl_lora.studies.results import condition_text

    table = Table("condition", "rates", "cells", "left", "s per cell")
    left_keys = {cell.key for cell in left}
    for condition in dict.fromkeys(cell.condition for cell in cells):
        some = [cell for cell in cells if cell.condition == condition]
        rates = sorted({cell.config.optim.lr for cell in some})
        span = (
            f"{rates[0]:g} to {rates[-1]:g} ({len(rates)})" if len(rates) > 1 else f"{rates[0]:g}"
        )
        seconds = cell_seconds(some[0], rows, timings)
        table.add_row(
            condition_text(condition, with_batch=True),
            span,
            str(len(some)),
            str(sum(cell.key in left_keys for cell in some)),
            f"{seconds:.1f}" if seconds else "?",
        )
    return table


def best_table(arm: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row per condition: best rate and result with intervals, plateau, cells, failed cells."""
    from rl_lora.studies.rate_sweep import sweep
    from rl_lora.studies.results import GOALS, condition_of, condition_text, results_by_rate

    what = "reward at the end" if arm == "rl" else "test loss, nats per token"
    columns = ("condition", "best rate", "result", "plateau, decades", "cells", "failed")
    table = Table(*columns, title=f"Best rates ({what}; 95% intervals)")
    for condition, by_rate in results_by_rate(rows).items():
        own = [row for row in rows if condition_of(row) == condition]
        failed = sum(row["status"] != "done" for row in own)
        result = sweep(by_rate, GOALS[arm], tolerance=PLATEAU_TOLERANCE[arm])
        found = ["-", "-", "-"]
        if result is not None:
            edge = " (grid's end)" if result.is_at_edge else ""
            found = [
                f"{result.best_rate:.3g} ({result.rate_low:.3g} to {result.rate_high:.3g}){edge}",
                f"{result.best_value:.4f} ({result.value_low:.4f} to {result.value_high:.4f})",
                f"{result.plateau_decades:.2f}",
            ]
        name = condition_text(condition, with_batch=True)
        table.add_row(name, *found, str(len(own)), str(failed))
    return table


def row_line(row: Mapping[str, Any], done: int, total: int) -> str:
    """Example: "3/24  rank 8 batch 32  rate 0.001  seed 0: done, 0.31 to 0.512, 31 s"."""
    result = "" if row["result"] is None else f", {row['start']:.4g} to {row['result']:.4g}"
    return f"{done}/{total}  {row_text(row)}: {row['status']}{result}, {row['seconds']:.0f} s"


def row_text(row: Mapping[str, Any]) -> str:
    """Example: "rank 8 batch 32  rate 0.001  seed 0"."""
    from rl_lora.studies.results import condition_of, condition_text

    name = condition_text(condition_of(row), with_batch=True)
    return f"{name}  rate {row['lr']:g}  seed {row['seed']}"
