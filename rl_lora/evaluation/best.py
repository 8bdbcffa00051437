"""The best policy of a run by its held-out evaluation, kept beside the last one.

    RUN/best/             the adapter (or the full weights), as in RUN/adapter
    RUN/best/choice.json  the evaluation and the step that chose it

The directory is replaced whole. It is a copy of its own: pruning adapters or checkpoints does not
touch it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from rl_lora.errors import UserError
from rl_lora.evaluation.scores import load_result
from rl_lora.storage.directories import atomic_directory, recover_directory
from rl_lora.storage.jsonl import write_json

FOLDER = "best"
BEST_FILE = "choice.json"


@dataclass(frozen=True, slots=True)
class BestCheckpoint:
    """Which policy is the best so far, and by what.

    Example: BestCheckpoint(step=10, evaluation="step_000010", accuracy=0.27, low=0.21, high=0.335,
    num_problems=200, num_samples=1)
    """

    step: int  # also the adapter's version
    evaluation: str  # name of the evaluation in RUN/eval
    accuracy: float
    low: float
    high: float
    num_problems: int
    num_samples: int


def best_evaluation(run_folder: Path, last_step: int) -> BestCheckpoint | None:
    """The evaluation with the highest accuracy of the steps up to last_step, the earliest on ties.

    None where no evaluation was held.
    """
    best: BestCheckpoint | None = None
    for path in sorted((run_folder / "eval").glob("step_[0-9]*.json")):
        result = load_result(path)
        if result.step is None or result.step > last_step:
            continue
        if best is None or result.accuracy > best.accuracy:
            total = result.total
            best = BestCheckpoint(
                step=result.step,
                evaluation=path.stem,
                accuracy=total.accuracy,
                low=total.accuracy_low,
                high=total.accuracy_high,
                num_problems=total.num_problems,
                num_samples=total.num_samples,
            )
    return best


def read_best(run_folder: Path) -> BestCheckpoint | None:
    """What is in RUN/best; None where there is nothing.

    A replacement that a kill cut short is made good.

    Raises:
        UserError: the record is damaged.
    """
    final = run_folder / FOLDER
    recover_directory(final)
    path = final / BEST_FILE
    if not path.is_file():
        return None
    try:
        return BestCheckpoint(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {final} to go on") from error


def keep_best(run_folder: Path, adapter_dir: Path, step: int) -> BestCheckpoint | None:
    """Puts the policy of `step` in RUN/best if its evaluation is the run's best; returns that
    choice.

    Args:
        run_folder: the run's folder, with its evaluations up to this step.
        adapter_dir: the published version of the step.
        step: steps done.

    Returns:
        what is new in RUN/best; None where nothing changed.
    """
    best, kept = best_evaluation(run_folder, step), read_best(run_folder)
    if best is None or best.step != step or best == kept:
        return None
    with atomic_directory(run_folder / FOLDER, is_durable=True) as scratch:
        shutil.copytree(adapter_dir, scratch, dirs_exist_ok=True)
        write_json(scratch / BEST_FILE, asdict(best))
    return best


def drop_best_after(run_folder: Path, step: int) -> bool:
    """Deletes RUN/best if it is of a later step, which is going to be run again."""
    kept = read_best(run_folder)
    if kept is None or kept.step <= step:
        return False
    shutil.rmtree(run_folder / FOLDER)
    return True
