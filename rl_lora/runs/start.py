"""Where a run starts: at its newest checkpoint, or at its first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.config import SomeSection
from rl_lora.errors import UserError
from rl_lora.runs.checkpoint import checkpoint_steps, latest_checkpoint, read_state
from rl_lora.runs.inputs import check_base, check_data, data_difference
from rl_lora.runs.log import RECORD_FILE
from rl_lora.runs.machine import environment
from rl_lora.runs.record import check_same_job, read_record, with_dtype

if TYPE_CHECKING:
    from rl_lora.config import RunConfig
    from rl_lora.config.sft import SftConfig


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Example: Start(checkpoint=Path("runs/q/checkpoints/step_000012"), log_step=12, state={...})
    """

    checkpoint: Path | None
    log_step: int | None  # last step whose records stay; -1: none stay; None: there must be none
    state: dict[str, Any]  # the checkpoint's; empty without one

    def keep_dtype(self, config: SomeSection) -> SomeSection:
        """The job with model.dtype="auto" replaced by the dtype that the run began with.

        On a CPU "auto" is decided by a timing, which may come out differently now.
        """
        return with_dtype(config, recorded_dtype(self.state)) if self.state else config

    def changed_versions(self) -> list[str]:
        """What computes now in another version than when the checkpoint was written, e.g. "torch
        2.12.0 then, 2.13.0 now"."""
        then, now = self.state.get("versions", {}), environment()
        names = [name for name in now if then.get(name, now[name]) != now[name]]
        return [f"{name} {then[name]} then, {now[name]} now" for name in names]

    def check_inputs(self, inputs: Mapping[str, Any], run: Path) -> None:
        """Raises UserError if base or data differ from what the checkpoint's run began with."""
        if self.state:
            old = self.state["inputs"]
            check_base(old["base"], inputs["base"], run)
            check_data(old["data"], inputs["data"], run)

    def has_other_data(self, part: str, inputs: Mapping[str, Any]) -> bool:
        """Whether "train" or "eval" differs from what the checkpoint's run began with."""
        old = self.state["inputs"]["data"] if self.state else inputs["data"]
        return data_difference(old[part], inputs["data"][part]) is not None


def recorded_dtype(state: Mapping[str, Any]) -> str:
    """The dtype that a checkpoint's run computes in, e.g. "float32"."""
    return str(state["inputs"]["base"]["dtype"])


def find_start(config: RunConfig | SftConfig, *, resume: bool) -> Start:
    """With `resume` the newest checkpoint, else a new start in a folder without an older run.

    Raises:
        UserError: without `resume`, the folder has an older run's checkpoints; with it, they belong
            to another job, have more steps than run.num_steps, or are an earlier version's.
    """
    run = config.run
    if not resume:
        if max(checkpoint_steps(run.folder), default=0):
            if (run.folder / RECORD_FILE).is_file():
                read_record(run.folder)  # an earlier version's run cannot be resumed
            raise UserError(
                f"{run.folder} holds an older run: add --resume, choose another run.name, or "
                "delete it"
            )
        return Start(None, None, {})
    path = latest_checkpoint(run.folder)
    if path is None:
        return Start(None, -1, {})
    read_record(run.folder)
    state = read_state(path)
    check_same_job(state["config"], config, path, recorded_dtype(state))
    step = int(state["step"])
    if step > run.num_steps:
        raise UserError(
            f"{run.folder} has done {step} steps, more than run.num_steps={run.num_steps}; set "
            f"run.num_steps={step} or more to resume it, or choose another run.name"
        )
    return Start(path, step, state)
