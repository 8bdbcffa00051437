"""A learner's whole state in one checkpoint, and back: what supervised and RL runs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.checkpoint import (
    flatten_optimizer,
    load_checkpoint,
    prune,
    restore_optimizer,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from rl_lora.run_record import check_same_job

if TYPE_CHECKING:
    from rl_lora.config import RunConfig
    from rl_lora.learner import Learner
    from rl_lora.sft_config import SftConfig


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
    check_same_job(state["config"], config, path)
    policy = {n.removeprefix("policy/"): t for n, t in tensors.items() if n[:7] == "policy/"}
    learner.policy.load_tensors(policy)
    restore_optimizer(learner.optimizer, tensors, state["optimizer"])
    restore_rng(tensors, state["rng"])
    learner.num_updates_done = state["num_updates"]
    return state


def resume_step(checkpoint: Path | None, resume: bool) -> int | None:
    """The step whose records stay; -1 (none) for a run that was killed before its first one."""
    if checkpoint is None:
        return -1 if resume else None
    return int(checkpoint.name.split("_")[1])
