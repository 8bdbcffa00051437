"""The processes of one job, as `accelerate launch`, torchrun or a cluster's launcher start them.

Every process ("rank") runs the same program on the same batch, and only the work is divided:
`share` says who does what, `gather` brings the results to everyone, and rank 0 alone writes files
(`from_main`). A program in one process calls the same functions: they then do nothing, and neither
accelerate nor torch.distributed is loaded.

What the ranks exchange starts with a check that all of them have come (`_exchange`): a rank that
died, hangs, failed or is somewhere else ends the job with its name and what the others waited for.
Objects are pickled: ranks are processes of one user, and the text that a model wrote is only data.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rl_lora.errors import OtherProcessError, UserError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_TELL_S = 10.0  # for the others to hear of a failure; they may be busy for long
_LEAVE_S = 20.0  # for rank 0 to print why the job ends, before the launcher ends all processes


@dataclass
class _Job:
    """This process's place among the others."""

    state: PartialState
    control: ProcessGroup  # gloo on any device: for objects, and for noticing who is missing
    timeout_s: float
    hosts: tuple[str, ...] = ()  # by rank
    is_heard: bool = True  # False: a failure here has reached nobody else


_job: _Job | None = None  # None: one process


# --- who this process is --------------------------------------------------------------------------


def rank() -> int:
    """This process's number: 0, 1, ... `world_size()` - 1."""
    return 0 if _job is None else _job.state.process_index


def world_size() -> int:
    """How many processes the job has."""
    return 1 if _job is None else _job.state.num_processes


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its node, which is also the number of its GPU."""
    return 0 if _job is None else _job.state.local_process_index


def local_size() -> int:
    """How many of the processes are on this node."""
    return 1 if _job is None else _job.hosts.count(_job.hosts[rank()])


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several, or as the only one of them."""
    sizes = [int(os.environ.get(name, 0)) for name in _SIZES]
    return "RANK" in os.environ or max(sizes) > 1


