"""A learner's whole state in one checkpoint, and back: what supervised and RL runs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rl_lora.checkpoint import (
    flatten_optimizer,
    load_checkpoint,
    prune,
    restore_optimizer,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from rl_lora.config import RunSection, Section
from rl_lora.errors import UserError
from rl_lora.learner import Learner

# What may differ when a run is resumed: it changes what is written or how long, not the path.
FREE_KEYS = frozenset(
    {"num_steps", "output_dir", "eval_every", "checkpoint_every", "keep_last", "name"}
    | {"transcripts_per_step", "loggers"}
)


def save_snapshot(
    folder: Path, step: int, learner: Learner, config: Section, run: RunSection, **more: Any
) -> None:
    """One atomic checkpoint of policy, optimizer, every RNG and `more`; the older ones pruned."""
    policy = {f"policy/{n}": t for n, t in learner.policy.published_tensors().items()}
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
    save_checkpoint(folder, step, policy | optimizer | rng_tensors, state)
    prune(folder, run.keep_last)


def load_snapshot(path: Path, learner: Learner, config: Section) -> dict[str, Any]:
    """Gives learner and RNGs a checkpoint's state; returns the whole state (`step` and the rest).

    Raises:
        UserError: it is broken, or of a job that differs in more than its length.
    """
    tensors, state = load_checkpoint(path)
    check_same_settings(state["config"], config.model_dump(mode="json"), path)
    policy = {n.removeprefix("policy/"): t for n, t in tensors.items() if n[:7] == "policy/"}
    learner.policy.load_tensors(policy)
    restore_optimizer(learner.optimizer, tensors, state["optimizer"])
    restore_rng(tensors, state["rng"])
    learner.num_updates_done = state["num_updates"]
    return state


def check_same_settings(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Raises UserError naming the first setting in which a checkpoint's job differs."""
    for section, values in new.items():
        for key, value in values.items():
            was = old.get(section, {}).get(key)
            if was != value and not (section == "run" and key in FREE_KEYS):
                raise UserError(
                    f"{path} is of a job with {section}.{key}={was!r}, this one has {value!r}; "
                    "take another run.name, or the old setting"
                )
