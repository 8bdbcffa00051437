"""run.json: what a run was made with, and whether a folder's run is the job that is asked for."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.config import RunConfig, SomeSection
from rl_lora.errors import UserError
from rl_lora.runs.inputs import absolute_model, absolute_source
from rl_lora.runs.machine import environment
from rl_lora.storage import jsonl

if TYPE_CHECKING:
    from rl_lora.config.sft import SftConfig
    from rl_lora.policy import Policy

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


def write_record(config: RunConfig | SftConfig, policy: Policy, inputs: dict[str, Any]) -> None:
    """The settings and the versions, so that the folder explains itself; and who writes to it.

    Args:
        config: the job.
        policy: its policy.
        inputs: {"base": ..., "data": {"train": ..., "eval": ...}} of `rl_lora.runs.inputs`.
    """
    record = {
        "config": config.model_dump(mode="json"),
        "environment": environment(),
        "base_model": inputs["base"],
        "data": inputs["data"],
        "dtype": str(policy.dtype),
        "trainable_parameters": sum(p.numel() for p in policy.trainable().values()),
        "process": {"pid": os.getpid(), "host": platform.node(), "started": time.time()},
    }
    jsonl.write_json(config.run.folder / RECORD_FILE, record)


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


def check_same_job(
    old: dict[str, Any], config: RunConfig | SftConfig, path: Path, dtype: str | None = None
) -> None:
    """Raises UserError naming the first setting in which a checkpoint's job differs.

    A key that the checkpoint does not have yet counts as its default; a file or folder is the same
    by whatever path; model.dtype="auto" is what it came to.

    Args:
        old: the settings of the checkpoint's job.
        config: the job that is to go on.
        path: the checkpoint's, for the message.
        dtype: that the checkpoint's job computes in, where it is known.
    """
    new, default = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    for section, values in new.items():
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            was = old.get(section, {}).get(key, default[section][key])
            if (section, key) == ("model", "dtype") and dtype is not None:
                was, value = (dtype if one == "auto" else one for one in (was, value))
            is_same = was == value or _by_path(section, was) == _by_path(section, value)
            if not is_same and key not in _FREE_KEYS.get(section, ()):
                raise UserError(
                    f"{path} is of a job with {section}.{key}={was!r}, this one has {value!r}; "
                    "take another run.name, or the old setting"
                )


def with_absolute_paths(config: SomeSection) -> SomeSection:
    """A job with its data files, folders and model directory as absolute paths.

    So its record can be read, and its adapters be loaded, from another working directory.
    """
    raw = config.model_dump()
    raw["model"]["name"] = absolute_model(raw["model"]["name"])
    for key in ("train", "eval"):
        raw["data"][key] = _by_path("data", raw["data"][key])
    return type(config).model_validate(raw)


def with_dtype(config: SomeSection, dtype: str) -> SomeSection:
    """A job that computes in `dtype` (e.g. "float32") where it leaves that open."""
    raw = config.model_dump()
    if raw["model"]["dtype"] == "auto":
        raw["model"]["dtype"] = dtype
    return type(config).model_validate(raw)


def _by_path(section: str, value: Any) -> Any:
    """A setting of `model` or `data` with names of files and folders as absolute paths."""
    if section == "model" and isinstance(value, str):
        return absolute_model(value)
    if section == "data" and isinstance(value, list | tuple):
        return [{**source, "name": absolute_source(source["name"])} for source in value]
    return value
