"""A run's records: metrics.jsonl first, transcripts.jsonl, and the trackers behind one interface.

JSONL is the record of truth: a line is on disk before any tracker hears of it. On resume the lines
of steps that are going to be run again are cut.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from rl_lora.errors import UserError
from rl_lora.storage import jsonl

if TYPE_CHECKING:  # a reader of the files needs no torch
    from rl_lora.types import Rollout, RolloutGroup

METRICS_FILE = "metrics.jsonl"
TRANSCRIPTS_FILE = "transcripts.jsonl"


class Tracker(Protocol):
    """What a tracker has to do."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes one step's numbers."""

    def close(self) -> None:
        """Flushes and ends the record."""


class RunLog:
    """Writes a run's records; a context manager.

    Args:
        run_folder: the run's folder, made if it is not there.
        loggers: "tensorboard", "wandb", "trackio".
        transcripts_per_step: rollouts kept a step; 0: no transcripts.
        resume_step: the step that the run goes on from (the checkpoint's): lines of later steps are
            cut, -1 cuts all. None: a new run.
        config: the run's settings, for the trackers that show them.
        metrics_file: another file than metrics.jsonl, for a stage with steps of its own.

    Raises:
        UserError: the folder cannot be written, a new run finds the records of an older one, or a
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
        self._transcripts_per_step = transcripts_per_step
        metrics_path = run_folder / metrics_file
        transcripts_path = run_folder / TRANSCRIPTS_FILE
        modules = {logger: _tracker_module(logger) for logger in loggers}
        self._last_step: int | None = None
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            if resume_step is not None:
                self._last_step = jsonl.cut_after(metrics_path, resume_step)
                if transcripts_per_step:
                    jsonl.cut_after(transcripts_path, resume_step)
            elif metrics_path.exists() and metrics_path.stat().st_size > 0:
                raise UserError(
                    f"{metrics_path} holds an older run: resume it, take another run.name, or "
                    f"delete {run_folder}"
                )
            self._metrics = metrics_path.open("a", encoding="utf-8")
            self._transcripts = (
                transcripts_path.open("a", encoding="utf-8") if transcripts_per_step else None
            )
        except OSError as error:
            raise UserError(
                f"run folder {run_folder} cannot be written ({error.strerror}); set run.output_dir "
                "to a folder that can"
            ) from error
        self._trackers: list[Tracker] = [
            _TRACKERS[logger](module, run_folder, dict(config or {}), resume_step)
            for logger, module in modules.items()
        ]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one step's line, {"step": step, ...}; NaN and infinities are written as null.

        Numbers may be of numpy or torch.

        Raises:
            ValueError: the step is not after the last one written.
        """
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(f"step {step} is not after step {self._last_step}, already written")
        self._last_step = step
        metrics = {
            key: value if isinstance(value, int | float) else float(value)
            for key, value in metrics.items()
        }
        self._metrics.write(jsonl.to_line({"step": step, **metrics}))
        self._metrics.flush()
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def track(self, step: int, metrics: Mapping[str, float]) -> None:
        """Numbers for the trackers alone, of a step that has or gets no line of its own.

        Such are the evaluations before the first step and after the last; their record is RUN/eval.
        """
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def transcripts(self, step: int, groups_N: Sequence[RolloutGroup]) -> None:
        """Appends up to transcripts_per_step rollouts, correct and wrong ones alike."""
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
                "reward": score.reward,
                "correct": score.correct,
                "has_format": score.has_format,
                "status": score.status,
                "answer": score.answer,
                "tokens": len(completion.token_ids),
                "truncated": completion.is_truncated,
                "adapter_version": completion.adapter_version,
            }
            self._transcripts.write(jsonl.to_line(record))
        self._transcripts.flush()

    def close(self) -> None:
        """Closes files and trackers; a second call does nothing."""
        trackers, self._trackers = self._trackers, []
        with contextlib.ExitStack() as stack:  # all of them, also where a full disk stops one
            for tracker in reversed(trackers):
                stack.callback(tracker.close)
            if self._transcripts is not None:
                stack.callback(self._transcripts.close)
            stack.callback(self._metrics.close)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pick_transcripts(
    groups_N: Sequence[RolloutGroup], num: int
) -> list[tuple[RolloutGroup, Rollout]]:
    """Up to `num` rollouts, half of them correct where there are enough, of many prompts.

    They come in the order of prompts and samples. This is no unbiased sample.
    """
    # First samples of all groups, then second samples, ...: prompts before repetitions.
    places = sorted(
        ((sample, index) for index, group in enumerate(groups_N) for sample in _samples(group)),
    )
    correct = [(s, i) for s, i in places if groups_N[i].rollouts_G[s].score.correct]
    wrong = [(s, i) for s, i in places if not groups_N[i].rollouts_G[s].score.correct]
    num_correct = min(len(correct), max((num + 1) // 2, num - len(wrong)))
    picked = correct[:num_correct] + wrong[: num - num_correct]
    return [
        (groups_N[index], groups_N[index].rollouts_G[sample])
        for index, sample in sorted((index, sample) for sample, index in picked)
    ]


def _samples(group: RolloutGroup) -> Iterator[int]:
    yield from range(len(group.rollouts_G))


# --- trackers -------------------------------------------------------------------------------------


class _TensorBoard:
    def __init__(
        self,
        module: ModuleType,
        run_folder: Path,
        config: dict[str, Any],
        resume_step: int | None,
    ) -> None:
        del config
        # Readers drop the events of steps that are run again.
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = module.SummaryWriter(str(run_folder / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Weights & Biases; WANDB_PROJECT, WANDB_MODE=offline and the like are its own to read."""

    def __init__(
        self,
        module: ModuleType,
        run_folder: Path,
        config: dict[str, Any],
        resume_step: int | None,
    ) -> None:
        id_file = run_folder / "wandb_id"
        if not _is_resumed(resume_step) or not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run = module.init(
                project=os.environ.get("WANDB_PROJECT", "rl-lora"),
                name=run_folder.name,
                id=id_file.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(run_folder),
                config=config,
            )
        except module.Error as error:
            raise UserError(
                f"wandb does not start ({error}); log in with `wandb login`, set "
                "WANDB_MODE=offline, or take 'wandb' out of run.loggers"
            ) from error
        # wandb's own step cannot go back, and a resumed run may: ours is a metric and the x axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """trackio; TRACKIO_PROJECT and TRACKIO_DIR say where, as for its own tools."""

    def __init__(
        self,
        module: ModuleType,
        run_folder: Path,
        config: dict[str, Any],
        resume_step: int | None,
    ) -> None:
        self._module = module
        module.init(
            project=os.environ.get("TRACKIO_PROJECT", "rl-lora"),
            name=run_folder.name,
            config=config,
            resume="allow" if _is_resumed(resume_step) else "never",
            embed=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._module.log(dict(metrics), step=step)

    def close(self) -> None:
        self._module.finish()


def _is_resumed(resume_step: int | None) -> bool:
    return resume_step is not None and resume_step >= 0


_TRACKERS: dict[str, Any] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
_MODULES = {  # logger -> (module, what to install)
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "'rl-lora[wandb]'"),
    "trackio": ("trackio", "'rl-lora[trackio]'"),
}


def _tracker_module(logger: str) -> ModuleType:
    if logger not in _MODULES:
        raise UserError(f"run.loggers: unknown logger {logger!r}; known: {', '.join(_MODULES)}")
    module_name, package = _MODULES[logger]
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"run.loggers names {logger!r}, whose package is not installed: pip install {package}, "
            f"or take {logger!r} out of run.loggers"
        ) from error
