"""Joins a Ray cluster, or starts one of this job on this machine. Ray is imported here."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from rl_lora.errors import UserError

# Before Ray is imported: no usage report, and a Ray of this machine only (its node then has the
# address 127.0.0.1, to which its servers bind, where it would be reachable from outside).
_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


_QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
_ATTEMPTS = 3  # to start a Ray on this machine


@dataclass
class RayCluster:
    """An open connection to Ray.

    Example: RayCluster(ray=<module>, folder=Path("/tmp/rl-lora-ray-x1"), gpus_per_sampler=0,
    num_threads=1)
    """

    ray: Any  # the module
    folder: Path | None  # of a Ray of this job; None: a cluster that others have started
    gpus_per_sampler: int
    num_threads: int  # of PyTorch in each sampler; 0: as it has by itself

    def close(self) -> None:
        """Leaves the cluster; one of this job ends with all its processes and files."""
        with _signals_kept():
            self.ray.shutdown()
        if self.folder is not None:
            _remove(self.folder)


def join_ray(
    address: str, *, num_samplers: int, gpus_per_sampler: int, num_learner_gpus: int
) -> RayCluster:
    """Connects to a cluster, or starts one of so many samplers.

    Args:
        address: "local", "auto", or a cluster's address.
        num_samplers: that will run there.
        gpus_per_sampler: 0 or 1.
        num_learner_gpus: the first GPUs of this machine, which a Ray of this job must not use.

    Raises:
        UserError: Ray is not installed, there is no cluster, or it has too few GPUs.
    """
    is_local = address == "local"
    if "ray" not in sys.modules:  # it reads these once
        own = _ENVIRONMENT | (_LOCAL_ENVIRONMENT if is_local else {})
        if is_local:
            own |= {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        for name, value in own.items():
            os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "resources.samplers: samplers outside the learner's process need Ray, which is not "
            "installed; install it (pip install 'rl-lora[ray]'), or remove the section [resources]"
        ) from error
    if ray.is_initialized():
        raise UserError("this process already uses Ray; call ray.shutdown() first")
    folder = None
    if is_local:
        num_gpus = num_samplers * gpus_per_sampler
        with _learners_gpus_hidden(num_learner_gpus):
            folder = _start_local(ray, num_samplers, num_gpus)
    else:
        try:
            with _signals_kept():
                ray.init(address=address, **_QUIET)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"resources.ray_address={address!r}: there is no Ray cluster "
                f"({_first_line(error)}); start one on this machine with `ray start --head`, or "
                'set resources.ray_address="local"'
            ) from error
    _keep_quiet(ray)
    cores = len(os.sched_getaffinity(0))
    cluster = RayCluster(
        ray, folder, gpus_per_sampler, max(1, cores // num_samplers) if is_local else 0
    )
    found = int(ray.cluster_resources().get("GPU", 0))
    if found < num_samplers * gpus_per_sampler and not is_local:
        cluster.close()
        raise UserError(
            f"resources.samplers={num_samplers} with {gpus_per_sampler} GPU each: the Ray cluster "
            f"{address} has {found} GPUs; lower resources.samplers, or add nodes to the cluster"
        )
    return cluster


def _start_local(ray: Any, num_cpus: int, num_gpus: int) -> Path:
    """Starts a Ray on this machine; returns the folder of its files.

    On a machine that is busy its processes may be late for Ray's own limit of 30 s.
    """
    for attempts_left in reversed(range(_ATTEMPTS)):
        folder = Path(tempfile.mkdtemp(prefix="rl-lora-ray-"))
        try:
            with _signals_kept():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    include_dashboard=False,
                    _temp_dir=str(folder),
                    **_QUIET,
                )
            return folder
        except BaseException as error:
            with _signals_kept():
                ray.shutdown()
            _remove(folder)
            if not isinstance(error, Exception):
                raise
            if not attempts_left:
                raise UserError(
                    f"resources.samplers: Ray does not start on this machine "
                    f"({_first_line(error)}); use a machine with free cores and memory, or remove "
                    "the section [resources]"
                ) from error
    raise AssertionError


def _remove(folder: Path) -> None:
    """Ends what is left of a Ray of this job (of one that did not start, Ray itself ends nothing),
    and deletes its files."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if str(folder) in " ".join(child.cmdline()):
                child.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Restores the handlers that Ray replaces: SIGTERM's by sys.exit, and below Python's those of
    its C++ library, which aborts the process three seconds after a SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _learners_gpus_hidden(num_gpus: int) -> Iterator[None]:
    """Inside, CUDA_VISIBLE_DEVICES lacks the first GPUs: a Ray that starts here counts the rest."""
    if not num_gpus:
        yield
        return
    import torch

    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    all_gpus = (
        list(map(str, range(torch.cuda.device_count()))) if before is None else (before.split(","))
    )
    os.environ[name] = ",".join(all_gpus[num_gpus:])
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _keep_quiet(ray: Any) -> None:
    """Ray prints a paragraph for every worker that dies; the fleet reports that in one line."""
    if hasattr(ray._private.worker, "print_to_stdstream"):
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
