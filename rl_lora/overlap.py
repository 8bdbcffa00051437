"""One batch of scored rollouts per step; with staleness it is sampled while the learner works.

`sampling.max_staleness` = s lets sampling run ahead of the learner by up to s batches. They stay
whole and in order: step k learns from the k-th prompts, and its batch may be started as soon as
version k - 1 - s is there, so that no sample is more than s versions old. The losses stay as they
are: importance sampling uses the ratio of the policy to the sampler's own log-probs, whichever
version the sampler had. PPO, GSPO and CISPO bound how far the policy moves within the step, and
their truncated weight accounts for the versions in between. (The KL to the base, `algorithm.kl`,
remains an average over the sampler's tokens, as it is with several updates per batch.)

A sampler in the learner's process samples one batch after another, in one thread that also switches
its version between them; anything else that uses it (`set_adapter`, an evaluation,
`release_memory`) waits for the batches under way. Step k samples from version k - 1 - s, or 0, also
where a newer one is there: which one is there depends on timing, and so would the samples. As it
is, a run repeats, resumes exactly (a checkpoint needs the versions of the batches under way), and
is the same in all processes. The thread has its own gradient mode, switches and, on a GPU, stream;
it leaves PyTorch's random state to the main thread.

A sampler that switches while it samples (`sampler.switches_while_sampling`) gets a new version as
soon as it is published, and up to s + 1 batches at once. Their groups are of the newest version
where they are sampled, so what a run samples depends on timing; a resumed one samples the batches
under way again, from the newest version.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from rewards import Reward
from rl_lora.config import RunConfig
from rl_lora.config.dynamic import round_size
from rl_lora.data.stream import PromptStream
from rl_lora.errors import EngineError
from rl_lora.launchers import interruption
from rl_lora.rollouts import Scoring, sample_and_score, scoring_thread
from rl_lora.sampler import OnProgress, Sampler, is_on_rank_0, switches_while_sampling
from rl_lora.seeds import mix_seed
from rl_lora.types import Adapter, Prompt, SampleParams

T = TypeVar("T")

_POLL_S = 0.2  # between two looks whether a batch is still wanted


@dataclass(frozen=True)
class Request:
    """What one step samples.

    Example: Request(prompts_N=[Prompt(...)], params=SampleParams(...), position={"epoch": 0, ...})
    """

    prompts_N: list[Prompt]
    params: SampleParams
    position: dict[str, Any] = field(default_factory=dict)  # of the prompt stream, after these


@dataclass(frozen=True)
class Batch:
    """One step's completions; some may still be waiting for their scores.

    Example: Batch(scoring=Scoring(...), position={"epoch": 0, ...}, own={"system/sampler_s": 12.5})
    """

    scoring: Scoring
    position: dict[str, Any]  # of the prompt stream, after this batch's prompts
    own: dict[str, float]  # metrics of the sampling and of the checks of the sampler

    def metrics(self) -> dict[str, float]:
        """Seconds that the sampler and the scoring thread worked, the restarts of engines if there
        were any, and the checks; once the groups are there."""
        own = self.own | {"system/scorer_s": self.scoring.seconds}
        if self.scoring.num_restarts:
            own["system/engine_restarts"] = float(self.scoring.num_restarts)
        return own


@dataclass(frozen=True)
class _Sampled:
    begin_s: float  # of time.perf_counter
    end_s: float
    checks: dict[str, float]  # metrics


@dataclass
class _Job:
    """A batch under way."""

    request: Request
    adapter: Adapter  # it is sampled from this version, or from a newer one
    scoring: Scoring
    has_version: Future[None]  # of a sampler that switches while it samples
    sampled: Future[_Sampled]


class RolloutWorker:
    """Makes the batches of a run's steps; a context manager, whose end stops any sampling.

    Args:
        sampler: this worker's from now on: everything else goes through `set_adapter` or `wait`.
        reward: scores the completions, in its own thread.
        requests: one per step, drawn when its batch is started.
        max_staleness: how many batches sampling may be ahead of the caller, who learns meanwhile.
        check: compares a sampler that runs ahead in this process with the policy of its version,
            before each batch; returns metrics.
    """

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward,
        requests: Iterator[Request],
        *,
        max_staleness: int = 0,
        check: Callable[[Adapter], dict[str, float]] = lambda adapter: {},
    ) -> None:
        self._sampler, self._reward, self._requests = sampler, reward, requests
        self._max_staleness, self._check = max_staleness, check
        self._switches = max_staleness > 0 and switches_while_sampling(sampler)
        self._scorer = scoring_thread()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._threads = ThreadPoolExecutor(
            max_staleness + 1 if self._switches else 1,
            "sampler",
            initializer=_set_up_thread,
            initargs=(torch.get_num_threads(), gpu),
        )
        self._switching = ThreadPoolExecutor(1, "switching")
        self._in_use: Adapter | None = None  # None: the base, or unknown
        self._has_version = _done(None)  # when the sampler has `_in_use`, if it switches
        self._under_way: deque[_Job] = deque()
        self._last_end_s: float | None = None  # of the batches so far
        self._num_restarts = 0  # of the sampler's engine, until the newest batch

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._under_way:
            job.scoring.stop()
        for threads in (self._threads, self._switching, self._scorer):
            threads.shutdown(wait=True, cancel_futures=True)
        if self._has_version.cancelled():  # the evaluation at the end may need it
            self._in_use, self._has_version = None, _done(None)

    def next_batch(
        self, adapter: Adapter, older: Sequence[Adapter] = (), *, is_last: bool = True
    ) -> Batch:
        """The next step's batch, sampled from `adapter` or, where sampling runs ahead, from a
        version before; the one that may now be sampled from `adapter` is started.

        Args:
            adapter: the newest version.
            older: the `max_staleness` versions before it, if there are so many. The first batches
                of this process are sampled from them.
            is_last: no `sample` may follow in this step.

        Raises:
            StaleAdapterError: the sampler had another version.
            Exception: whatever sampling or scoring raised.
        """
        if not self._max_staleness:
            batch = self.sample(next(self._requests), adapter, is_last=is_last)
        else:
            batch = self._next_of_many(adapter, older)
        if switches_while_sampling(self._sampler):
            batch.own.update(getattr(self._sampler, "metrics", dict)())
        return batch

    def sample(self, request: Request, adapter: Adapter, *, is_last: bool = True) -> Batch:
        """A batch of the present step, where sampling and learning take turns.

        is_last: the learner is next, and gets the memory that only sampling needs.
        """
        self.ensure_adapter(adapter)
        job = self._job(request, adapter)
        batch = self._batch(job, self._sample(job))
        if is_last:
            self._sampler.release_memory()
        return batch

    def release_memory(self) -> None:
        """Frees the memory that only sampling needs, after batches none of which was the last."""
        self._sampler.release_memory()

    def _next_of_many(self, adapter: Adapter, older: Sequence[Adapter]) -> Batch:
        """`next_batch` where sampling runs ahead."""
        versions = [adapter]
        if not self._under_way:  # the first in this process
            known = [adapter] if self._switches else [*older, adapter]
            versions = [*known[:1] * self._max_staleness, *known][-self._max_staleness - 1 :]
        for version in versions:
            self.start(version)
        batch = self.pop()
        if not self._under_way:
            self._sampler.release_memory()
        return batch

    def offer(self, adapter: Adapter) -> None:
        """Switches the sampler to a new version, if it can; `next_batch` does it otherwise."""
        if self._switches:
            self._switch(adapter)
        elif not self._under_way:
            self.ensure_adapter(adapter)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Switches the sampler to this version, or to the base, once it is free."""
        self.wait()
        self._sampler.set_adapter(adapter)
        if self._max_staleness and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the thread that samples has another stream
        self._in_use = adapter

    def ensure_adapter(self, adapter: Adapter | None) -> None:
        """As `set_adapter`, which is skipped if the sampler has this version already."""
        self.wait()
        if adapter is None or adapter != self._in_use:
            self.set_adapter(adapter)

    def start(self, adapter: Adapter) -> bool:
        """Starts the next request's batch from this version; False: there is none left."""
        if (request := next(self._requests, None)) is None:
            return False
        if self._switches:
            self._switch(adapter)
        job = self._job(request, adapter)
        job.sampled = self._threads.submit(self._sample, job)
        self._under_way.append(job)
        return True

    def wait(self) -> None:
        """Waits until the sampler is free for another caller: with all batches under way, or, one
        that switches while it samples, with its present version. Raises what sampling raised."""
        if self._switches:
            with interruption.abandonable():
                self._has_version.result()
            return
        for job in self._under_way:
            self._result(job)

    def pop(self) -> Batch:
        """The oldest batch that was started, once it is sampled. Raises as `next_batch`."""
        job = self._under_way[0]
        sampled = self._result(job)
        self._under_way.popleft()
        return self._batch(job, sampled)

    def _result(self, job: _Job) -> _Sampled:
        """A batch whose engine failed is sampled again here: only this thread makes a new one."""
        with interruption.abandonable():
            error = job.sampled.exception()
        if isinstance(error, EngineError) and not self._switches:
            # Those after it fail as well, and must have before there is another engine.
            futures.wait([later.sampled for later in self._under_way])
            job.scoring = self._scoring(job.request)
            error = None
            job.sampled = Future()  # the exception's frames hold the old engine
            job.sampled.cancel()  # so that nobody waits for it if this fails, too
            job.sampled = _done(self._sample(job))
        return job.sampled.result()

    def _switch(self, adapter: Adapter) -> None:
        if adapter != self._in_use:
            self._in_use = adapter
            self._has_version = self._switching.submit(self._sampler.set_adapter, adapter)

    def _job(self, request: Request, adapter: Adapter) -> _Job:
        return _Job(request, adapter, self._scoring(request), self._has_version, Future())

    def _scoring(self, request: Request) -> Scoring:
        on_rank_0 = is_on_rank_0(self._sampler)
        return Scoring(request.prompts_N, self._reward, self._scorer, is_on_rank_0=on_rank_0)

    def _sample(self, job: _Job) -> _Sampled:
        """Any thread's; checks the version of a sampler that runs ahead in this process."""
        version: int | None = job.adapter.version
        checks: dict[str, float] = {}
        if self._switches:
            version = None  # `liveness.drop_stale` looks at each sample
            while not futures.wait([job.has_version], timeout=_POLL_S).done:
                job.scoring.check_wanted()
            job.has_version.result()
        elif self._max_staleness:
            if job.adapter != self._in_use:
                self._sampler.set_adapter(job.adapter)
                self._in_use = job.adapter
            checks = self._check(job.adapter)
        begin_s = time.perf_counter()
        sample_and_score(self._sampler, job.scoring, job.request.params, version=version)
        return _Sampled(begin_s, time.perf_counter(), checks)

    def _batch(self, job: _Job, sampled: _Sampled) -> Batch:
        num_restarts = getattr(self._sampler, "num_restarts", 0)
        job.scoring.num_restarts = num_restarts - self._num_restarts
        self._num_restarts = num_restarts
        own = sampled.checks | {"system/sampler_s": sampled.end_s - sampled.begin_s}
        if self._max_staleness:
            last_s = sampled.begin_s if self._last_end_s is None else self._last_end_s
            self._last_end_s = max(last_s, sampled.end_s)
            # Where several are under way at a time, they share the seconds.
            own["system/sampler_s"] = self._last_end_s - max(last_s, sampled.begin_s)
            own["system/sampler_idle_s"] = max(0.0, sampled.begin_s - last_s)
        return Batch(job.scoring, job.request.position, own)


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def requests(draw: Callable[[int], Request], num_done: int, num_steps: int) -> Iterator[Request]:
    """What steps num_done + 1, ..., num_steps sample first, each drawn when it is needed."""
    return map(draw, range(num_done + 1, num_steps + 1))


