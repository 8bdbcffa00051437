"""What a fleet knows of each of its replicas, and the work that it gives them."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rl_lora.samplers.fleet.replica import GroupRequest, Replica


class Answers:
    """What one call from outside waits for: results of its tasks in any order, or an exception."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.is_wanted = True  # False: the caller has left

    def put(self, answer: Any) -> None:
        """A result, or the exception that ends the call."""
        self._queue.put(answer)

    def get(self, check: Callable[[], None], poll_s: float) -> Any:
        """The next result. Raises what was put, or what `check` raises, every poll_s seconds."""
        while True:
            try:
                answer = self._queue.get(timeout=poll_s)
            except queue.Empty:
                check()
                continue
            if isinstance(answer, BaseException):
                raise answer
            return answer


@dataclass(eq=False)
class Task:
    """One piece of work that any replica may do, and another one again: a group, or log-probs.

    Example: Task(index=3, size=8, group=GroupRequest(...))
    """

    index: int  # within its call
    size: int  # sequences
    group: GroupRequest | None = None
    token_ids_N: Sequence[Sequence[int]] = ()  # without a group: to be scored
    answers: Answers = field(default_factory=Answers)  # of its call
    number: int = 0  # in the order of calls, then of prompts
    version: int | None = None  # of the adapter that its replica had when it was sent

    def fault(self, result: Any) -> str:
        """What is wrong with a replica's answer; empty: nothing."""
        if self.group is None:
            lengths = [len(logprobs) for logprobs in result]
            expected = [max(len(ids) - 1, 0) for ids in self.token_ids_N]
            return "" if lengths == expected else f"it scored {lengths} tokens of {expected}"
        if len(result) != self.size:
            return f"it answered with {len(result)} completions of {self.size}"
        versions = sorted({completion.adapter_version for completion in result})
        if versions != [self.version]:
            return f"it answered with adapter version {versions}, and has {self.version}"
        return ""


class Condition(Enum):
    """Where a replica is between nothing and work."""

    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"
    LEFT_OUT = "left out"


@dataclass(eq=False)
class Member:
    """One replica in the fleet."""

    replica: Replica
    condition: Condition = Condition.STARTING
    version: int | None = None  # that it has proved; None: none
    tasks: dict[Future[Any], Task] = field(default_factory=dict)
    under_way: Future[Any] | None = None  # its start, or its load
    num_failures: int = 0  # in a row, since it last did a task
    num_false_proofs: int = 0  # in a row
    reason: str = ""  # of the last failure
    progress: object = None
    quiet_s: float = 0.0  # without progress while something was under way
    busy_s: float = 0.0  # with tasks, of `Counters.since`
    busy_since: float | None = None

    @property
    def room(self) -> int:
        """Sequences that it takes now."""
        if self.condition is not Condition.READY:
            return 0
        return self.replica.max_samples - sum(task.size for task in self.tasks.values())

    def note_busy(self) -> None:
        """Call it when tasks have come or gone."""
        now = time.monotonic()
        if self.busy_since is not None:
            self.busy_s += now - self.busy_since
        self.busy_since = now if self.tasks else None

    def has_progress(self, tick_s: float) -> bool:
        """Whether anything happened since the last look, a tick ago, or nothing should have; counts
        the seconds without."""
        now = self.replica.progress()
        if now != self.progress or not (self.tasks or self.under_way):
            self.progress, self.quiet_s = now, 0.0
            return True
        self.quiet_s += tick_s
        return False


@dataclass
class Counters:
    """Numbers for metrics."""

    since: float = field(default_factory=time.monotonic)  # of idle time
    restarts: int = 0  # in all
    told_restarts: int = 0  # of those, in earlier metrics
    false_proofs: int = 0
    sampled_again: int = 0  # groups
    handover_bytes: int = 0  # of the last version, to each replica
    handover_s: float = 0.0

    def take(self, members: list[Member]) -> dict[str, float]:
        """Metrics since the last call."""
        now = time.monotonic()
        for member in members:
            member.note_busy()
        live = [m for m in members if m.condition is not Condition.LEFT_OUT]
        elapsed_s = max(now - self.since, 1e-9)
        busy = sum(m.busy_s for m in live) / (elapsed_s * len(live)) if live else 0.0
        metrics = {
            "fleet/live": float(sum(m.condition is not Condition.STARTING for m in live)),
            "fleet/left_out": float(len(members) - len(live)),
            "fleet/restarts": float(self.restarts - self.told_restarts),
            "fleet/false_proofs": float(self.false_proofs),
            "fleet/groups_sampled_again": float(self.sampled_again),
            "fleet/handover_bytes": float(self.handover_bytes),
            "fleet/handover_s": self.handover_s,
            "fleet/idle_share": max(0.0, 1.0 - busy),
        }
        self.since, self.told_restarts = now, self.restarts
        self.false_proofs = self.sampled_again = 0
        for member in members:
            member.busy_s = 0.0
        return metrics
