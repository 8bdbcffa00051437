"""One batch of scored rollouts per step; with overlap it is sampled while the learner works.

One-step off-policy (`sampling.overlap`): while the learner works on step k, a thread samples the
batch of step k + 1 from version k - 1, the newest there is. The losses stay as they are: importance
sampling uses the ratio of the policy to the sampler's own log-probs, whichever version the sampler
had. PPO, GSPO and CISPO bound how far the policy moves within the step, and their truncated weight
accounts for the version in between. (The KL to the base, `algorithm.kl`, remains an average over
the sampler's tokens, as it is with several updates per batch.)

The sampler belongs to one thread at a time: before anything else uses it (`set_adapter`, an
evaluation, `release_memory`), `wait` waits for the batch being sampled. The thread has its own
gradient mode, switches and, on a GPU, stream; it leaves PyTorch's random state to the main thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rewards import Reward
from rl_lora.config import RunConfig
from rl_lora.data.stream import PromptStream
from rl_lora.errors import EngineError
from rl_lora.launchers import interruption
from rl_lora.rollouts import Scoring, sample_and_score, scoring_thread
from rl_lora.sampler import OnProgress, Sampler
from rl_lora.seeds import mix_seed
from rl_lora.types import Adapter, Prompt, SampleParams


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

    Example: Batch(version=3, scoring=Scoring(...), position={"epoch": 0, ...}, sampler_s=12.5)
    """

    version: int  # of the adapter that sampled it
    scoring: Scoring
    position: dict[str, Any]  # of the prompt stream, after this batch's prompts
    sampler_s: float  # the sampler's own seconds, whether or not anyone waited for it
    checks: dict[str, float] = field(default_factory=dict)  # metrics of the check of the sampler

    def metrics(self) -> dict[str, float]:
        """Seconds that the sampler and the scoring thread worked, the restarts of engines if there
        were any, and the checks; once the groups are there."""
        own = {"system/sampler_s": self.sampler_s, "system/scorer_s": self.scoring.seconds}
        if self.scoring.num_restarts:
            own["system/engine_restarts"] = float(self.scoring.num_restarts)
        return own | self.checks


class RolloutWorker:
    """Makes the batches of a run's steps; a context manager, whose end stops any sampling.

    Args:
        sampler: this worker's from now on: everything else goes through `set_adapter` or `wait`.
        reward: scores the completions, in its own thread.
        requests: one per step, drawn when its sampling starts.
        overlap: sample the next step's batch while the caller learns from this one.
        check: with overlap, called when the sampler has the newest version; returns metrics.
    """

    def __init__(
        self,
        sampler: Sampler,
        reward: Reward,
        requests: Iterator[Request],
        *,
        overlap: bool = False,
        check: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self._sampler, self._reward, self._requests = sampler, reward, requests
        self._overlap, self._check = overlap, check
        self._scorer = scoring_thread()
        gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = ThreadPoolExecutor(
            1, "sampler", initializer=_set_up_thread, initargs=(torch.get_num_threads(), gpu)
        )
        self._in_use: Adapter | None = None  # None: the base, or unknown
        self._under_way: Future[Batch] | None = None
        self._started: tuple[Request, int] | None = None  # what was started last, of which version
        self._scoring: Scoring | None = None
        self._num_restarts = 0  # of the sampler's engine, until the newest batch

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scoring is not None:
            self._scoring.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._scorer.shutdown(wait=True, cancel_futures=True)

    def next_batch(self, adapter: Adapter, previous: Adapter | None = None) -> Batch:
        """The next step's batch, sampled from `adapter`.

        With overlap it was sampled from `previous` (from `adapter` if there is none), and sampling
        of the one after it, from `adapter`, starts now.

        Raises:
            StaleAdapterError: the sampler had another version.
            Exception: whatever sampling or scoring raised.
        """
        if not self._overlap:
            self.ensure_adapter(adapter)
            request = next(self._requests)
            batch = self._make(request, self._new_scoring(request), adapter.version)
            self._sampler.release_memory()  # for the learner
            return batch
        if self._under_way is None:  # the first in this process; a resumed run samples it again
            oldest = previous or adapter
            self.ensure_adapter(oldest)
            self.start(oldest.version)  # in the thread as well: it would round differently here
        batch = self.pop()
        self.ensure_adapter(adapter)
        batch = replace(batch, checks=self._check())
        if not self.start(adapter.version):
            self._sampler.release_memory()
        return batch

    def offer(self, adapter: Adapter) -> None:
        """Switches the sampler to this version unless it is sampling; `next_batch` does it then."""
        if self._under_way is None:
            self.ensure_adapter(adapter)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Switches the sampler to this version, or to the base, once it has finished its batch."""
        self.wait()
        self._sampler.set_adapter(adapter)
        self._in_use = adapter

    def ensure_adapter(self, adapter: Adapter | None) -> None:
        """As `set_adapter`, which is skipped if the sampler has this version already."""
        if adapter is None or adapter != self._in_use:
            self.set_adapter(adapter)

    def start(self, version: int) -> bool:
        """Starts sampling the next request from the version in use; False: there is none left."""
        assert self._under_way is None, "one batch at a time"
        if (request := next(self._requests, None)) is None:
            return False
        self._scoring, self._started = self._new_scoring(request), (request, version)
        self._under_way = self._thread.submit(self._make, request, self._scoring, version)
        return True

    def wait(self) -> None:
        """Waits until the sampler is free. Raises what sampling raised.

        A batch whose engine failed is sampled again here: only this thread makes a new engine.
        """
        if self._under_way is None:
            return
        with interruption.abandonable():
            error = self._under_way.exception()
        if not isinstance(error, EngineError):
            self._under_way.result()
            return
        assert self._started is not None
        request, version = self._started
        error = self._under_way = None  # the exception's frames hold the old engine
        again: Future[Batch] = Future()
        again.set_result(self._make(request, self._new_scoring(request), version))
        self._under_way = again

    def pop(self) -> Batch:
        """The batch that was started, once it is sampled. Raises as `next_batch`."""
        self.wait()
        assert self._under_way is not None, "no batch was started"
        batch, self._under_way = self._under_way.result(), None
        return batch

    def _new_scoring(self, request: Request) -> Scoring:
        return Scoring(request.prompts_N, self._reward, self._scorer)

    def _make(self, request: Request, scoring: Scoring, version: int) -> Batch:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the version was loaded on another thread's stream
        start = time.perf_counter()
        sample_and_score(self._sampler, scoring, request.params, version=version)
        num_restarts = getattr(self._sampler, "num_restarts", 0)
        scoring.num_restarts = num_restarts - self._num_restarts
        self._num_restarts = num_restarts
        return Batch(version, scoring, request.position, time.perf_counter() - start)


def requests(
    config: RunConfig, stream: PromptStream, num_done: int, on_progress: OnProgress
) -> Iterator[Request]:
    """What steps num_done + 1, num_done + 2, ... sample, each drawn from the stream when needed."""
    for step in range(num_done + 1, config.run.num_steps + 1):
        prompts_N = stream.take(config.sampling.num_prompts)
        on_progress(0, len(prompts_N) * config.sampling.num_samples, 0)
        yield Request(prompts_N, step_params(config, step), stream.state_dict())


def step_params(config: RunConfig, step: int) -> SampleParams:
    """How step `step` samples; its seed is derived from the run's seed and the step."""
    sampling = config.sampling
    return SampleParams(
        num_samples=sampling.num_samples,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        stop=sampling.stop,
        seed=mix_seed(config.run.seed, "step", step),
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
