"""Replicas in Ray actors: one process each, on this machine or on others of a cluster.

Ray places the actors, carries requests and adapters, and says when a process has died. Restarts are
ours and not Ray's (max_restarts=0): a new actor is needed as well where one hangs or answers with
the wrong version, and one that Ray restarts by itself would have the base model and not say so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from rl_lora.errors import EngineError, RunStoppedError, UserError
from rl_lora.samplers.fleet.hosted import EngineSpec, Host
from rl_lora.samplers.fleet.ray_start import RayCluster
from rl_lora.samplers.fleet.replica import AdapterFiles, GroupRequest, Proof, ReplicaError
from rl_lora.types import Adapter, Completion

_WATCH = "watch"
_CLOSE_S = 2.0  # for an actor to delete its files, before it is ended in any case


class EngineActor:
    """What runs in the actor's process: a `Host`, whose calls are answered as they finish.

    Ray may deliver calls in another order than that in which they were made, and the order says
    which version a group is sampled from, so that calls are numbered from 0.
    """

    def __init__(self, spec: EngineSpec, folder: Path | None, num_threads: int) -> None:
        self._host = Host(spec, folder, num_threads)
        self._turn, self._turns = 0, asyncio.Condition()

    async def start(self) -> int:
        """`Replica.max_samples`, once the engine is there."""
        return await asyncio.wrap_future(self._host.started)

    async def load(
        self,
        number: int,
        adapter: Adapter | None,
        files: AdapterFiles | None,
        probes_N: Sequence[Sequence[int]],
    ) -> Proof:
        return await self._in_turn(number, partial(self._host.load, adapter, files, probes_N))

    async def sample(self, number: int, group: GroupRequest, num_to_come: int) -> list[Completion]:
        return await self._in_turn(number, partial(self._host.sample, group, num_to_come))

    async def token_logprobs(
        self, number: int, token_ids_N: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        return await self._in_turn(number, partial(self._host.token_logprobs, token_ids_N))

    async def progress(self) -> object:
        return self._host.progress()

    async def close(self) -> None:
        self._host.close()

    async def _in_turn(self, number: int, call: Callable[[], Future[Any]]) -> Any:
        async with self._turns:
            await self._turns.wait_for(lambda: self._turn == number)
            future = call()
            self._turn += 1
            self._turns.notify_all()
        return await asyncio.wrap_future(future)


class RayReplica:
    """A `Replica` in a Ray actor.

    Args:
        name: for messages.
        cluster: where.
        spec: of its engine.
        shipped: the adapter that was sent last, shared by all replicas of a fleet.
    """

    def __init__(
        self, name: str, cluster: RayCluster, spec: EngineSpec, shipped: ShippedFiles
    ) -> None:
        self.name, self.max_samples = name, 0
        self._cluster, self._spec, self._shipped = cluster, spec, shipped
        self._actor: Any = None
        self._num_calls = 0
        self._poll: Future[Any] | None = None  # of the actor's progress
        self._seen: object = None

    def start(self) -> Future[None]:
        """A new process, and in it a new engine."""
        self._end()
        cluster = self._cluster
        actor_class = cluster.ray.remote(
            num_cpus=1,
            num_gpus=cluster.gpus_per_sampler,
            scheduling_strategy="SPREAD",
            concurrency_groups={_WATCH: 1},  # which answer whatever the others do
        )(EngineActor)
        self._num_calls, self._poll = 0, None
        self._actor = actor_class.remote(self._spec, cluster.folder, cluster.num_threads)
        return self._answer(self._actor.start.remote(), self._on_started)

    def load(
        self, adapter: Adapter | None, files: AdapterFiles | None, probes_N: Sequence[Sequence[int]]
    ) -> Future[Proof]:
        """The files travel through Ray's object store, once for each node."""
        shipped = None if files is None else self._shipped.reference(self._cluster.ray, files)
        call = self._actor.load.remote(self._number(), adapter, shipped, probes_N)
        return self._answer(call)

    def sample(self, groups: Sequence[GroupRequest]) -> list[Future[list[Completion]]]:
        """One call for each group."""
        return [
            self._answer(self._actor.sample.remote(self._number(), group, len(groups) - place))
            for place, group in enumerate(groups, 1)
        ]

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> Future[list[list[float]]]:
        """As the protocol says."""
        return self._answer(self._actor.token_logprobs.remote(self._number(), token_ids_N))

    def progress(self) -> object:
        """What the actor answered last; it is asked again as soon as it has answered."""
        if self._actor is None:
            return None
        if self._poll is not None and self._poll.done():
            if self._poll.exception() is None:
                found = self._poll.result()
                self._seen = object() if found is None else found
            self._poll = None
        if self._poll is None:
            watch = self._actor.progress.options(concurrency_group=_WATCH)
            self._poll = watch.remote().future()
        return self._seen

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        self._end()

    def _number(self) -> int:
        self._num_calls += 1
        return self._num_calls - 1

    def _on_started(self, max_samples: int) -> None:
        self.max_samples = max_samples

    def _end(self) -> None:
        if self._actor is None:
            return
        ray, actor, self._actor = self._cluster.ray, self._actor, None
        watch = actor.close.options(concurrency_group=_WATCH)
        ray.wait([watch.remote()], timeout=_CLOSE_S)
        ray.kill(actor)

    def _answer(self, reference: Any, on_result: Callable[[Any], object] = id) -> Future[Any]:
        """The future of a call, with this project's exceptions."""
        answer: Future[Any] = Future()

        def arrived(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                on_result(done.result())
                answer.set_result(done.result())
            else:
                answer.set_exception(self._translated(error))

        reference.future().add_done_callback(arrived)
        return answer

    def _translated(self, error: BaseException) -> BaseException:
        known = self._cluster.ray.exceptions
        cause = getattr(error, "cause", None)
        if isinstance(cause, EngineError):
            return ReplicaError(str(cause))
        if isinstance(cause, RunStoppedError | UserError):
            return cause
        if isinstance(error, known.OutOfMemoryError):
            return ReplicaError("Ray ended its process, as its node was running out of memory")
        if isinstance(error, known.RayError) and not isinstance(error, known.RayTaskError):
            return ReplicaError("its process has died")
        return error


class ShippedFiles:
    """Puts a version's files into Ray's object store, once for all replicas."""

    def __init__(self) -> None:
        self._sha256, self._reference = "", None

    def reference(self, ray: Any, files: AdapterFiles) -> Any:
        """Ray's reference to them."""
        if files.sha256 != self._sha256:
            self._reference = ray.put(files)
            self._sha256 = files.sha256
        return self._reference
