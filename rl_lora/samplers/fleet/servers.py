"""A `Replica` on a running `vllm serve`, for those who run their own fleet.

Token ids go in; token ids with log-probs come out (`/inference/v1/generate`), one request per
sample, each with its own seed. An adapter goes through a folder that the server sees as well
(`SharedVersions`), under a name that is never used again: vLLM's prefix cache is keyed by names.
Each answer says which model it is from, and one from another is an error: while an adapter is not
loaded, servers have been seen to sample from the base in silence. Everything runs in one event loop
in a thread of the replica's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from rl_lora.errors import UserError
from rl_lora.sampler import BASE_VERSION, Stops
from rl_lora.samplers.fleet.replica import AdapterFiles, GroupRequest, Proof, ReplicaError
from rl_lora.samplers.fleet.server_checks import (
    LOAD,
    UNLOAD,
    ServerFacts,
    check_server,
    load_error,
    tokens_so_far,
)
from rl_lora.samplers.fleet.server_client import LOAD_S, Answer, ServerClient
from rl_lora.samplers.fleet.server_messages import (
    GENERATE,
    max_answer_bytes,
    sampled,
    scored,
    scoring_settings,
)
from rl_lora.samplers.fleet.shared_versions import SharedVersion, SharedVersions
from rl_lora.samplers.vllm.requests import check_request, sampling_settings
from rl_lora.types import Adapter, Completion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_POLL_S = 1.0  # between questions to a server whether it works, or is back
_CLOSE_S = 2.0  # for taking leave of a server


@dataclass(frozen=True, slots=True)
class ServedJob:
    """What a job's replicas on servers have in common.

    Example: ServedJob(tokenizer=..., end_token_ids=(2,), max_model_len=2048, vocab_size=32000,
    max_samples=256, max_lora_rank=1, wait_s=600.0, versions=SharedVersions(Path("/mnt/q/served")))
    """

    tokenizer: PreTrainedTokenizerBase
    end_token_ids: tuple[int, ...]  # that end a completion
    max_model_len: int  # tokens of the longest prompt with its longest completion
    vocab_size: int
    max_samples: int  # sent to a server at once
    max_lora_rank: int  # that a server needs
    wait_s: float  # for a server that has gone to come back
    versions: SharedVersions


@dataclass(slots=True, eq=False)
class _Loaded:
    """What a server has loaded, or will have, and the samples that are under way from it."""

    version: int
    ready: Future[None] = field(default_factory=Future)
    model: str = ""  # the server's name for it, once it is ready
    shared: SharedVersion | None = None  # None: the base model
    num_open: int = 0


@dataclass(slots=True)
class _Server:
    """A server that was found to be up, until it is started again."""

    client: ServerClient
    facts: ServerFacts
    loaded: list[_Loaded] = field(default_factory=list)  # the newest is the last
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)  # one after another


class HttpReplica:
    """See `Replica`. `start` only looks whether the server is there: it is not ours.

    Args:
        url: http://HOST:PORT of a `vllm serve`.
        job: what it serves.
    """

    def __init__(self, url: str, job: ServedJob) -> None:
        self.name, self.max_samples = url, job.max_samples
        self._job = job
        self._server: _Server | None = None
        self._newest: _Loaded | None = None  # by the last `load`
        self._was_up = self._has_loaded = False
        self._left: list[str] = []  # names on the server of what it had loaded before it failed
        self._num_done, self._num_tokens = 0, 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=url, daemon=True)
        self._thread.start()

    def start(self) -> Future[None]:
        """The first time, the server has to be there; later it is waited for.

        Raises:
            UserError: it is not, or lacks something that it needs (by the future).
        """
        self._newest = None
        return self._submit(self._start())

    def load(
        self,
        adapter: Adapter | None,
        files: AdapterFiles | None,
        probes_N: Sequence[Sequence[int]],
    ) -> Future[Proof]:
        """As `Replica.load`."""
        self._newest = _Loaded(BASE_VERSION if adapter is None else adapter.version)
        return self._submit(self._load(self._newest, adapter, files, probes_N))

    def sample(self, groups: Sequence[GroupRequest]) -> list[Future[list[Completion]]]:
        """As `Replica.sample`."""
        return [self._submit(self._sample(group, self._newest)) for group in groups]

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> Future[list[list[float]]]:
        """As `Replica.token_logprobs`."""
        return self._submit(self._token_logprobs(token_ids_N, self._newest))

    def progress(self) -> object:
        """Finished calls, and the tokens that the server has counted, for anyone."""
        return self._num_done, self._num_tokens

    def close(self) -> None:
        """Unloads what was loaded, if the server still answers."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result(2 * _CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, call: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop.is_closed():
            call.close()
            raise RuntimeError(f"the replica {self.name} is closed")

        async def counted() -> T:
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                return await call
            finally:
                self._tasks.discard(task)
                self._num_done += 1

        return asyncio.run_coroutine_threadsafe(counted(), self._loop)

    # In the loop's thread ------------------------------------------------------------------------

    async def _start(self) -> None:
        await self._drop(asyncio.current_task())
        client = ServerClient(self.name)
        try:
            facts = await self._found(client)
        except BaseException:
            await client.close()
            raise
        self._server, self._was_up = _Server(client, facts), True
        while self._left:  # 404 where the server has been started again
            await client.post(UNLOAD, {"lora_name": self._left.pop()})
        self._tasks.add(asyncio.create_task(self._watch(self._server)))

    async def _found(self, client: ServerClient) -> ServerFacts:
        try:
            async with asyncio.timeout(self._job.wait_s if self._was_up else None):
                while True:
                    try:
                        answer = await client.get("/health")
                        if not answer.is_ok:
                            raise ReplicaError(f"{answer.url} answered {answer.described()}")
                        return await check_server(client, self._job.max_model_len)
                    except ReplicaError as error:
                        if not self._was_up:
                            raise UserError(
                                f"resources.servers: {error}; start `vllm serve` there first, or "
                                "correct the address"
                            ) from error
                    await asyncio.sleep(_POLL_S)
        except TimeoutError as error:
            raise ReplicaError(
                f"{self.name} did not come back for {self._job.wait_s:g} s (sampling.timeout_s)"
            ) from error
        except UserError as error:
            raise self._refusal(error, has_worked=self._was_up) from error

    async def _drop(self, keep: asyncio.Task[Any] | None) -> None:
        """Ends everything that is under way, and forgets what was loaded."""
        tasks = [task for task in self._tasks if task is not keep]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.difference_update(tasks)
        if (server := self._server) is not None:
            self._server = None
            for loaded in server.loaded:
                if loaded.shared is not None:
                    self._left.append(loaded.model)
                self._release(loaded)
            await server.client.close()

    async def _leave(self) -> None:
        server = self._server
        with contextlib.suppress(ReplicaError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                for loaded in list(server.loaded) if server else []:
                    if server and loaded.shared is not None:
                        await server.client.post(UNLOAD, {"lora_name": loaded.model})
        await self._drop(asyncio.current_task())

    async def _watch(self, server: _Server) -> None:
        """Counts the server's tokens while something is under way. A server that does not answer
        makes no progress, and whoever waits for it acts on that."""
        while True:
            await asyncio.sleep(_POLL_S)
            if len(self._tasks) > 1:
                with contextlib.suppress(ReplicaError):
                    self._num_tokens = await tokens_so_far(server.client) or 0.0

    async def _load(
        self,
        loaded: _Loaded,
        adapter: Adapter | None,
        files: AdapterFiles | None,
        probes_N: Sequence[Sequence[int]],
    ) -> Proof:
        try:
            server = self._live()
            async with server.loading:
                loaded.model = server.facts.model
                if adapter is not None and files is not None:
                    await self._load_adapter(server.client, loaded, adapter, files)
                server.loaded.append(loaded)
                logprobs_N = await self._scores(server, loaded, probes_N)
                await self._unload_old(server)
        except BaseException as error:
            loaded.ready.set_exception(
                error
                if isinstance(error, Exception)
                else ReplicaError(f"{self.name}: loading an adapter was given up")
            )
            raise
        loaded.ready.set_result(None)
        found = "" if loaded.shared is None else loaded.shared.fingerprint
        return Proof(loaded.version, found, logprobs_N)

    async def _load_adapter(
        self, client: ServerClient, loaded: _Loaded, adapter: Adapter, files: AdapterFiles
    ) -> None:
        versions = self._job.versions
        shared = await asyncio.to_thread(versions.hold, adapter, files)
        loaded.model = f"{adapter.name}-{secrets.token_hex(8)}"
        try:
            body = {"lora_name": loaded.model, "lora_path": str(shared.path)}
            answer = await client.post(LOAD, body, limit_s=LOAD_S)
            if not answer.is_ok:
                error = load_error(client.url, answer, shared.path, self._job.max_lora_rank)
                raise self._refusal(error, has_worked=self._has_loaded)
        except BaseException:
            versions.release(shared)
            raise
        loaded.shared, self._has_loaded = shared, True

    def _refusal(self, error: UserError, *, has_worked: bool) -> UserError | ReplicaError:
        """A server that has worked before and does not now is one that fails; others may work."""
        return ReplicaError(str(error)) if has_worked else error

    async def _unload_old(self, server: _Server) -> None:
        """What nothing is sampled from any more, but for the newest."""
        for loaded in server.loaded[:-1]:
            if loaded.num_open:
                continue
            if loaded.shared is not None:
                answer = await server.client.post(UNLOAD, {"lora_name": loaded.model})
                if answer.status not in (200, 404):  # 404: the server has been started again
                    raise ReplicaError(f"{answer.url} answered {answer.described()}")
            server.loaded.remove(loaded)
            self._release(loaded)

    def _release(self, loaded: _Loaded) -> None:
        if loaded.shared is not None:
            self._job.versions.release(loaded.shared)

    async def _sample(self, group: GroupRequest, loaded: _Loaded | None) -> list[Completion]:
        params = group.params
        check_request([group.prompt], params, self._job.max_model_len)
        server = self._live()
        stops = Stops.of(params.stop, self._job.tokenizer)
        async with self._using(server, loaded) as ready:
            samples = [
                asyncio.create_task(self._one(server, ready, group, stops, seed))
                for seed in group.seeds_G
            ]
            try:
                return list(await asyncio.gather(*samples))
            finally:
                for sample in samples:  # the others, if one has failed
                    sample.cancel()

    @contextlib.asynccontextmanager
    async def _using(self, server: _Server, loaded: _Loaded | None) -> AsyncIterator[_Loaded]:
        """What to sample from, once it is ready; it is not unloaded inside. None: the base."""
        if loaded is None:
            loaded = _Loaded(BASE_VERSION, model=server.facts.model)
            loaded.ready.set_result(None)
        loaded.num_open += 1
        try:
            await asyncio.shield(asyncio.wrap_future(loaded.ready))
            yield loaded
        finally:
            loaded.num_open -= 1

    async def _one(
        self, server: _Server, loaded: _Loaded, group: GroupRequest, stops: Stops, seed: int
    ) -> Completion:
        params = group.params
        sampling = sampling_settings(params, stops, seed, self._job.end_token_ids)
        answer = await self._generate(
            server, loaded, group.prompt.token_ids, sampling, params.max_tokens
        )
        token_ids, logprobs_T, is_truncated = sampled(
            answer, loaded.model, params.max_tokens, self._job.vocab_size
        )
        text = str(self._job.tokenizer.decode(list(token_ids), skip_special_tokens=True))
        self._num_done += 1
        return Completion(token_ids, text, logprobs_T, is_truncated, loaded.version)

    async def _generate(
        self,
        server: _Server,
        loaded: _Loaded,
        token_ids: Sequence[int],
        sampling: dict[str, Any],
        num_answered: int,
    ) -> Answer:
        body = {"model": loaded.model, "token_ids": list(token_ids), "sampling_params": sampling}
        max_bytes = max_answer_bytes(num_answered)
        return await server.client.post(GENERATE, body, limit_s=None, max_bytes=max_bytes)

    async def _token_logprobs(
        self, token_ids_N: Sequence[Sequence[int]], loaded: _Loaded | None
    ) -> list[list[float]]:
        server = self._live()
        async with self._using(server, loaded) as ready:
            return await self._scores(server, ready, token_ids_N)

    async def _scores(
        self, server: _Server, loaded: _Loaded, token_ids_N: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        logprobs_N: list[list[float]] = []
        for token_ids in token_ids_N:
            if len(token_ids) >= server.facts.max_model_len:  # one token is sampled as well
                raise UserError(
                    f"a sequence of {len(token_ids)} tokens leaves no room in the "
                    f"{server.facts.max_model_len} of {self.name}; raise its --max-model-len"
                )
            if len(token_ids) < 2:
                logprobs_N.append([])
                continue
            answer = await self._generate(
                server, loaded, token_ids, scoring_settings(), len(token_ids)
            )
            logprobs_N.append(scored(answer, loaded.model, tuple(token_ids)))
        return logprobs_N

    def _live(self) -> _Server:
        if self._server is None:
            raise ReplicaError(f"{self.name} was not found to be up")
        return self._server
