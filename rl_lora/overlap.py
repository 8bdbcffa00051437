"""RolloutWorker of samples with their scores under way; the next one in a thread while others
learn.

One-step off-policy (`sampling.overlap`): while the learner works on step k, the batch of step k + 1
is sampled from version k - 1, the newest that there is. The losses need no change: importance
sampling takes the policy's ratio to the sampler's own log-probs, whatever version the sampler had;
PPO, GSPO and CISPO bound the policy's way within the step, and the version between is in their
truncated weight. (The KL to the base, `algorithm.kl`, stays an average over the sampler's tokens,
as with several updates a batch.)

The sampler belongs to one thread at a time: whoever calls it otherwise (`set_adapter`, an
evaluation, `release_memory`) waits for the batch under way with `wait`. The thread has its own
gradient mode, switches and, on a GPU, stream; PyTorch's random state it leaves to the main thread.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from rewards import Reward
from rl_lora.config import RunConfig
from rl_lora.rollouts import Scoring, sample_and_score, scoring_thread
from rl_lora.sampler import Sampler
from rl_lora.seeds import mix_seed
from rl_lora.types import Adapter, Prompt, SampleParams


@dataclass(frozen=True)
class Batch:
    """One step's completions; their scores may still be under way.

    Example: Batch(version=3, scoring=Scoring(...), sampler_s=12.5)
    """

    version: int  # of the adapter that sampled it
    scoring: Scoring
    sampler_s: float  # the sampler's own seconds, whether or not anybody waited
    checks: dict[str, float] = field(default_factory=dict)  # of the sampler, as metrics

    def metrics(self) -> dict[str, float]:
        """Seconds that sampler and scoring thread have worked, and the checks."""
        own = {"system/sampler_s": self.sampler_s, "system/scorer_s": self.scoring.seconds}
        return own | self.checks


class RolloutWorker:
    """Makes a batch here (`sample`) or beside the caller (`start`, then `pop`).

    A context manager; what is under way at its end is stopped at the next finished group.
    """

    def __init__(self, sampler: Sampler, reward: Reward) -> None:
        self._sampler, self._reward = sampler, reward
        self._scorer = scoring_thread()
        self._thread = ThreadPoolExecutor(
            1, "sampler", initializer=_set_up_thread, initargs=(torch.get_num_threads(),)
        )
        self._in_use: Adapter | None = None  # None: the base, or not known
        self._under_way: Future[Batch] | None = None
        self._scoring: Scoring | None = None

    def __enter__(self) -> RolloutWorker:
        return self

    def __exit__(self, *_: object) -> None:
        if self._scoring is not None:
            self._scoring.stop()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._scorer.shutdown(wait=True, cancel_futures=True)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """The sampler on this version, or on the base, once it has sampled what it has in hand."""
        self.wait()
        self._sampler.set_adapter(adapter)
        self._in_use = adapter

    def ensure_adapter(self, adapter: Adapter | None) -> None:
        """As `set_adapter`; nothing is done where the sampler is on it already."""
        if adapter is None or adapter != self._in_use:
            self.set_adapter(adapter)

    def sample(self, prompts_N: Sequence[Prompt], params: SampleParams, version: int) -> Batch:
        """A batch of the adapter version in use.

        Raises:
            StaleAdapterError: the sampler had another version.
            Exception: what sampling or scoring has raised.
        """
        return self._make(Scoring(prompts_N, self._reward, self._scorer), params, version)

    def start(self, prompts_N: Sequence[Prompt], params: SampleParams, version: int) -> None:
        """Begins a batch of the version in use; the sampler is the thread's until `wait`."""
        assert self._under_way is None, "one batch at a time"
        self._scoring = Scoring(prompts_N, self._reward, self._scorer)
        self._under_way = self._thread.submit(self._make, self._scoring, params, version)

    def sample_in_thread(
        self, prompts_N: Sequence[Prompt], params: SampleParams, version: int
    ) -> Batch:
        """As `sample`, in the thread that batches ahead are sampled in, so that it rounds alike."""
        self.start(prompts_N, params, version)
        batch = self.pop()
        assert batch is not None
        return batch

    def wait(self) -> None:
        """Waits until the sampler is free. Raises what sampling has raised, if it has."""
        if self._under_way is not None:
            self._under_way.result()

    def pop(self) -> Batch | None:
        """The batch that was started, once it is sampled; None: none was. Raises as `sample`."""
        if self._under_way is None:
            return None
        batch, self._under_way = self._under_way.result(), None
        return batch

    def _make(self, scoring: Scoring, params: SampleParams, version: int) -> Batch:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the version was loaded on another thread's stream
        start = time.perf_counter()
        sample_and_score(self._sampler, scoring, params, version=version)
        return Batch(version, scoring, time.perf_counter() - start)


def step_params(config: RunConfig, step: int) -> SampleParams:
    """How step `step` samples; its seed follows from the run's and the step's number."""
    sampling = config.sampling
    return SampleParams(
        num_samples=sampling.num_samples,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        stop=sampling.stop,
        seed=mix_seed(config.run.seed, "step", step),
    )


def _set_up_thread(num_threads: int) -> None:
    """PyTorch's threads as in the main thread, and a stream beside the learner's on a GPU.

    By default a new thread would take over what the learner has set for its workers of the moment.
    """
    torch.set_num_threads(num_threads)
    if torch.cuda.is_initialized():
        torch.cuda.set_stream(torch.cuda.Stream())
