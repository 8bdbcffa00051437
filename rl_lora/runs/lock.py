"""One process at a time in a run's folder: a lock that names its owner and ends with it.

The lock is a POSIX record lock (`fcntl.lockf`) on RUN/.lock: the kernel releases it however the
process ends; children do not inherit it (a `flock` would survive in an engine's process); and NFS,
Lustre and the like carry it to other hosts. The file says who holds the lock, for the second
process's message, and is deleted on release. A file without a lock was left by a killed process.

On a file system without locks the file decides: its owner is looked up if it is on this host, and
assumed alive if it is on another.

Within one process POSIX would grant the lock twice, and release it when any handle of the file is
closed. So the process keeps a table of the files it has locked, and nothing else opens them.
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
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from rl_lora.errors import UserError
from rl_lora.storage.directories import writing_to

LOCK_FILE = ".lock"
_IS_TAKEN = (errno.EACCES, errno.EAGAIN)
_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_PATIENCE_S = 1.0  # for a process that is just ending
_CLOCK_SLACK_S = 2.0  # between a process's start and the time that it recorded

_own: set[str] = set()  # files that this process has locked
_own_guard = threading.Lock()
os.register_at_fork(after_in_child=_own.clear)  # a child does not inherit its parent's locks


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
        """Whether the process is alive, as far as this host can tell; on another host: True."""
        return self.host != platform.node() or is_alive(self.pid, self.started)


def is_alive(pid: int, started: float) -> bool:
    """Whether this host's process `pid` is alive and already was at `started` (seconds since 1970);
    a later process may have been given the same number."""
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
    """Holds the lock of a folder, which is made if needed; `what` names it in messages.

    Yields:
        a note on the killed process that held the lock before; None if there is none.

    Raises:
        UserError: another process holds the lock (the message gives its number and host; nothing in
            the folder was touched), or the folder cannot be written.
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
            note = f"{what or folder}: taken over from {before}, which is gone"
            yield None if before is None else note
        finally:
            with contextlib.suppress(FileNotFoundError):  # the folder has been deleted
                path.unlink()
            os.close(descriptor)
    finally:
        with _own_guard:
            _own.discard(key)


def _acquire(folder: Path, path: Path, what: str) -> tuple[int, Owner | None]:
    """(descriptor of the locked file, the killed process that held it before)."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            is_free = _try_lock(descriptor)
            before = _read(descriptor)
            if is_free and _is_same_file(descriptor, path):
                stack.callback(path.unlink)  # on a full disk
                with writing_to(folder):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(asdict(_this_process())).encode(), 0)
                stack.pop_all()
                return descriptor, before
        # If the owner released the lock after this open, its file is deleted: try again at once.
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
    """Who wrote the file last; None if nobody did, or a writer was killed halfway."""
    try:
        return Owner(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _this_process() -> Owner:
    return Owner(os.getpid(), platform.node(), psutil.Process().create_time())


def _taken(path: Path, what: str, owner: Owner | None) -> UserError:
    line = f"{what or path.parent} is being run by {owner or 'another process'}; wait until it ends"
    if owner is not None and owner.host != platform.node():
        line += f", or delete {path} if that process is gone"
    return UserError(line)
