"""A directory that appears whole or not at all, and the disk's errors in the user's words."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from rl_lora.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SHUT_OR_GONE = (errno.EROFS, errno.EIO, errno.ESTALE)


@contextlib.contextmanager
def atomic_directory(final: Path, *, is_durable: bool = False) -> Iterator[Path]:
    """A scratch directory next to `final` that takes its place at the end.

    If anything fails, `final` stays as it was and the scratch directory is deleted. Durable: its
    files are forced to disk first, so that it survives a power failure as well.
    """
    recover_directory(final)
    scratch = final.with_name(f".{final.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if is_durable:
            for path in (*scratch.rglob("*"), scratch):
                _force_to_disk(path)
        if final.exists():
            final.rename(_replaced(final))
        scratch.rename(final)
        if is_durable:
            _force_to_disk(final.parent)
    except BaseException:
        recover_directory(final)
        raise
    shutil.rmtree(_replaced(final), ignore_errors=True)


def recover_directory(final: Path) -> None:
    """Undoes what a killed process left of a replacement: the old directory is put back if it was
    moved aside, and scratch directories are deleted."""
    replaced = _replaced(final)
    if replaced.is_dir() and not final.exists():
        replaced.rename(final)
    for leftover in final.parent.glob(f".{glob.escape(final.name)}.*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(
    folder: Path | None, then: str = "continue from the last checkpoint with --resume"
) -> Iterator[None]:
    """Reports a full, read-only or vanished disk as a user's error; the last good state stays.

    Args:
        folder: what is written to; None: anything.
        then: what to do once there is room, for the message.

    Raises:
        UserError: in place of the error of the system or of safetensors, naming the file that
            could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, reason = _number_and_reason(error)
        if number in _FULL:
            fix = "free disk space"
        elif number in _SHUT_OR_GONE or (number == errno.EACCES and _is_in(folder, error)):
            fix = "make it writable again"
        elif folder is not None and not folder.is_dir():
            raise UserError(f"{folder} was deleted or moved while it was written to") from error
        else:
            raise
        file = getattr(error, "filename", None) or folder or "a file"
        raise UserError(f"{file} cannot be written ({reason}); {fix}, then {then}") from error


def _is_in(folder: Path | None, error: OSError | SafetensorError) -> bool:
    name = getattr(error, "filename", None)
    return name is not None and folder in Path(name).parents


def _number_and_reason(error: OSError | SafetensorError) -> tuple[int | None, str]:
    """The system's number of an error, and its text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno, os.strerror(error.errno)
    # Of `shutil.copytree` and of safetensors there is only the text.
    for number in (*_FULL, *_SHUT_OR_GONE):
        if os.strerror(number) in str(error):
            return number, os.strerror(number)
    return None, str(error)


@contextlib.contextmanager
def writing_to(run_folder: Path) -> Iterator[None]:
    """Raises UserError in place of an OSError: the run's folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run folder {run_folder} cannot be written ({error.strerror}); set run.output_dir to "
            "one that can"
        ) from error


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
