"""The thread that owns a fleet's state: who has which version, and who does what.

Everything that happens (a call from outside, an answer of a replica, a tick of the clock) is a
function in one queue, which this thread calls one by one, so that no state is shared.
"""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from rl_lora.errors import EngineError, StaleAdapterError, UserError
from rl_lora.sampler import BASE_VERSION
from rl_lora.samplers.fleet.members import Answers, Condition, Counters, Member, Task
from rl_lora.samplers.fleet.proofs import Prover
from rl_lora.samplers.fleet.replica import AdapterFiles, Proof, Replica
from rl_lora.types import Adapter, Probe

_MAX_FALSE_PROOFS = 2  # in a row, after which a replica is left out
_TICK_S = 1.0  # between two looks at the replicas' progress


@dataclass(frozen=True)
class Target:
    """The version that every replica is to have.

    Example: Target(adapter=Adapter(version=3, ...), files=AdapterFiles(...), probe=Probe(...))
    """

    adapter: Adapter | None  # None: the base model
    files: AdapterFiles | None
    probe: Probe | None  # the policy's log-probs; None: unknown

    @property
    def version(self) -> int:
        """Of the adapter."""
        return BASE_VERSION if self.adapter is None else self.adapter.version


class Dispatcher:
    """Gives tasks to replicas, and deals with those that fail.

    Args:
        replicas: not started yet.
        prover: judges what they have loaded.
        max_restarts: of one replica in a row, without a task that it does, until it is left out.
        timeout_s: without progress, after which a replica hangs.
        on_warning: called in this object's thread with one line for each failure.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        prover: Prover,
        *,
        max_restarts: int,
        timeout_s: float,
        on_warning: Callable[[str], None],
    ) -> None:
        self.counters = Counters()
        self._members = [Member(replica) for replica in replicas]
        self._prover, self._on_warning = prover, on_warning
        self._max_restarts, self._timeout_s = max_restarts, timeout_s
        self._tick_s = min(_TICK_S, timeout_s / 10)
        self._target: Target | None = None  # None: not set yet
        self._waiting: list[tuple[int, Task]] = []  # a heap by the task's number
        self._num_tasks = 0
        self._open: set[Answers] = set()  # calls, which must not wait for ever
        self._loaders: set[Answers] = set()  # of these, those that wait until all have the target
        self._failure: Exception | None = None  # every call raises it
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fleet", daemon=True)
        self._thread.start()

    # --- for other threads ------------------------------------------------------------------------

    def start(self) -> Answers:
        """Starts all replicas; the answer comes when each has started or is left out."""
        return self._ask(self._start_all)

    def set_target(self, target: Target) -> Answers:
        """The answer comes when every replica that is not being started has proved the version,
        and at least one has."""
        return self._ask(partial(self._set_target, target))

    def submit(self, tasks: Sequence[Task]) -> Answers:
        """The answers are (index, result), one for each task; afterwards, call `leave`."""
        return self._ask(partial(self._submit, tasks))

    def leave(self, answers: Answers) -> None:
        """The caller wants no more answers: what has not been sent is dropped."""
        answers.is_wanted = False
        self._inbox.put(partial(self._open.discard, answers))

    def metrics(self) -> Answers:
        """The answer is what `Counters.take` returns."""
        return self._ask(lambda answers: answers.put(self.counters.take(self._members)))

    def close(self) -> None:
        """Closes the replicas and ends the thread; a second call does nothing."""
        self._inbox.put(None)
        self._thread.join()

    def check_open(self) -> None:
        """Raises RuntimeError after `close`."""
        if not self._thread.is_alive():
            raise RuntimeError("this FleetSampler is closed")

    def _ask(self, call: Callable[[Answers], None]) -> Answers:
        answers = Answers()
        self._inbox.put(partial(call, answers))
        return answers

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        next_tick = time.monotonic() + self._tick_s
        while (event := self._next_event(next_tick)) is not None:
            if event == self._watch:
                next_tick = time.monotonic() + self._tick_s
            try:
                event()
            except Exception as error:  # noqa: BLE001 (raised by all calls)
                self._failure = self._failure or error
            if self._failure is not None:
                self._end_calls(self._failure)
        for member in self._members:
            member.replica.close()

    def _next_event(self, next_tick: float) -> Callable[[], None] | None:
        if (wait_s := next_tick - time.monotonic()) <= 0:
            return self._watch
        try:
            return self._inbox.get(timeout=wait_s)
        except queue.Empty:
            return self._watch

    def _start_all(self, answers: Answers) -> None:
        self._open.add(answers)
        self._loaders.add(answers)
        for member in self._members:
            self._start(member)

    def _set_target(self, target: Target, answers: Answers) -> None:
        self._target = target
        self._open.add(answers)
        self._loaders.add(answers)
        for member in self._members:
            if member.condition in (Condition.READY, Condition.LOADING):
                self._load(member)
        self._review()

    def _submit(self, tasks: Sequence[Task], answers: Answers) -> None:
        self._open.add(answers)
        for task in tasks:
            task.answers, task.number = answers, self._num_tasks
            self._num_tasks += 1
            heapq.heappush(self._waiting, (task.number, task))
        self._review()

    def _start(self, member: Member) -> None:
        member.condition = Condition.STARTING
        self._follow(member, member.replica.start, self._on_started)

    def _load(self, member: Member) -> None:
        """What the replica is doing is finished first, from the version before."""
        target = self._target
        assert target is not None
        member.condition = Condition.LOADING
        probes_N = () if target.probe is None else target.probe.token_ids_N
        load = partial(member.replica.load, target.adapter, target.files, probes_N)
        self._follow(member, load, partial(self._on_proof, target))

    def _follow(
        self,
        member: Member,
        call: Callable[[], Future[Any]],
        on_result: Callable[[Member, Any], None],
    ) -> None:
        """Starts what brings a replica into its next condition."""
        member.quiet_s = 0.0
        member.under_way = future = _called(call)
        is_restart = member.condition is Condition.STARTING and self._target is not None

        def arrived() -> None:
            if member.under_way is not future:
                return  # it was started again meanwhile, or a newer version was sent
            member.under_way = None
            error = future.exception()
            if error is None:
                on_result(member, future.result())
            elif isinstance(error, EngineError):
                self._on_failure(member, str(error))
            elif isinstance(error, StaleAdapterError):
                self._on_false_proof(member, str(error))
            elif isinstance(error, UserError) and is_restart:
                self._on_failure(member, str(error))  # the others have started well
            else:
                raise error

        future.add_done_callback(lambda _: self._inbox.put(arrived))

    def _on_started(self, member: Member, _: object) -> None:
        if self._target is None:
            member.condition, member.version = Condition.READY, BASE_VERSION
        else:
            self._load(member)
        self._review()

    def _on_proof(self, target: Target, member: Member, proof: Proof) -> None:
        if fault := self._prover.fault(proof, target.adapter, target.probe):
            self._on_false_proof(member, fault)
            return
        member.condition, member.version = Condition.READY, target.version
        member.num_false_proofs = 0
        self._review()

    def _on_false_proof(self, member: Member, fault: str) -> None:
        self.counters.false_proofs += 1
        member.num_false_proofs += 1
        self._on_failure(member, fault, is_hopeless=member.num_false_proofs >= _MAX_FALSE_PROOFS)

    def _on_failure(self, member: Member, reason: str, *, is_hopeless: bool = False) -> None:
        """Starts a replica again or leaves it out; its tasks are done by others."""
        tasks = [task for task in member.tasks.values() if task.answers.is_wanted]
        for task in tasks:
            heapq.heappush(self._waiting, (task.number, task))
        self.counters.sampled_again += sum(task.group is not None for task in tasks)
        member.tasks, member.under_way, member.version = {}, None, None
        member.note_busy()
        member.num_failures += 1
        member.reason = f"{member.replica.name}: {reason}"
        again = (
            f"; its {len(tasks)} groups are sampled elsewhere, with the same seeds" if tasks else ""
        )
        if is_hopeless or member.num_failures > self._max_restarts:
            member.condition = Condition.LEFT_OUT
            self._on_warning(f"{member.reason}; it is left out from now on{again}")
            member.replica.close()
        else:
            self.counters.restarts += 1
            self._on_warning(f"{member.reason}; it is started again{again}")
            self._start(member)
        self._review()

    def _review(self) -> None:
        """Answers the calls that have waited for this state, and sends what can be sent."""
        found = {member.condition for member in self._members}
        if found == {Condition.LEFT_OUT}:
            reasons = "; ".join(member.reason for member in self._members)
            self._end_calls(EngineError(f"no sampler is left ({reasons})"))
            return
        is_starting = Condition.STARTING in found and self._target is None
        if not is_starting and Condition.LOADING not in found and Condition.READY in found:
            for answers in self._loaders:
                answers.put(None)
            self._open -= self._loaders
            self._loaders.clear()
        self._send()

    def _send(self) -> None:
        """Each task goes to the replica with the most room, as long as any has room."""
        room = {member: member.room for member in self._members}
        chosen: dict[Member, list[Task]] = {}
        while self._waiting:
            member = max(room, key=room.__getitem__)
            if room[member] <= 0:
                break
            _, task = heapq.heappop(self._waiting)
            if task.answers.is_wanted:
                chosen.setdefault(member, []).append(task)
                room[member] -= task.size
        for member, tasks in chosen.items():
            groups = [task.group for task in tasks if task.group is not None]
            futures = iter(member.replica.sample(groups))
            for task in tasks:
                score = partial(member.replica.token_logprobs, task.token_ids_N)
                self._await(member, task, _called(score) if task.group is None else next(futures))
            member.note_busy()

    def _await(self, member: Member, task: Task, future: Future[Any]) -> None:
        task.version = member.version
        member.tasks[future] = task

        def arrived() -> None:
            if future in member.tasks:  # otherwise it was started again meanwhile
                self._on_answer(member, task, future)

        future.add_done_callback(lambda _: self._inbox.put(arrived))

    def _on_answer(self, member: Member, task: Task, future: Future[Any]) -> None:
        error = future.exception()
        if isinstance(error, EngineError):
            self._on_failure(member, str(error))
        elif isinstance(error, StaleAdapterError):
            self._on_false_proof(member, str(error))
        elif error is None and (fault := task.fault(future.result())):
            self._on_false_proof(member, fault)
        else:
            del member.tasks[future]
            member.note_busy()
            member.num_failures = 0
            task.answers.put((task.index, future.result()) if error is None else error)
            self._review()

    def _watch(self) -> None:
        for member in self._members:
            if member.condition is Condition.LEFT_OUT or member.has_progress(self._tick_s):
                continue
            if member.quiet_s >= self._timeout_s:
                is_starting = member.condition is Condition.STARTING
                what = "did not start" if is_starting else "gave no token"
                self._on_failure(member, f"{what} for {self._timeout_s:g} s (sampling.timeout_s)")

    def _end_calls(self, error: Exception) -> None:
        for answers in self._open:
            answers.put(error)
        self._open.clear()
        self._loaders.clear()
        self._waiting.clear()


def _called(call: Callable[[], Future[Any]]) -> Future[Any]:
    """The call's future; one with its exception where it raises at once."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 (raised by the future)
        failed: Future[Any] = Future()
        failed.set_exception(error)
        return failed
