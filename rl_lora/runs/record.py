"""run.json: what a run was made with, and whether a checkpoint belongs to the job at hand."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.config import ResourcesSection, RunConfig, SomeSection, with_present_names
from rl_lora.errors import UserError
from rl_lora.runs.inputs import absolute_model, absolute_source
from rl_lora.runs.log import RECORD_FILE
from rl_lora.runs.machine import environment
from rl_lora.storage import jsonl

if TYPE_CHECKING:
    from rl_lora.config.sft import SftConfig
    from rl_lora.policy import Policy

FORMAT = 2  # of the files in a run folder

# What may differ when a run is resumed: it changes how long it is and what is written, not the
# policy at each step.
_FREE_KEYS = {
    "run": set(
        "num_steps output_dir eval_every checkpoint_every keep_last transcripts_per_step loggers "
        "name process_timeout_s".split()
    ),
    "model": {"released", "shard"},
    "sampling": {"max_restarts", "memory_fraction", "timeout_s"},
    "algorithm": {"max_kl_to_base"},
    "optim": {"max_nonfinite_steps"},
    "eval": {"chunk_samples"},
    "resources": set(ResourcesSection.model_fields),
}


def write_record(config: RunConfig | SftConfig, policy: Policy, inputs: dict[str, Any]) -> None:
    """Writes settings, versions, which process writes to the folder, and `inputs`: {"base": ...,
    "data": {"train": ..., "eval": ...}} as in `rl_lora.runs.inputs`."""
    record = {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "environment": environment(),
        "base_model": inputs["base"],
        "data": inputs["data"],
        "dtype": str(policy.dtype),
        "trainable_parameters": sum(p.numel() for p in policy.trainable().values()),
        "process": {"pid": os.getpid(), "host": platform.node(), "started": time.time()},
    }
    jsonl.write_json(config.run.folder / RECORD_FILE, record)


def read_record(
    folder: Path, fix: str = "start again under another run.name, or delete it"
) -> dict[str, Any]:
    """The run's record; `fix` says what to do with one of another version.

    Raises:
        UserError: the folder has no record, a damaged one, or one of another format.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no {RECORD_FILE}")
    record = jsonl.read_json(path)
    found = record.get("format", 1)
    if found == 1:
        raise UserError(
            f"{folder} was made by an earlier version: its metrics rollouts/age_* are called "
            'rollouts/staleness_* now, and "exam" in its evaluation files is "evaluation"; '
            f"{fix}"
        )
    if found != FORMAT:
        raise UserError(
            f"{folder} was made by a later version (format {found}, this one reads {FORMAT}); "
            f"update rl-lora, or {fix}"
        )
    return record | {"config": with_present_names(record.get("config", {}))}


def check_same_job(
    old: dict[str, Any], config: RunConfig | SftConfig, path: Path, dtype: str
) -> None:
    """Raises UserError naming the first setting in which a checkpoint's job differs.

    A key that the checkpoint lacks counts as its default; a file or folder may be named by another
    path; model.dtype="auto" counts as `dtype`, what the checkpoint's job computes in.
    """
    old = with_present_names(old)
    new, default = config.model_dump(mode="json"), type(config)().model_dump(mode="json")
    for section, values in new.items():
        if not isinstance(values, dict):
            continue
        for key, value in values.items():
            was = old.get(section, {}).get(key, default[section][key])
            if (section, key) == ("model", "dtype"):
                was, value = (dtype if one == "auto" else one for one in (was, value))
            is_same = was == value or _by_path(section, was) == _by_path(section, value)
            if not is_same and key not in _FREE_KEYS.get(section, ()):
                raise UserError(
                    f"{path} belongs to a job with {section}.{key}={was!r}, this one has "
                    f"{value!r}; choose another run.name, or the old setting"
                )


def with_absolute_paths(config: SomeSection) -> SomeSection:
    """The job with absolute paths of its data and model, so that its record and adapters can be
    used from another working directory."""
    raw = config.model_dump()
    raw["model"]["name"] = absolute_model(raw["model"]["name"])
    for key in ("train", "eval"):
        raw["data"][key] = _by_path("data", raw["data"][key])
    if raw["data"].get("pass_rates"):
        raw["data"]["pass_rates"] = absolute_source(raw["data"]["pass_rates"])
    return type(config).model_validate(raw)


def with_dtype(config: SomeSection, dtype: str) -> SomeSection:
    """The job with model.dtype="auto" replaced by `dtype`, e.g. "float32"."""
    raw = config.model_dump()
    if raw["model"]["dtype"] == "auto":
        raw["model"]["dtype"] = dtype
    return type(config).model_validate(raw)


def _by_path(section: str, value: Any) -> Any:
    """A setting of `model` or `data`, its files and folders as absolute paths."""
    if section == "model" and isinstance(value, str):
        return absolute_model(value)
    if section == "data" and isinstance(value, list | tuple):
        return [{**source, "name": absolute_source(source["name"])} for source in value]
    return value
