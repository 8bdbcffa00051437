"""A directory that appears whole or not at all, and what a full disk is told as."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rl_lora.errors import UserError

_OF_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.ESTALE,
)


@contextlib.contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """A scratch directory beside `final` that takes its place at the end.

    If anything fails, `final` stays as it was and the scratch goes; what a killed process has left
    of its own goes as well.
    """
    for leftover in final.parent.glob(f".{final.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = final.with_name(f".{final.name}.{os.getpid()}")
    replaced = final.with_name(f".{final.name}.replaced")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if final.exists():
            final.rename(replaced)
        scratch.rename(final)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Tells a full, read-only or vanished disk as a user's error; the last good state is left.

    Raises:
        UserError: in place of the OSError, with the file that could not be written.
    """
    try:
        yield
    except OSError as error:
        is_copy = isinstance(error, shutil.Error)  # it has the first error's text, and no number
        if error.errno not in _OF_THE_DISK and not is_copy:
            raise
        reason = error.args[0][0][2] if is_copy else error.strerror
        raise UserError(
            f"{error.filename or folder} cannot be written ({reason}); make room on the disk, then "
            "--resume goes on from the last checkpoint"
        ) from error
