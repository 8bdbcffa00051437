"""Checkpoints: one atomic directory each, with everything that a resumed run needs.

    RUN/checkpoints/step_000012/tensors.safetensors  policy and optimizer
    RUN/checkpoints/step_000012/state.json           step, data position, config, inputs, versions,
                                                     sha256s

A save writes a hidden directory, forces it to disk and renames it, so a kill at any moment leaves
the older checkpoints intact. A damaged or foreign checkpoint is skipped with a warning, and the
newest intact one is taken. Nothing is pickled, so loading a checkpoint cannot run code. The
states of the global random number generators are not stored, as no step draws from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rl_lora import distributed
from rl_lora.errors import UserError
from rl_lora.nn.sharded import gathered_on_main, sharded
from rl_lora.runs.machine import environment
from rl_lora.storage.directories import atomic_directory

if TYPE_CHECKING:
    from rl_lora.config import RunConfig
    from rl_lora.config.sft import SftConfig
    from rl_lora.learner import Learner

FORMAT_VERSION = 1
FOLDER = "checkpoints"
TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{6,})")


# --- a learner's state ----------------------------------------------------------------------------


def save_checkpoint(
    step: int, learner: Learner, config: RunConfig | SftConfig, **more: Any
) -> Path:
    """Writes policy, optimizer, config, versions and `more` (JSON), then deletes all but the
    newest run.keep_last. Of a job's processes all call it, and rank 0 writes.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    own = learner.policy.on_host(learner.policy.state_tensors())
    policy = {f"policy/{name}": tensor for name, tensor in own.items()}
    optimizer, meta = flatten_optimizer(learner.optimizer)
    state = {
        "num_updates": learner.num_updates_done,
        "lr_factor": learner.lr_factor,
        "optimizer": meta,
        "config": config.model_dump(mode="json"),
        "versions": environment(),
        **more,
    }

    def write() -> Path:
        path = write_checkpoint(config.run.folder, step, policy | optimizer, state)
        prune(config.run.folder, config.run.keep_last)
        return path

    return distributed.from_main(write, f"the checkpoint of step {step}")


def load_checkpoint(path: Path, learner: Learner) -> dict[str, Any]:
    """Restores policy and optimizer; returns the whole state ("step" and the rest).

    Raises:
        UserError: the checkpoint is broken, or belongs to another optimizer.
    """
    tensors, state = read_checkpoint(path)
    policy = {n.removeprefix("policy/"): t for n, t in tensors.items() if n.startswith("policy/")}
    learner.policy.load_tensors(policy)
    restore_optimizer(learner.optimizer, tensors, state["optimizer"])
    learner.num_updates_done = state["num_updates"]
    learner.lr_factor = state.get("lr_factor", 1.0)  # a checkpoint of an earlier version has none
    return state


