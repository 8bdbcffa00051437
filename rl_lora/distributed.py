"""The processes of one job, as `accelerate launch`, torchrun or a cluster's launcher start them.

Every process ("rank") runs the same program on the same batch, and only the work is divided:
`share` says who does what, `gather` brings the results to everyone, and only rank 0 writes files
(`from_main`). A program in one process calls the same functions: they then do nothing, and neither
accelerate nor torch.distributed is loaded.

What the ranks exchange starts with a check that all of them have come (`_exchange`): a rank that
died, hangs, failed or is somewhere else ends the job with its name and what the others waited for.
A rank that fails puts the reason into torch's store (`tell`), and one of all ranks prints it.
Objects are pickled: ranks are processes of one user, and the text that a model wrote is only data.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import platform
import re
import signal
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rl_lora.errors import OtherProcessError, UserError
from rl_lora.launchers import interruption
from rl_lora.launchers.environment import check_launch, is_launched, rendezvous_options

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import Tensor
    from torch.distributed import ProcessGroup, Store

T = TypeVar("T")

_HEAR_S = 10.0  # for rank 0 to hear of a failure and to print it; it may be busy for long
_LAST_S = 3.0  # for the others to see that it has: without torchrun, what they see ends with rank 0


@dataclass
class _Job:
    """This process's place among the others."""

    state: PartialState
    control: ProcessGroup | None  # gloo on any device; None: left
    timeout_s: float
    hosts: tuple[str, ...] = ()  # by rank
    name: str = "joining"  # no other start of these ranks has it
    phase: str = "the start"  # of the last exchange
    is_ending: bool = False  # by an error
    is_speaker: bool = True
    gone: Sequence[int] = ()  # ranks that were found dead


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
    except (Exception, KeyboardInterrupt) as error:
        _ignore_launcher()
        cause = _who_ended(error)
        tell(cause or error)
        if cause is not None:
            raise cause from error
        raise


def _join(device: str, timeout_s: float) -> None:
    global _job  # a process joins once
    if _job is not None:
        _job.timeout_s = timeout_s
        return
    check_launch()
    if not is_launched():
        return
    import torch
    from accelerate import PartialState

    timeout = timedelta(seconds=timeout_s)
    is_cpu = device == "cpu" or not torch.cuda.is_available()
    state = PartialState(cpu=is_cpu, timeout=timeout, **rendezvous_options(timeout))
    if state.backend is None:
        return  # one process, and no GPU that would make a group of it
    # This one is for all ranks but 0. They wait only for rank 0, which may itself have waited for
    # `timeout_s` and knows who is missing.
    patience = 2 * timeout + timedelta(seconds=_HEAR_S)
    control = torch.distributed.new_group(backend="gloo", timeout=patience)
    _job = _Job(state, control, timeout_s)
    atexit.register(leave)
    interruption.set_several()
    found = gather((platform.node(), uuid.uuid4().hex), "the start")
    _job.hosts, _job.name = tuple(host for host, _ in found), found[0][1]


def tell(error: BaseException) -> None:
    """Lets the other ranks know why this one ends, also where it has not joined them yet.

    Returns once it is clear who prints it: rank 0 or, where that takes too long, another one.
    """
    if _job is None and is_launched():
        with contextlib.suppress(RuntimeError):  # the others are gone
            _join("cpu", _HEAR_S)
    if _job is None or _job.is_ending or world_size() == 1:
        return
    import torch.distributed as dist

    _job.is_ending = True
    _ignore_launcher()
    alive = set(range(world_size())) - set(_gone())
    try:
        if not isinstance(error, OtherProcessError):
            _store().set(f"failure/{rank()}", json.dumps(interruption.code_and_text(error)))
        dist.destroy_process_group(_job.control)
        _job.control = None  # closes the connections, which wakes the ranks that wait for this one
        has_main_spoken = not is_main() and _has(["left/0"], _HEAR_S)
        _job.is_speaker = not has_main_spoken and _store().add("speakers", 1) == 1
    except RuntimeError:  # rank 0 is gone, and the store with it
        _job.is_speaker = rank() == min(alive)


def is_speaker() -> bool:
    """Whether this process prints the error it ends with: one of the job does."""
    return _job is None or _job.is_speaker


def _who_ended(error: BaseException) -> OtherProcessError | None:
    """The ranks that ended and so caused this rank's error: the launcher's SIGTERM, or torch's in a
    pass over sharded weights. None: there are none, or some are only slow."""
    if _job is None:
        return None
    if isinstance(error, RuntimeError) and re.search("gloo|NCCL", str(error)):
        return _failure() or _missing(str(error), f"after {_job.phase}", 0, 1)
    if not isinstance(error, interruption.Interrupted) or error.number != signal.SIGTERM:
        return None
    import torch.distributed as dist

    started = time.monotonic()
    try:
        with _errors_of_others(f"after {_job.phase}", _HEAR_S):
            timeout = timedelta(seconds=_HEAR_S)
            dist.monitored_barrier(_job.control, timeout=timeout, wait_all_ranks=True)
    except OtherProcessError as other:
        return other if time.monotonic() - started < _HEAR_S else None
    return None


