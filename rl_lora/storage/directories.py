"""A directory that appears whole or not at all, and the disk's errors in the user's words."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rl_lora.errors import UserError

_FULL_OR_GONE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


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
def disk_errors(folder: Path) -> Iterator[None]:
    """Reports a full, read-only or vanished disk as a user's error; the last good state stays.

    Raises:
        UserError: in place of the OSError, naming the file that could not be written.
    """
    try:
        yield
    except OSError as error:
        is_copy = isinstance(error, shutil.Error)  # it has the first error's text, and no number
        if error.errno not in _FULL_OR_GONE and not is_copy:
            raise
        reason = error.args[0][0][2] if is_copy else error.strerror
        raise UserError(
            f"{error.filename or folder} cannot be written ({reason}); free disk space, then "
            "continue from the last checkpoint with --resume"
        ) from error


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