def is_restarted() -> bool:
    """Whether the launcher has started all processes again after a failure (--max_restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


# --- joining and leaving --------------------------------------------------------------------------


@contextlib.contextmanager
def joined(device: str = "auto", timeout_s: float = 1800) -> Iterator[None]:
    """Makes this process one of the job's, if there are several; what it raises ends all of them.

    Args:
        device: `model.device`; cpu: without GPUs.
        timeout_s: how long the ranks wait for one another.

    Raises:
        OtherProcessError: another rank failed, died or hangs.
        UserError: the launcher has started one process where several were asked for.
    """
    _join(device, timeout_s)
    try:
        yield
    except OtherProcessError:
        raise
    except Exception as error:
        _tell(error)
        raise


def _join(device: str, timeout_s: float) -> None:
    global _job  # a process joins once
    if _job is not None:
        _job.timeout_s = timeout_s
        return
    if not is_launched():
        if "MASTER_PORT" in os.environ and "ACCELERATE_DYNAMO_BACKEND" in os.environ:
            raise UserError(
                "accelerate has started one process where several were asked for, as this machine "
                "has no two GPUs: add --multi_gpu to `accelerate launch` (it works without GPUs)"
            )
        return
    import torch
    from accelerate import PartialState

    timeout = timedelta(seconds=timeout_s)
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timeout)
    if state.backend is None:
        return  # one process, and no GPU that would make a group of it
    control = torch.distributed.new_group(backend="gloo", timeout=timeout)
    _job = _Job(state, control, timeout_s)
    atexit.register(leave)
    signal.signal(signal.SIGTERM, _on_sigterm)
    _job.hosts = tuple(gather(platform.node(), "the start"))


def _tell(error: Exception) -> None:
    """Lets the other ranks know, at their next exchange, that this one has failed."""
    if _job is None:
        return
    if world_size() > 1:
        _job.timeout_s = min(_job.timeout_s, _TELL_S)
    code = 2 if isinstance(error, UserError) else 3
    text = str(error) if code == 2 else f"{type(error).__name__}: {error}"
    try:
        _exchange("the end", failure=(code, text.strip()))
    except OtherProcessError as lost:
        # Where every rank has failed, each has heard of the others' failures.
        _job.is_heard = lost.is_failure


def is_speaker() -> bool:
    """Whether this process prints the error it ends with: rank 0, or one that nobody has heard."""
    return is_main() or (_job is not None and not _job.is_heard)


def _on_sigterm(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
    raise OtherProcessError(
        "the launcher ended this process (SIGTERM): another process of the job has ended, which it "
        "names, or the job was cancelled",
        code=128 + number,
    )


def leave() -> None:
    """Waits until rank 0 has printed: the launcher ends all processes once one of them fails.

    Called at exit; a child of `multiprocessing`, which runs no exit functions, calls it itself.
    """
    import torch.distributed as dist

    if _job is None or not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):  # some are gone already
        dist.monitored_barrier(_job.control, timeout=timedelta(seconds=_LEAVE_S))
    dist.destroy_process_group()


# --- exchanges ------------------------------------------------------------------------------------


def gather(value: T, phase: str) -> list[T]:
    """Every rank's value, by rank. All ranks call it, with the same phase.

    Args:
        value: an object that can be pickled.
        phase: what the ranks are doing, for messages: "sampling of step 3".

    Raises:
        OtherProcessError: a rank died, hangs, failed, or is in another phase.
    """
    return [value] if _job is None else _exchange(phase, value)


def from_main(make: Callable[[], T], phase: str) -> T:
    """What `make` returns on rank 0, where alone it is called. Raises as `gather`."""
    if _job is None:
        return make()
    value = make() if is_main() else None
    return _exchange(phase, value)[0]


def check_same(value: object, what: str, fix: str) -> None:
    """Raises UserError, on all ranks, where a rank's value is not rank 0's."""
    for number, other in enumerate(values := gather(value, what)):
        if other != values[0]:
            raise UserError(f"{_name(number)} has another {what} than rank 0: {fix}")


def add_up(tensor: Tensor, phase: str) -> dict[str, float]:
    """Replaces a tensor by the sum over all ranks, in place; returns metrics: bytes and seconds.

    accelerate's `reduce` would copy it. Raises as `gather`.
    """
    if _job is None or world_size() == 1:
        return {}
    import torch.distributed as dist

    gather(None, phase)  # who is late is not counted below
    started = time.perf_counter()
    dist.all_reduce(tensor)
    if tensor.is_cuda:
        import torch

        torch.cuda.synchronize(tensor.device)
    return {
        "system/all_reduce_bytes": float(tensor.nbytes),
        "system/all_reduce_s": time.perf_counter() - started,
    }


@contextlib.contextmanager
def local_main_first() -> Iterator[None]:
    """The first rank of each node runs the block before the others of that node do."""
    if _job is None or world_size() == 1:
        yield
        return
    if local_rank() > 0:
        gather(None, "preparation by the first process of the node")
    yield
    if local_rank() == 0:
        gather(None, "preparation by the first process of the node")


def share(costs: Sequence[float], num: int | None = None) -> list[list[int]]:
    """Who does what: for each of `num` ranks the indices of its items, in order.

    The most expensive item goes first, to the rank with the least so far.

    Args:
        costs: of the items.
        num: of ranks; None: the job's.
    """
    parts: list[list[int]] = [[] for _ in range(world_size() if num is None else num)]
    loads = [0.0] * len(parts)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(range(len(parts)), key=lambda r: (loads[r], len(parts[r]), r))
        parts[least].append(index)
        loads[least] += costs[index]
    return [sorted(part) for part in parts]


def _exchange(phase: str, value: Any = None, failure: tuple[int, str] | None = None) -> list[Any]:
    """Every rank's value, once all have come."""
    import torch.distributed as dist

    assert _job is not None
    started, limit_s = time.monotonic(), _job.timeout_s
    found: list[Any] = [None] * world_size()
    try:
        timeout = timedelta(seconds=limit_s)
        dist.monitored_barrier(_job.control, timeout=timeout, wait_all_ranks=True)
        dist.all_gather_object(found, (phase, value, failure), group=_job.control)
    except RuntimeError as error:
        waited_s = time.monotonic() - started
        raise _lost(str(error), phase, waited_s if waited_s >= limit_s else None) from error
    for number, (_, _, failed) in enumerate(found):
        if failed is not None and failure is None:
            code, text = failed
            line = text if number == 0 else f"{_name(number)}: {text}"
            raise OtherProcessError(line, code=code, is_failure=True)
    for number, (other, _, failed) in enumerate(found):
        if other != found[0][0] and failed is None and found[0][2] is None:
            raise RuntimeError(f"{_name(number)} is at {other!r}, and rank 0 at {found[0][0]!r}")
    return [one for _, one, _ in found]


def _lost(text: str, phase: str, waited_s: float | None) -> OtherProcessError:
    """The error of an exchange to which not all ranks came."""
    match = re.search(r"Ranks? ([\d, ]+) failed to pass", text)
    ranks = [int(number) for number in re.findall(r"\d+", match[1])] if match else []
    names = ", ".join(map(_name, ranks)) or "another process"
    if waited_s is None:
        return OtherProcessError(f"{names} ended during {phase}")
    return OtherProcessError(
        f"{names} did not finish {phase} within {waited_s:.0f} s (run.process_timeout_s) of this "
        "process"
    )


def _name(number: int) -> str:
    hosts = _job.hosts if _job is not None else ()
    return f"rank {number}" + (f" on {hosts[number]}" if hosts else "")