def _ignore_launcher() -> None:
    """Its SIGTERM, which follows the end of any rank, would replace this one's line and code."""
    if _job is not None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def leave() -> None:
    """Lets the others go: the launcher ends all processes once one that has failed is gone. Called
    at exit; a child of `multiprocessing`, which runs no exit functions, calls it itself."""
    import torch.distributed as dist

    if _job is None or not dist.is_initialized():
        return
    _ignore_launcher()
    if not _job.is_ending:
        return dist.destroy_process_group()
    with contextlib.suppress(RuntimeError):  # rank 0 is gone, and the store with it
        _store().set(f"left/{rank()}", "")
        if is_main():
            others = set(range(1, world_size())) - set(_job.gone)
            _has([f"left/{number}" for number in others], _LAST_S)


def _store() -> Store:
    """torch's store, for this start of the job. Without torchrun, rank 0 holds it."""
    from torch.distributed import PrefixStore
    from torch.distributed.distributed_c10d import _get_default_store

    assert _job is not None
    return PrefixStore(f"rl_lora {_job.name}", _get_default_store())


def _has(keys: list[str], limit_s: float) -> bool:
    """Whether the store has all keys, now or soon."""
    # Store.wait would log two lines where it has not.
    end = time.monotonic() + limit_s
    while not (found := _store().check(keys)) and time.monotonic() < end:
        time.sleep(0.02)
    return found


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
    """What `make` returns on rank 0; it is called only there. Raises as `gather`."""
    if _job is None:
        return make()
    value = make() if is_main() else None
    return _exchange(phase, value)[0]


def check_same(value: object, what: str, fix: str) -> None:
    """Raises UserError, on all ranks, where a rank's value is not rank 0's."""
    for number, other in enumerate(values := gather(value, what)):
        if other != values[0]:
            raise UserError(f"{_name(number)} has another {what} than rank 0: {fix}")


def agree_to_stop(phase: str) -> None:
    """Raises Interrupted on all ranks if a signal has come to one of them. Raises as `gather`."""
    numbers = gather(interruption.received(), phase)
    if number := next(filter(None, numbers), None):
        raise interruption.Interrupted(number)


def add_up(tensor: Tensor, phase: str) -> dict[str, float]:
    """Replaces a tensor by the sum over all ranks, in place (accelerate's `reduce` would copy it);
    returns metrics: bytes and seconds. Raises as `gather`."""
    if _job is None or world_size() == 1:
        return {}
    import torch.distributed as dist

    gather(None, phase)  # who is late is not counted below
    started = time.perf_counter()
    with _errors_of_others(f"during {phase}", _job.timeout_s):
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
    phase, is_first = "preparation by the first process of the node", local_rank() == 0
    if not is_first:
        gather(None, phase)
    yield
    if is_first:
        gather(None, phase)


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


def _exchange(phase: str, value: Any = None) -> list[Any]:
    """Every rank's value, once all have come."""
    import torch.distributed as dist

    assert _job is not None
    assert _job.control is not None
    found: list[Any] = [None] * world_size()
    with _errors_of_others(f"during {phase}", _job.timeout_s):
        timeout = timedelta(seconds=_job.timeout_s)
        dist.monitored_barrier(_job.control, timeout=timeout, wait_all_ranks=True)
        dist.all_gather_object(found, (phase, value), group=_job.control)
    for number, (other, _) in enumerate(found):
        if other != found[0][0]:
            raise RuntimeError(f"{_name(number)} is at {other!r}, and rank 0 at {found[0][0]!r}")
    _job.phase = phase
    return [one for _, one in found]


@contextlib.contextmanager
def _errors_of_others(when: str, limit_s: float) -> Iterator[None]:
    """torch's error of an exchange to which not all ranks came, as an OtherProcessError."""
    started = time.monotonic()
    try:
        yield
    except RuntimeError as error:
        waited_s = time.monotonic() - started
        raise _failure() or _missing(str(error), when, waited_s, limit_s) from error


def _failure() -> OtherProcessError | None:
    """What the first rank that has failed has told."""
    with contextlib.suppress(RuntimeError):  # rank 0 is gone, and the store with it
        for number in range(world_size()):
            if _store().check([f"failure/{number}"]):
                code, text = json.loads(_store().get(f"failure/{number}"))
                line = f"{_name(number)}: {text}" if number else text
                return OtherProcessError(line, code=code)
    return None


def _missing(text: str, when: str, waited_s: float, limit_s: float) -> OtherProcessError:
    """The error of an exchange in which ranks are missing that have told nothing."""
    assert _job is not None
    if waited_s < limit_s:
        _job.gone = _gone()
        gone = ", ".join(map(_name, _job.gone)) or f"another process ({text.splitlines()[0]})"
        return OtherProcessError(f"{gone} ended {when}")
    match = re.search(r"Ranks? ([\d, ]+) failed to pass", text)  # on rank 0; others wait for it
    late = ", ".join(_name(int(number)) for number in (match[1] if match else "0").split(","))
    return OtherProcessError(
        f"{late} did not come within {waited_s:.0f} s {when} (run.process_timeout_s)"
    )


def _gone() -> list[int]:
    """The ranks whose connection to this one is closed. No message is received."""
    import torch
    import torch.distributed as dist

    assert _job is not None
    gone = []
    for number in range(world_size()):
        try:
            if number != rank():
                dist.irecv(torch.empty(1), src=number, group=_job.control)
        except RuntimeError:
            gone.append(number)
    return gone


def _name(number: int) -> str:
    hosts = _job.hosts if _job is not None else ()
    return f"rank {number}" + (f" on {hosts[number]}" if hosts else "")
