"""What the processes of a job must have in common before the first step: settings, model, data."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora import distributed
from rl_lora.errors import UserError

if TYPE_CHECKING:
    from rl_lora.config import RunConfig
    from rl_lora.config.sft import SftConfig


def check_processes(config: RunConfig | SftConfig) -> None:
    """Refuses processes that were started with different settings, or more of them than prompts.

    Raises:
        UserError: on all ranks.
    """
    check_same_settings(config)
    num_prompts = getattr(getattr(config, "sampling", None), "num_prompts", None)
    if num_prompts is not None and distributed.world_size() > num_prompts:
        raise UserError(
            f"{distributed.world_size()} processes for sampling.num_prompts={num_prompts}: each "
            f"needs a prompt; start {num_prompts} or fewer, or raise sampling.num_prompts"
        )


def check_same_settings(config: RunConfig | SftConfig) -> None:
    """Refuses processes that were started with different settings.

    Raises:
        UserError: on all ranks.
    """
    settings = {
        f"{section}.{key}": value
        for section, values in config.model_dump(mode="json").items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    for rank, other in enumerate(distributed.gather(settings, "the start")):
        for key, value in settings.items():
            if other.get(key) != value:
                raise UserError(
                    f"the processes were started with different settings: {key} is "
                    f"{settings[key]!r} on rank {distributed.rank()} and {other.get(key)!r} on "
                    f"rank {rank}; give all of them the same file and command"
                )


def check_shared_folder(folder: Path) -> None:
    """Refuses a run folder that not all processes can see; rank 0 has made it.

    Raises:
        UserError: on all ranks.
    """
    found = distributed.gather((folder.is_dir(), platform.node()), "the start")
    for rank, (is_there, host) in enumerate(found):
        if not is_there:
            raise UserError(
                f"rank {rank} on {host} does not see {folder}: set run.output_dir to a folder on a "
                "file system that all nodes share"
            )


def check_same_inputs(inputs: Mapping[str, Any]) -> None:
    """Refuses processes that have loaded different models or data.

    inputs: as they go into the run's record.

    Raises:
        UserError: on all ranks.
    """
    here = {key: value for key, value in inputs["base"].items() if key != "directory"}
    fix = "make the files of all nodes the same"
    distributed.check_same(here, "base model", fix)
    distributed.check_same(inputs["data"], "data", fix)
