"""One atomic directory a checkpoint: tensors, state, every RNG; whole, or not there.

    RUN/checkpoints/step_000012/tensors.safetensors  adapter, optimizer, torch's RNG states
    RUN/checkpoints/step_000012/state.json           step, data position, config, versions, sha256s

Nothing is pickled, so that loading a checkpoint cannot run code. A save writes a hidden directory,
forces it to disk and renames it; a kill at any moment leaves the older checkpoints whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rl_lora.errors import UserError

FORMAT_VERSION = 1
FOLDER = "checkpoints"
TENSORS_FILE = "tensors.safetensors"
STATE_FILE = "state.json"

_LOG = logging.getLogger(__name__)
# A save over an existing step moves the old one aside; until it is deleted it counts as well.
_NAME = re.compile(r"step_(\d{6,})(\.replaced)?")
_HIDDEN = ".partial_"  # half-written and half-deleted directories


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """RUN/checkpoints/step_000012 for step 12."""
    return run_folder / FOLDER / f"step_{step:06d}"


def save_checkpoint(
    run_folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> Path:
    """Writes the checkpoint of `step` and returns its directory.

    Args:
        run_folder: the run's folder.
        step: steps done; stored in the state as "step".
        tensors: names to tensors of any device, shape and dtype, bits kept.
        state: a dict that JSON can hold: str keys; finite numbers, text, lists, dicts, None.

    Raises:
        TypeError, ValueError: the state does not fit JSON, or holds another "step".
        UserError: the disk is full or cannot be written.
    """
    if state.get("step", step) != step:
        raise ValueError(f"state['step'] = {state['step']}, but the checkpoint is of step {step}")
    body = {**state, "step": step}
    json.dumps(body, allow_nan=False)  # before anything is written
    final = checkpoint_path(run_folder, step)
    partial = final.with_name(_HIDDEN + final.name)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_hidden(final.parent)
        partial.mkdir()
        save_file(_storable(tensors), partial / TENSORS_FILE)
        document = {"format_version": FORMAT_VERSION, "state": body, "files": _files(partial)}
        document["sha256"] = _document_hash(document)
        (partial / STATE_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
        for name in (TENSORS_FILE, STATE_FILE, "."):
            _force_to_disk(partial / name)
        _put_in_place(partial, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} cannot be written ({error}); free disk space or set "
            "run.output_dir to a folder that can be written"
        ) from error
    return final


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors on the CPU, state with "step"), every byte checked against its sha256.

    Raises:
        UserError: not there, half-written, corrupt, or of another format version; the message
            names an older checkpoint that is whole, where there is one.
    """
    try:
        document = _read_document(path)
        for name, recorded in document["files"].items():
            if _sha256(path / name) != recorded["sha256"]:
                raise _BrokenError(f"{name} is not the file that was saved (sha256 differs)")
        return load_file(path / TENSORS_FILE), document["state"]
    except (_BrokenError, OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: {error}; {_way_out(path)}") from error


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state alone, its tensors not read. Raises UserError as `load_checkpoint`."""
    try:
        state: dict[str, Any] = _read_document(path)["state"]
    except (_BrokenError, OSError) as error:
        raise UserError(f"checkpoint {path}: {error}; {_way_out(path)}") from error
    return state


def latest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that is whole by its state file and file sizes; None: there is none.

    Broken ones are passed over with a logged warning. Contents are hashed by `load_checkpoint`.

    Raises:
        UserError: there are checkpoints, and not one is whole.
    """
    broken: list[str] = []
    for path in reversed(_checkpoints(run_folder / FOLDER)):
        try:
            _read_document(path)
        except (_BrokenError, OSError) as error:
            broken.append(f"{path}: {error}")
            continue
        for line in broken:
            _LOG.warning("checkpoint passed over: %s", line)
        return path
    if broken:
        raise UserError(
            f"no checkpoint in {run_folder / FOLDER} is whole ({broken[0]}); delete {run_folder} "
            "or take another run.name to start anew"
        )
    return None


def checkpoint_steps(run_folder: Path) -> set[int]:
    """Steps of the checkpoints on disk, whole or not."""
    return {step_of(path) for path in _checkpoints(run_folder / FOLDER)}


def step_of(path: Path) -> int:
    """The step in a checkpoint's name, of one that was being replaced as well."""
    return _order(path)[0]


def prune(run_folder: Path, keep_last: int) -> list[Path]:
    """Deletes all but the newest `keep_last` checkpoints; returns what was deleted.

    A directory is renamed out of sight first, so that a kill leaves no half-deleted checkpoint.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last = {keep_last}: at least one checkpoint is kept")
    folder = run_folder / FOLDER
    if not folder.is_dir():
        return []
    _remove_hidden(folder)
    removed = _checkpoints(folder)[:-keep_last]
    for path in removed:
        _remove(path)
    return removed


def drop_after(run_folder: Path, step: int) -> list[Path]:
    """Deletes the checkpoints of later steps, whole or not; returns what was deleted.

    A run that goes on from `step` calls this first: the steps that it runs again are another
    history, and `prune` and `latest_checkpoint` go by the step's number.
    """
    removed = [path for path in _checkpoints(run_folder / FOLDER) if step_of(path) > step]
    for path in removed:
        _remove(path)
    return removed


# --- whole or not ---------------------------------------------------------------------------------


class _BrokenError(Exception):
    """What is wrong with a checkpoint, as half a sentence."""


def _read_document(path: Path) -> dict[str, Any]:
    """The state file, checked; sizes of the other files checked, contents not."""
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
        raise _BrokenError(f"{STATE_FILE} lists other files than {TENSORS_FILE}")
    for name, recorded in document["files"].items():
        if not (path / name).is_file():
            raise _BrokenError(f"{name} is missing")
        if (path / name).stat().st_size != recorded["bytes"]:
            raise _BrokenError(f"{name} is cut short or longer than it was saved")
    return document


def _way_out(path: Path) -> str:
    """The fix: the newest older checkpoint whose bytes are all right, or a new start."""
    match = _NAME.fullmatch(path.name)
    step = int(match[1]) if match else None
    for other in reversed(_checkpoints(path.parent)):
        if other == path or (step is not None and _order(other)[0] > step):
            continue
        try:
            files = _read_document(other)["files"]
            if all(_sha256(other / name) == files[name]["sha256"] for name in files):
                return f"delete it and resume again, from {other}, which is whole"
        except (_BrokenError, OSError):
            continue
    return "no older one is whole: start anew under another run.name"


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoint directories, oldest first; one that was replaced comes before its successor."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_order)


def _order(path: Path) -> tuple[int, bool]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), match[2] is None


def _put_in_place(partial: Path, final: Path) -> None:
    """Renames, so that at every moment the old or the new directory has a checkpoint's name."""
    replaced = final.with_name(final.name + ".replaced")
    if final.exists():
        if replaced.exists():
            _remove(replaced)
        final.rename(replaced)
    partial.rename(final)
    _force_to_disk(final.parent)
    if replaced.exists():
        _remove(replaced)


def _remove(path: Path) -> None:
    hidden = path.with_name(_HIDDEN + "deleted_" + path.name)
    shutil.rmtree(hidden, ignore_errors=True)  # left half-deleted by a kill
    path.rename(hidden)
    shutil.rmtree(hidden)


def _remove_hidden(folder: Path) -> None:
    """What a kill left behind."""
    for path in folder.iterdir():
        if path.name.startswith(_HIDDEN):
            shutil.rmtree(path)


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _document_hash(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous, and each with memory of its own, as safetensors wants them."""
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
