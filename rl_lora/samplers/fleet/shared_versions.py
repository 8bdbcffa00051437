"""Versions' files where servers read them: their endpoint for adapters takes a path, no bytes."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import psutil

from rl_lora.adapters.files import fingerprint, load_tensors
from rl_lora.samplers.fleet.replica import AdapterFiles
from rl_lora.storage.directories import disk_errors
from rl_lora.types import Adapter


@dataclass(frozen=True, slots=True)
class SharedVersion:
    """A version in the folder.

    Example: SharedVersion(path=Path("/mnt/q/served/rl-lora-node1-712/v000003-5e1c"),
    fingerprint="9f2c...")
    """

    path: Path
    fingerprint: str  # of the tensors as read back from there


class SharedVersions:
    """This process's folder of versions; each is written once for all servers.

    Args:
        root: of such folders, one per process; the servers see it under the same path.
    """

    def __init__(self, root: Path) -> None:
        prefix = f"rl-lora-{socket.gethostname()}-"
        self._is_ours = not root.exists()
        self._root, self._lock = root.absolute() / f"{prefix}{os.getpid()}", threading.Lock()
        self._held: dict[Path, tuple[SharedVersion, int]] = {}  # and how many servers hold it
        for folder in root.glob(f"{glob.escape(prefix)}*"):
            number = folder.name.removeprefix(prefix)
            if number.isdecimal() and not psutil.pid_exists(int(number)):
                shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed

    def hold(self, adapter: Adapter, files: AdapterFiles) -> SharedVersion:
        """The version, written unless another server holds it; to be released once.

        Raises:
            StaleAdapterError: the files are not what was sent.
            UserError: the disk is full or not writable.
        """
        path = self._root / f"v{adapter.version:06d}-{files.sha256[:16]}"
        with self._lock:
            if path in self._held:
                version, num_holders = self._held[path]
            else:
                with disk_errors(self._root):
                    shutil.rmtree(path, ignore_errors=True)  # of a write that failed
                    files.write(path)
                version, num_holders = SharedVersion(path, fingerprint(load_tensors(path))), 0
            self._held[path] = version, num_holders + 1
            return version

    def release(self, version: SharedVersion) -> None:
        """Deletes its files once no server holds it."""
        with self._lock:
            _, num_holders = self._held[version.path]
            if num_holders > 1:
                self._held[version.path] = version, num_holders - 1
                return
            del self._held[version.path]
            shutil.rmtree(version.path, ignore_errors=True)
            if not self._held:
                shutil.rmtree(self._root, ignore_errors=True)
                if self._is_ours and not any(self._root.parent.iterdir()):
                    self._root.parent.rmdir()