def flatten_optimizer(
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, meta) of the optimizer's state: optimizer/PARAMETER/KEY tensors, and JSON.

    All of its state must be tensors, as in the Adam family. Parameters are numbered across groups
    in order, as in `Optimizer.state_dict`. Of a job's processes all call it, and rank 0 gets the
    tensors, sharded ones gathered.
    """
    whole = optimizer.state_dict()
    tensors = gathered_on_main(
        {
            f"optimizer/{index}/{key}": tensor
            for index, parameter_state in whole["state"].items()
            for key, tensor in parameter_state.items()
        }
    )
    meta = {
        "class": type(optimizer).__name__,
        "groups": whole["param_groups"],
        "shapes": _shapes(optimizer),
    }
    return tensors, meta


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]
) -> None:
    """Restores what `flatten_optimizer` returned, hyperparameters included, bit for bit.

    Tensors of other names are ignored.

    Raises:
        UserError: the optimizer is of another class or has other parameters.
    """
    shapes = _shapes(optimizer)
    if meta["class"] != type(optimizer).__name__ or meta["shapes"] != shapes:
        raise UserError(
            f"the checkpoint's optimizer ({meta['class']}, {len(meta['shapes'])} tensors) does not "
            f"match this run's ({type(optimizer).__name__}, {len(shapes)} tensors): resume with "
            "the config, and the version of rl-lora, that the run was started with"
        )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parameter_states: defaultdict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            like = parameters[int(index)]
            # load_state_dict keeps tensors that need no cast, and `step` is updated in place.
            copy = sharded(tensor, like) if tensor.shape == like.shape else tensor.clone()
            parameter_states[int(index)][key] = copy
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in meta["groups"]
    ]
    optimizer.load_state_dict({"state": dict(parameter_states), "param_groups": groups})


def _shapes(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    return [list(p.shape) for group in optimizer.param_groups for p in group["params"]]


# --- a checkpoint's directory ---------------------------------------------------------------------


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """RUN/checkpoints/step_000012 for step 12."""
    return run_folder / FOLDER / f"step_{step:06d}"


def write_checkpoint(
    run_folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> Path:
    """Writes tensors and state as the checkpoint of `step`; returns its directory.

    Args:
        run_folder: the run's folder.
        step: steps done; stored in the state as "step".
        tensors: by name, of any device, shape and dtype; their bits are kept.
        state: what JSON can hold: str keys; finite numbers, text, lists, dicts, None.

    Raises:
        TypeError, ValueError: JSON cannot hold the state.
        UserError: the disk is full or cannot be written.
    """
    document: dict[str, Any] = {"format_version": FORMAT_VERSION, "state": {**state, "step": step}}
    json.dumps(document, allow_nan=False)  # before anything is written
    final = checkpoint_path(run_folder, step)
    try:
        _remove_leftovers(run_folder)
        with atomic_directory(final, is_durable=True) as scratch:
            file = scratch / TENSORS_FILE
            save_file(_storable(tensors), file)
            document["files"] = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}}
            document["sha256"] = _document_hash(document)
            text = json.dumps(document, indent=1)
            (scratch / STATE_FILE).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {final} cannot be written ({error}); free disk space or set "
            "run.output_dir to a folder that can be written"
        ) from error
    return final


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors on the CPU, state with "step"), every byte checked against its sha256.

    Raises:
        UserError: missing, half-written, corrupt, or of another format version; the message names
            an older intact checkpoint if there is one.
    """
    try:
        document = _read_document(path)
        _check_tensors(path, document)
        return load_file(path / TENSORS_FILE), document["state"]
    except (_BrokenError, OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: {error}; {_way_out(path)}") from error


def read_state(path: Path) -> dict[str, Any]:
    """Only a checkpoint's state; its tensors are not read. Raises as `read_checkpoint`."""
    try:
        state: dict[str, Any] = _read_document(path)["state"]
    except (_BrokenError, OSError) as error:
        raise UserError(f"checkpoint {path}: {error}; {_way_out(path)}") from error
    return state


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was saved; None without any.

    Broken ones are skipped with a logged warning.

    Raises:
        UserError: there are checkpoints, but none is intact.
    """
    broken: list[str] = []
    for path in reversed(_checkpoints(run_folder / FOLDER)):
        try:
            _check_tensors(path, _read_document(path))
        except (_BrokenError, OSError) as error:
            broken.append(f"{path}: {error}")
            continue
        for line in broken:
            _LOG.warning("checkpoint skipped: %s", line)
        return path
    if broken:
        raise UserError(
            f"no checkpoint in {run_folder / FOLDER} is intact ({broken[0]}); delete {run_folder} "
            "or start again under another run.name"
        )
    return None


def checkpoint_steps(run_folder: Path) -> set[int]:
    """Steps of the checkpoints on disk, intact or not."""
    return {_step_of(path) for path in _checkpoints(run_folder / FOLDER)}


def progress(run_folder: Path) -> str:
    """Where a run that ends now could be resumed, as the end of a sentence."""
    steps = checkpoint_steps(run_folder)
    return f" after step {max(steps)}" if steps else " before the first checkpoint"


def has_checkpoint(run_folder: Path, step: int) -> bool:
    """Whether the step's is on disk. All of a job's processes call it."""
    steps = distributed.from_main(lambda: checkpoint_steps(run_folder), "the checkpoints")
    return step in steps


def clean(run_folder: Path, step: int, keep_last: int) -> None:
    """What a run that resumes from `step` calls first: none of later steps stays, of the others the
    newest `keep_last`, and nothing that a kill has left of a save or a deletion."""
    drop_after(run_folder, step)
    prune(run_folder, keep_last)
    _remove_leftovers(run_folder)


def prune(run_folder: Path, keep_last: int) -> list[Path]:
    """Deletes all but the newest `keep_last` (1 or more) checkpoints; returns what was deleted."""
    return _remove(_checkpoints(run_folder / FOLDER)[:-keep_last])


def drop_after(run_folder: Path, step: int) -> list[Path]:
    """Deletes the checkpoints of later steps, intact or not; returns what was deleted.

    A run that resumes from `step` takes those steps again, and `prune` and `latest_checkpoint` go
    by the step's number.
    """
    return _remove([p for p in _checkpoints(run_folder / FOLDER) if _step_of(p) > step])


# --- intact or not --------------------------------------------------------------------------------


class _BrokenError(Exception):
    """What is wrong with a checkpoint, as half a sentence."""


def _read_document(path: Path) -> dict[str, Any]:
    """The state file, checked; the tensors' file is checked for its size only."""
    if not path.is_dir():
        raise _BrokenError("there is no such directory")
    try:
        document = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _BrokenError(f"{STATE_FILE} is missing") from error
    except ValueError as error:
        raise _BrokenError(f"{STATE_FILE} is not valid JSON") from error
    if not isinstance(document, dict) or "format_version" not in document:
        raise _BrokenError(f"{STATE_FILE} is not a checkpoint's state")
    if document["format_version"] != FORMAT_VERSION:
        raise _BrokenError(
            f"format version {document['format_version']}, this program reads {FORMAT_VERSION}"
        )
    if document.pop("sha256", None) != _document_hash(document):
        raise _BrokenError(f"{STATE_FILE} is not the file that was saved (sha256 differs)")
    if document["files"].keys() != {TENSORS_FILE}:
        raise _BrokenError(f"{STATE_FILE} lists files other than {TENSORS_FILE}")
    file = path / TENSORS_FILE
    if not file.is_file():
        raise _BrokenError(f"{TENSORS_FILE} is missing")
    if file.stat().st_size != document["files"][TENSORS_FILE]["bytes"]:
        raise _BrokenError(f"{TENSORS_FILE} is cut short or longer than when it was saved")
    step = document["state"]["step"]
    if _NAME.fullmatch(path.name) and step != _step_of(path):
        raise _BrokenError(f"{STATE_FILE} is of step {step}: the directory has been renamed")
    return document


def _check_tensors(path: Path, document: Mapping[str, Any]) -> None:
    if _sha256(path / TENSORS_FILE) != document["files"][TENSORS_FILE]["sha256"]:
        raise _BrokenError(f"{TENSORS_FILE} is not the file that was saved (sha256 differs)")


def _way_out(path: Path) -> str:
    """The fix: the newest older checkpoint whose bytes are all right, or a new start."""
    match = _NAME.fullmatch(path.name)
    for other in reversed(_checkpoints(path.parent)):
        if other == path or (match and _step_of(other) > int(match[1])):
            continue
        with contextlib.suppress(_BrokenError, OSError):
            _check_tensors(other, _read_document(other))
            return f"delete it and resume again, from {other}, which is intact"
    return "no older one is intact: start again under another run.name"


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _remove(paths: list[Path]) -> list[Path]:
    """Deletes directories, each renamed first, so that a kill leaves no half-deleted checkpoint."""
    for path in paths:
        hidden = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(hidden, ignore_errors=True)  # left half-deleted by a kill
        path.rename(hidden)
        shutil.rmtree(hidden)
    return paths


def _remove_leftovers(run_folder: Path) -> None:
    """Deletes what a kill has left of a save or a deletion."""
    for path in (run_folder / FOLDER).glob(".step_*"):
        shutil.rmtree(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document_hash(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, contiguous, none sharing memory with another: safetensors' conditions."""
    stored: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    return stored
