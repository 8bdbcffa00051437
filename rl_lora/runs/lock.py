"""One process at a time in a run's folder: a lock that names its owner and dies with it.

The lock is POSIX's record lock (`fcntl.lockf`) on RUN/.lock: the kernel frees it when the process
ends, however it ends; children do not inherit it (one of `flock` would live on in an engine's
process); and NFS, Lustre and the like carry it to other hosts. The file says who holds it, for the
second process's message, and goes when the lock is given back. A file without a lock is what a
killed process has left.

Where the file system has no locks, the file decides: its owner is asked for on its own host, and
believed to live on another one.

Departure from the system's rule: within one process, POSIX grants the lock twice and frees it when
any handle of the file is closed. So this process's own locks are kept in a table and the file is
opened by nobody else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rl_lora.errors import UserError

LOCK_FILE = ".lock"
_IS_TAKEN = (errno.EACCES, errno.EAGAIN)
_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_PATIENCE_S = 1.0  # for a process that is just ending
_CLOCK_SLACK_S = 2.0  # between the process's start and what it wrote of itself

_own: set[str] = set()  # files that this process has locked
_own_guard = threading.Lock()
os.register_at_fork(after_in_child=_own.clear)  # a child has none of its parent's locks


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, or held it when it was killed.

    Example: Owner(pid=4711, host="node7", started=1790000000.0)
    """

    pid: int
    host: str
    started: float  # when the process began, in seconds since 1970

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_alive(self) -> bool:
        """Whether it lives, as far as this host can tell: one on another host counts as alive."""
        return self.host != platform.node() or is_alive(self.pid, self.started)


def is_alive(pid: int, started: float) -> bool:
    """Whether a process of this host lives that was there at `started` (seconds since 1970); a
    later one may have got its number."""
    try:
        process = psutil.Process(pid)
        is_gone = process.status() == psutil.STATUS_ZOMBIE
        return not is_gone and process.create_time() <= started + _CLOCK_SLACK_S
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


@contextlib.contextmanager
def run_lock(folder: Path, file: str = LOCK_FILE, what: str = "") -> Iterator[str | None]:
    """Holds a folder's lock, and makes the folder where it is not there.

    Args:
        folder: a run's or a study's.
        file: name of the lock's file in it.
        what: what is locked, for the message; the folder by default.

    Yields:
        a line on the process that the lock is taken over from; None: nobody was killed with it.

    Raises:
        UserError: another process holds it, which the line names by number and host; nothing in
            the folder has been touched. Or the folder cannot be written.
    """
    path = folder / file
    key = str(path.absolute())
    with _own_guard:
        if key in _own:
            raise _taken(path, what, _this_process())
        _own.add(key)
    try:
        descriptor, before = _acquire(folder, path, what)
        try:
            line = f"{what or folder}: taken over from {before}, which is gone"
            yield None if before is None else line
        finally:
            with contextlib.suppress(FileNotFoundError):  # somebody has deleted the folder
                path.unlink()
            os.close(descriptor)
    finally:
        with _own_guard:
            _own.discard(key)


def _acquire(folder: Path, path: Path, what: str) -> tuple[int, Owner | None]:
    """(the locked file, who was killed with it)."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"run folder {folder} cannot be written ({error.strerror}); set run.output_dir to "
                "a folder that can"
            ) from error
        is_held = False
        try:
            is_free = _try_lock(descriptor)
            before = _read(descriptor)
            if is_free and _is_same_file(descriptor, path):
                _write(descriptor)
                is_held = True
                return descriptor, before
        finally:
            if not is_held:
                os.close(descriptor)
        # Given back, and its file deleted, after it was opened here: at once again.
        if not is_free:
            if time.monotonic() > deadline:
                raise _taken(path, what, before)
            time.sleep(0.1)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IS_TAKEN:
            return False
        if error.errno in _HAS_NO_LOCKS:
            owner = _read(descriptor)
            return owner is None or not owner.is_alive()
        raise
    return True


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Owner | None:
    """Who wrote the file last; None: nobody, or a writer killed half-way."""
    try:
        found: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        return Owner(int(found["pid"]), str(found["host"]), float(found["started"]))
    except (ValueError, KeyError, TypeError):
        return None


def _write(descriptor: int) -> None:
    owner = _this_process()
    text = json.dumps({"pid": owner.pid, "host": owner.host, "started": owner.started})
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def _this_process() -> Owner:
    return Owner(os.getpid(), platform.node(), psutil.Process().create_time())


def _taken(path: Path, what: str, owner: Owner | None) -> UserError:
    line = f"{what or path.parent} is being run by {owner or 'another process'}; wait for its end"
    if owner is not None and owner.host != platform.node():
        line += f", or delete {path} if that process is gone"
    return UserError(line)