# limits: the job, and which round of which step
def make_request(
    config: RunConfig,
    stream: PromptStream,
    on_progress: OnProgress,
    step: int,
    num_rounds: int = 0,
    num_missing: int | None = None,
) -> Request:
    """What a step samples next, drawn from the stream.

    Args:
        config: the job.
        stream: of its prompts.
        on_progress: is called with the number of completions that there will be.
        step: the step's number.
        num_rounds: of the step before this one.
        num_missing: groups with signal that it still lacks; None: all.
    """
    num_prompts = round_size(config.sampling, num_missing)
    prompts_N = stream.take(num_prompts, is_same_step=num_rounds > 0)
    on_progress(0, num_prompts * config.sampling.num_samples, 0)
    return Request(prompts_N, step_params(config, step, num_rounds), stream.state_dict())


def step_params(config: RunConfig, step: int, num_rounds: int = 0) -> SampleParams:
    """How step `step` samples after so many rounds; its seed is derived from the run's seed, the
    step and that number, so that a prompt that comes up again gets other samples."""
    sampling = config.sampling
    rounds = ("round", num_rounds) if num_rounds else ()
    return SampleParams(
        num_samples=sampling.num_samples,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        stop=sampling.stop,
        seed=mix_seed(config.run.seed, "step", step, *rounds),
    )


def _set_up_thread(num_threads: int, gpu: int | None) -> None:
    """The main thread's number of PyTorch threads and GPU, there with a second stream.

    By default a new thread would inherit what the learner has set for its own workers right now,
    and use the first GPU.
    """
    torch.set_num_threads(num_threads)
    if gpu is not None:
        torch.cuda.set_device(gpu)
        torch.cuda.set_stream(torch.cuda.Stream())
