"""A run's records: metrics.jsonl, transcripts.jsonl, and trackers behind one interface.

metrics.jsonl is the record of truth: a line is written before any tracker receives it. On resume,
the lines of steps that will run again are cut.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO

from rl_lora import distributed
from rl_lora.errors import UserError
from rl_lora.storage import jsonl
from rl_lora.storage.directories import writing_to

if TYPE_CHECKING:  # a reader of the files needs no torch
    from rl_lora.types import Rollout, RolloutGroup

RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
TRANSCRIPTS_FILE = "transcripts.jsonl"
# What sends a step's numbers to TensorBoard, Weights & Biases or trackio, and what closes it.
Tracker = tuple[Callable[[int, Mapping[str, float]], None], Callable[[], object]]


class RunLog:
    """Writes a run's records; a context manager. Of a job's processes only rank 0 writes.

    Args:
        run_folder: made if needed.
        loggers: "tensorboard", "wandb", "trackio".
        transcripts_per_step: rollouts kept per step; 0: no transcripts.
        resume_step: the checkpoint's step: lines of later steps are cut; -1 cuts all. None: a new
            run.
        config: the run's settings, for trackers that show them.
        metrics_file: replaces metrics.jsonl for a stage that counts its own steps.

    Raises:
        UserError: the folder cannot be written, a new run finds an older run's records, or a
            tracker's package is not installed.
    """

    def __init__(
        self,
        run_folder: Path,
        loggers: Sequence[str] = (),
        transcripts_per_step: int = 0,
        *,
        resume_step: int | None = None,
        config: Mapping[str, Any] | None = None,
        metrics_file: str = METRICS_FILE,
    ) -> None:
        self._last_step: int | None = None
        self._trackers: list[Callable[[int, Mapping[str, float]], None]] = []
        self._open = contextlib.ExitStack()  # closes all, even if a full disk stops one
        self._metrics: TextIO | None = None
        self._transcripts: TextIO | None = None
        if not distributed.is_main():
            return
        self._transcripts_per_step = transcripts_per_step
        self._metrics_path = metrics_path = run_folder / metrics_file
        transcripts_path = run_folder / TRANSCRIPTS_FILE
        modules = {logger: _tracker_module(logger) for logger in loggers}
        with writing_to(run_folder):
            run_folder.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                self._last_step = jsonl.cut_after(metrics_path, resume_step)
                if transcripts_per_step:
                    jsonl.cut_after(transcripts_path, resume_step)
            elif metrics_path.exists() and metrics_path.stat().st_size > 0:
                raise UserError(
                    f"{metrics_path} holds an older run: add --resume, choose another run.name, "
                    f"or delete {run_folder}"
                )
            self._metrics = self._open.enter_context(metrics_path.open("a", encoding="utf-8"))
            if transcripts_per_step:
                file = transcripts_path.open("a", encoding="utf-8")
                self._transcripts = self._open.enter_context(file)
        for logger, module in modules.items():
            start, *_ = _TRACKERS[logger]
            log, close = start(module, run_folder, dict(config or {}), resume_step)
            self._trackers.append(log)
            self._open.callback(close)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one step's line, {"step": step, ...}; NaN and infinities become null.

        Numbers may be numpy's or torch's.

        Raises:
            ValueError: the step does not come after the last one written.
            UserError: the file has been deleted, and later steps would be lost.
        """
        if self._metrics is None:
            return
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} is not after step {self._last_step}, already written")
        self._last_step = step
        metrics = _plain(metrics)
        self._metrics.write(jsonl.to_line({"step": step, **metrics}))
        self._metrics.flush()
        if not _is_open_at(self._metrics_path, self._metrics):
            raise UserError(
                f"{self._metrics_path} was deleted or replaced while the run wrote to it; start "
                "again under another run.name"
            )
        self.track(step, metrics)

    def has_line(self, step: int) -> bool:
        """Whether this step's line is the last one written. All of a job's processes call it."""
        return distributed.from_main(lambda: self._last_step == step, "the records")

    def track(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends numbers only to the trackers, for steps whose line has none of them.

        These are the evaluations before the first step and after the last, recorded in RUN/eval.
        """
        for log in self._trackers:
            log(step, metrics)

    def transcripts(self, step: int, groups_N: Sequence[RolloutGroup]) -> None:
        """Appends up to transcripts_per_step rollouts, correct and wrong ones."""
        if self._transcripts is None:
            return
        for group, rollout in pick_transcripts(groups_N, self._transcripts_per_step):
            completion, score = rollout.completion, rollout.score
            record = {
                "step": step,
                "prompt_id": group.prompt.prompt_id,
                "source": group.prompt.source,
                "question": group.prompt.question,
                "reference": group.prompt.reference,
                "completion": completion.text,
                **score.to_row(),
                "tokens": completion.num_sampled,
                "truncated": completion.is_truncated,
                "adapter_version": completion.adapter_version,
                **({"left_out": group.left_out} if group.left_out else {}),
            }
            if completion.episode is not None:
                record["turns"] = completion.episode.texts
            self._transcripts.write(jsonl.to_line(record))
        self._transcripts.flush()

    def close(self) -> None:
        """Closes files and trackers; a second call does nothing."""
        self._open.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _plain(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    return {
        key: value if isinstance(value, int | float) else float(value)
        for key, value in metrics.items()
    }


def stored(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics as JSON can hold them: NaN and infinities become None."""
    return dict(jsonl.storable(_plain(metrics)))


def unstored(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """What `stored` has returned as numbers; an infinity has become a NaN."""
    return {key: math.nan if value is None else value for key, value in metrics.items()}


def _is_open_at(path: Path, file: TextIO) -> bool:
    """Whether the path leads to the open file; a file that was deleted still takes lines."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def pick_transcripts(
    groups_N: Sequence[RolloutGroup], num: int
) -> list[tuple[RolloutGroup, Rollout]]:
    """Up to `num` rollouts of many prompts, half of them correct if there are enough.

    They are in the order of prompts and samples. The sample is not unbiased.
    """
    # First samples of all groups, then second samples, ...: prompts before repetitions.
    rollouts = sorted(
        (
            (sample, index, group, rollout)
            for index, group in enumerate(groups_N)
            for sample, rollout in enumerate(group.rollouts_G)
        ),
        key=lambda one: one[:2],
    )
    correct = [one for one in rollouts if one[3].score.correct]
    wrong = [one for one in rollouts if not one[3].score.correct]
    num_correct = min(len(correct), max((num + 1) // 2, num - len(wrong)))
    picked = correct[:num_correct] + wrong[: num - num_correct]
    return [one[2:] for one in sorted(picked, key=lambda one: (one[1], one[0]))]


# --- trackers -------------------------------------------------------------------------------------


def _tensorboard(
    module: ModuleType, run_folder: Path, _: dict[str, Any], resume_step: int | None
) -> Tracker:
    # Readers drop the events of steps that run again.
    purge_step = None if resume_step is None else resume_step + 1
    writer = module.SummaryWriter(str(run_folder / "tensorboard"), purge_step=purge_step)

    def log(step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log, writer.close


def _wandb(
    module: ModuleType, run_folder: Path, config: dict[str, Any], resume_step: int | None
) -> Tracker:
    """Weights & Biases; it reads WANDB_PROJECT, WANDB_MODE=offline and the like itself."""
    id_file = run_folder / "wandb_id"
    if not _is_resumed(resume_step) or not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    try:
        run = module.init(
            project=os.environ.get("WANDB_PROJECT", "rl-lora"),
            name=run_folder.name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_folder),
            config=config,
        )
    except module.Error as error:
        raise UserError(
            f"wandb failed to start ({error}); log in with `wandb login`, set "
            "WANDB_MODE=offline, or remove 'wandb' from run.loggers"
        ) from error
    # wandb's own step cannot go back, but a resumed run's may: ours is a metric and the x axis.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return lambda step, metrics: run.log({"step": step, **metrics}), run.finish


def _trackio(
    module: ModuleType, run_folder: Path, config: dict[str, Any], resume_step: int | None
) -> Tracker:
    """trackio; TRACKIO_PROJECT and TRACKIO_DIR say where to, as for its own tools."""
    module.init(
        project=os.environ.get("TRACKIO_PROJECT", "rl-lora"),
        name=run_folder.name,
        config=config,
        resume="allow" if _is_resumed(resume_step) else "never",
        embed=False,
    )
    return lambda step, metrics: module.log(dict(metrics), step=step), module.finish


def _is_resumed(resume_step: int | None) -> bool:
    return resume_step is not None and resume_step >= 0


# logger -> (what starts it, its module, what to install)
_TRACKERS: dict[str, tuple[Callable[..., Tracker], str, str]] = {
    "tensorboard": (_tensorboard, "torch.utils.tensorboard", "tensorboard"),
    "wandb": (_wandb, "wandb", "'rl-lora[wandb]'"),
    "trackio": (_trackio, "trackio", "'rl-lora[trackio]'"),
}


def _tracker_module(logger: str) -> ModuleType:
    _, name, package = _TRACKERS[logger]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"run.loggers has {logger!r}, whose package is not installed: pip install {package}, "
            f"or remove {logger!r} from run.loggers"
        ) from error
