"""run.json: what a run was made with, and whether a folder's run is the job that is asked for."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora import jsonl
from rl_lora.config import RunConfig
from rl_lora.errors import UserError
from rl_lora.job import environment

if TYPE_CHECKING:
    from rl_lora.policy import Policy
    from rl_lora.sft_config import SftConfig

RECORD_FILE = "run.json"

# What may differ when a run is resumed: it changes what is written or how long, not the path.
_FREE_KEYS = {
    "run": {
        "num_steps",
        "output_dir",
        "eval_every",
        "checkpoint_every",
        "keep_last",
        "transcripts_per_step",
        "loggers",
        "name",
    },
    "model": {"released"},
    "eval": {"chunk_samples"},
}


def write_record(config: RunConfig | SftConfig, policy: Policy, base_hash: str) -> None:
    """The settings and the versions, so that the folder explains itself; and who writes to it."""
    record = {
        "config": config.model_dump(mode="json"),
        "environment": environment(),
        "base_model": {"name": config.model.name, "fingerprint": base_hash},
        "dtype": str(policy.dtype),
        "trainable_parameters": sum(p.numel() for p in policy.trainable().values()),
        "process": {"pid": os.getpid(), "host": platform.node(), "started": time.time()},
    }
    path = config.run.folder / RECORD_FILE
    jsonl.write_text_atomically(path, json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """The run's record. Raises UserError where the folder has none, or a damaged one."""
    path = folder / RECORD_FILE
    if not path.is_file():
        raise UserError(f"{folder} is no run folder: it has no {RECORD_FILE}")
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from error
    return record


def check_same_job(old: dict[str, Any], config: RunConfig | SftConfig, path: Path) -> None:
    """Raises UserError naming the first setting in which a checkpoint's job differs.

    A key that the checkpoint does not have yet counts as its default.
    """
    new, default = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    for section, values in new.items():
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            was = old.get(section, {}).get(key, default[section][key])
            if was != value and key not in _FREE_KEYS.get(section, ()):
                raise UserError(
                    f"{path} is of a job with {section}.{key}={was!r}, this one has {value!r}; "
                    "take another run.name, or the old setting"
                )
