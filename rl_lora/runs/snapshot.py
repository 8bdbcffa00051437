"""A learner's whole state in one checkpoint, and back: what supervised and RL runs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.config import SomeSection
from rl_lora.errors import UserError
from rl_lora.runs.checkpoint import (
    checkpoint_steps,
    latest_checkpoint,
    load_checkpoint,
    prune,
    read_state,
    save_checkpoint,
)
from rl_lora.runs.inputs import check_base, check_data, data_difference
from rl_lora.runs.record import check_same_job, with_dtype
from rl_lora.runs.train_state import flatten_optimizer, restore_optimizer, restore_rng, rng_state

if TYPE_CHECKING:
    from rl_lora.config import RunConfig
    from rl_lora.config.sft import SftConfig
    from rl_lora.learner import Learner


def save_snapshot(step: int, learner: Learner, config: RunConfig | SftConfig, **more: Any) -> None:
    """One atomic checkpoint of policy, optimizer, every RNG and `more`; the older ones pruned."""
    policy = {f"policy/{n}": t for n, t in learner.policy.state_tensors().items()}
    optimizer, meta = flatten_optimizer(learner.optimizer)
    rng_tensors, rng = rng_state()
    state = {
        "step": step,
        "num_updates": learner.num_updates_done,
        "optimizer": meta,
        "rng": rng,
        "config": config.model_dump(mode="json"),
        **more,
    }
    save_checkpoint(config.run.folder, step, policy | optimizer | rng_tensors, state)
    prune(config.run.folder, config.run.keep_last)


def load_snapshot(path: Path, learner: Learner, config: RunConfig | SftConfig) -> dict[str, Any]:
    """Gives learner and RNGs a checkpoint's state; returns the whole state (`step` and the rest).

    Raises:
        UserError: it is broken, or of a job that differs in more than its length.
    """
    tensors, state = load_checkpoint(path)
    check_same_job(state["config"], config, path, recorded_dtype(state))
    policy = {n.removeprefix("policy/"): t for n, t in tensors.items() if n[:7] == "policy/"}
    learner.policy.load_tensors(policy)
    restore_optimizer(learner.optimizer, tensors, state["optimizer"])
    restore_rng(tensors, state["rng"])
    learner.num_updates_done = state["num_updates"]
    return state


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or at its first step.

    Example: Start(checkpoint=Path("runs/q/checkpoints/step_000012"), log_step=12, state={...})
    """

    checkpoint: Path | None
    log_step: int | None  # steps whose records stay; -1: none do; None: there must not be any
    state: dict[str, Any]  # the checkpoint's; empty without one

    def restarted(self, config: SomeSection) -> SomeSection:
        """The job with model.dtype="auto" as what it came to when the run began.

        On a CPU it is decided by a timing, which may come out otherwise now.
        """
        dtype = recorded_dtype(self.state)
        return config if dtype is None else with_dtype(config, dtype)

    def check_inputs(self, inputs: Mapping[str, Any], run: Path) -> None:
        """Raises UserError where base or data are others than the checkpoint's run began with."""
        if (old := self.state.get("inputs")) is not None:
            check_base(old["base"], inputs["base"], run)
            check_data(old["data"], inputs["data"], run)

    def has_other_data(self, part: str, inputs: Mapping[str, Any]) -> bool:
        """Whether the data of "train" or "eval" are others than the checkpoint's run began with."""
        old = self.state.get("inputs", {}).get("data", {}).get(part)
        return old is not None and data_difference(old, inputs["data"][part]) is not None


def recorded_dtype(state: Mapping[str, Any]) -> str | None:
    """What model.dtype came to in a checkpoint's run; None: an older one does not say."""
    dtype: str | None = state.get("inputs", {}).get("base", {}).get("dtype")
    return dtype


def find_start(config: RunConfig | SftConfig, *, resume: bool) -> Start:
    """The newest checkpoint with `resume`, else a new start in a folder without an older run.

    Raises:
        UserError: a run without `resume` finds another's checkpoints, or a run with it is of
            another job or has done more steps than it is to have.
    """
    run = config.run
    if not resume:
        if max(checkpoint_steps(run.folder), default=0):
            raise UserError(
                f"{run.folder} holds an older run: resume it, take another run.name, or delete it"
            )
        return Start(None, None, {})
    path = latest_checkpoint(run.folder)
    if path is None:
        return Start(None, -1, {})
    state = read_state(path)
    check_same_job(state["config"], config, path, recorded_dtype(state))
    step = int(state["step"])
    if step > run.num_steps:
        raise UserError(
            f"{run.folder} has done {step} steps, more than run.num_steps={run.num_steps}; set "
            f"run.num_steps={step} or more to resume it, or take another run.name"
        )
    return Start(path, step, state)
