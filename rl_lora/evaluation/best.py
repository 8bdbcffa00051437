"""Keeps a run's best policy, by held-out accuracy, next to its last one.

    RUN/best/            the adapter (or the full weights), as in RUN/adapter
    RUN/best/best.json   the evaluation and the step that chose it

The directory is replaced as a whole. It is a copy, which pruning adapters or checkpoints does not
touch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rl_lora import distributed
from rl_lora.errors import UserError
from rl_lora.evaluation.scores import load_result
from rl_lora.storage.directories import atomic_directory, recover_directory
from rl_lora.storage.jsonl import write_json

FOLDER = "best"
BEST_FILE = "best.json"
_RENAMED_FILE = "choice.json"  # of an earlier version, with "exam" for "evaluation"


@dataclass(frozen=True, slots=True)
class BestCheckpoint:
    """The best policy so far and the evaluation that chose it."""

    step: int  # also the adapter's version
    evaluation: str  # its name in RUN/eval
    accuracy: float
    low: float
    high: float
    num_problems: int
    num_samples: int


def best_evaluation(run_folder: Path, last_step: int) -> BestCheckpoint | None:
    """The most accurate evaluation of the steps up to last_step, the earliest if tied.

    None if there is no evaluation.
    """
    found = []
    for path in sorted((run_folder / "eval").glob("step_[0-9]*.json")):
        result = load_result(path)
        total = result.total
        if result.step is not None and result.step <= last_step:
            interval = (total.accuracy, total.accuracy_low, total.accuracy_high)
            sizes = (total.num_problems, total.num_samples)
            found.append(BestCheckpoint(result.step, path.stem, *interval, *sizes))
    return max(found, key=lambda one: one.accuracy, default=None)  # the first of equals


def is_best_step(run_folder: Path, step: int) -> bool:
    """Whether step's evaluation is the best so far. All of a job's processes call it."""
    best = distributed.from_main(lambda: best_evaluation(run_folder, step), "an evaluation")
    return best is not None and best.step == step


def read_best(run_folder: Path) -> BestCheckpoint | None:
    """The record of RUN/best; None if there is none.

    A replacement interrupted by a kill is rolled back.

    Raises:
        UserError: the record is damaged, or was written by an earlier version.
    """
    final = run_folder / FOLDER
    recover_directory(final)
    path = final / BEST_FILE
    if (final / _RENAMED_FILE).is_file() and not path.is_file():
        raise UserError(
            f"{final} was written by an earlier version ({_RENAMED_FILE} is {BEST_FILE} now, and "
            f'its "exam" is "evaluation"); delete {final} to continue'
        )
    if not path.is_file():
        return None
    try:
        return BestCheckpoint(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {final} to continue") from error


def keep_best(run_folder: Path, adapter_dir: Path, step: int) -> BestCheckpoint | None:
    """Copies the policy of `step`, published in adapter_dir, to RUN/best if its evaluation is the
    run's best; returns the new record of RUN/best, None if nothing changed."""
    best, kept = best_evaluation(run_folder, step), read_best(run_folder)
    if best is None or best.step != step or best == kept:
        return None
    with atomic_directory(run_folder / FOLDER, is_durable=True) as scratch:
        shutil.copytree(adapter_dir, scratch, dirs_exist_ok=True)
        write_json(scratch / BEST_FILE, asdict(best))
    return best


def update_best(run_folder: Path, step: int, on_note: Callable[[str], None]) -> None:
    """Copies the version of `step` to RUN/best if its evaluation is the best so far."""
    if not distributed.is_main():
        return
    best = keep_best(run_folder, run_folder / "adapters" / f"v{step:06d}", step)
    if best is not None and step:
        on_note(f"best so far: step {best.step}, accuracy {best.accuracy:.1%}")


def drop_best_after(run_folder: Path, step: int) -> bool:
    """Deletes RUN/best if it is from a later step, which is going to run again."""
    kept = read_best(run_folder)
    if kept is None or kept.step <= step:
        return False
    shutil.rmtree(run_folder / FOLDER)
    return True
