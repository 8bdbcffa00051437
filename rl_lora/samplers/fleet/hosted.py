"""The engine of a replica, in its own process: a sampler, and the thread that it belongs to.

This module knows nothing of how requests come to it.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rl_lora.adapters.files import fingerprint, load_tensors
from rl_lora.adapters.peft_files import read_manifest
from rl_lora.config import LoraSection, ModelSection, SamplingSection
from rl_lora.models.device import pick_device, pick_dtype
from rl_lora.models.resolve import resolve_model
from rl_lora.nn.variants import is_shifted, served_alpha, served_rank
from rl_lora.policy import Policy, open_policy
from rl_lora.sampler import BASE_VERSION, Sampler
from rl_lora.samplers.fleet.replica import AdapterFiles, GroupRequest, Proof
from rl_lora.samplers.make import has_own_weights, sampler_maker
from rl_lora.samplers.vllm.settings import ServedPolicy, decoded_at_once
from rl_lora.types import Adapter, Completion, Prompt, SampleParams, SeededParams


@dataclass(frozen=True)
class EngineSpec:
    """All that makes an engine like the learner's, on any machine that has the base model.

    Example: EngineSpec(model=ModelSection(name="qwen3-8b", device="cuda", dtype="bfloat16"),
    lora=LoraSection(), sampling=SamplingSection(), end_token_ids=(2,), max_model_len=4096)
    """

    model: ModelSection  # device and dtype are the engine's
    lora: LoraSection
    sampling: SamplingSection
    end_token_ids: tuple[int, ...]
    max_model_len: int


@dataclass(frozen=True)
class RemotePolicy:
    """A `ServedPolicy` of which only the base model's files are at hand."""

    model_dir: Path
    lora: LoraSection
    dtype: torch.dtype
    device: torch.device
    quantize: str | None = None


def make_engine(spec: EngineSpec) -> tuple[Sampler, Policy | None]:
    """The sampler of a spec; of one without its own weights also its policy, into which `Host`
    loads versions: PiSSA's and OLoRA's as what they are published as, LoRA of twice the rank.

    Raises:
        UserError: no such model here, or no such sampler.
    """
    model_dir = resolve_model(spec.model)
    device = pick_device(spec.model.device)
    policy: Policy | None = None
    dtype = pick_dtype(spec.model.dtype, device)
    served: ServedPolicy = RemotePolicy(model_dir, spec.lora, dtype, device, spec.model.quantize)
    if not has_own_weights(spec.sampling.backend):
        lora = spec.lora
        if is_shifted(lora.variant):
            as_published = {"rank": served_rank(lora), "alpha": served_alpha(lora)}
            lora = lora.model_copy(update={"variant": "lora", **as_published})
        served = policy = open_policy(model_dir, spec.model, lora, seed=0)
    make = sampler_maker(
        spec.sampling,
        served,
        end_token_ids=spec.end_token_ids,
        max_model_len=spec.max_model_len,
    )
    return make(), policy


def max_samples(spec: EngineSpec, sampler: Sampler) -> int:
    """Completions that an engine takes at once.

    With continuous batching twice as many as it decodes at once, since a group's shorter samples
    leave room long before the group is complete; without, no more than that.
    """
    at_once = decoded_at_once(spec.sampling.max_num_seqs, pick_device(spec.model.device).type)
    return 2 * at_once if has_stream(sampler) else at_once


@dataclass(eq=False)
class _Job:
    """What the thread does next: a call, or a group."""

    future: Future[Any]
    call: Callable[[], Any] | None = None
    group: GroupRequest | None = None
    num_to_come: int = 0  # groups that were sent with this one, after it


class Host:
    """A sampler with a thread, which makes it and does one thing after another with it.

    While a vLLM engine samples, groups that arrive join its batch; before anything else that was
    called for, what is under way is finished. A sampler without continuous batching gets together
    the groups that are there.

    Args:
        spec: of the sampler.
        folder: in which a private one for adapters is made; None: the system's for such files.
        num_threads: of PyTorch; 0: as it has by itself.
    """

    def __init__(self, spec: EngineSpec, folder: Path | None = None, num_threads: int = 0) -> None:
        self._spec, self._num_threads = spec, num_threads
        self._sampler: Sampler | None = None  # None: not made yet
        self._policy: Policy | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="adapters-", dir=folder))
        self._num_loaded = 0  # for the names of their folders
        self._num_done = 0  # jobs
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._next: _Job | None = None  # taken from the queue and not begun
        # Its result is `max_samples`, or what making the sampler raised.
        self.started: Future[int] = self._put(call=self._start)
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def load(
        self, adapter: Adapter | None, files: AdapterFiles | None, probes_N: Sequence[Sequence[int]]
    ) -> Future[Proof]:
        """As `Replica.load`."""
        return self._put(call=partial(self._load, adapter, files, probes_N))

    def sample(self, group: GroupRequest, num_to_come: int = 0) -> Future[list[Completion]]:
        """One group; `num_to_come` more follow at once."""
        return self._put(group=group, num_to_come=num_to_come)

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> Future[list[list[float]]]:
        """As `Replica.token_logprobs`."""
        return self._put(call=lambda: self._made.token_logprobs(token_ids_N))

    def progress(self) -> object:
        """As `Replica.progress`. None: a sampler that says nothing of its own is at work."""
        if self._sampler is None:
            return 0
        progress = getattr(self._sampler, "progress", None)
        return None if progress is None else (self._num_done, progress())

    def close(self) -> None:
        """Deletes the adapters; the process ends soon, and with it the engine."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _made(self) -> Sampler:
        assert self._sampler is not None
        return self._sampler

    def _put(self, **job: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put(_Job(future, **job))
        return future

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        if self._num_threads:
            torch.set_num_threads(self._num_threads)
        while True:
            job, self._next = self._next or self._jobs.get(), None
            if job.call is not None:
                self._finish([job], job.call)
            else:
                self._sample([job, *self._sent_with(job)])

    def _start(self) -> int:
        self._sampler, self._policy = make_engine(self._spec)
        return max_samples(self._spec, self._sampler)

    def _finish(self, jobs: Sequence[_Job], call: Callable[[], Any]) -> None:
        """Calls it; jobs that are not answered then get what it returns or raises."""
        try:
            result = call()
        except Exception as error:  # noqa: BLE001 (raised by the futures)
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(error)
        else:
            for job in jobs:
                if not job.future.done():
                    job.future.set_result(result)
        self._num_done += len(jobs)

    def _load(
        self, adapter: Adapter | None, files: AdapterFiles | None, probes_N: Sequence[Sequence[int]]
    ) -> Proof:
        version, found = BASE_VERSION, ""
        if adapter is not None:
            assert files is not None
            self._num_loaded += 1
            path = self._folder / f"{self._num_loaded:06d}"  # a name never used before
            files.write(path)
            tensors = load_tensors(path)
            version, found = int(read_manifest(path)["version"]), fingerprint(tensors)
            adapter = replace(adapter, path=path)
            if self._policy is not None:
                self._policy.load_tensors(tensors)
        self._made.set_adapter(adapter)
        for old in sorted(self._folder.iterdir())[:-1]:
            shutil.rmtree(old)
        return Proof(version, found, self._made.token_logprobs(probes_N))

    def _sent_with(self, first: _Job) -> list[_Job]:
        """The groups that were sent together with this one: they are here or about to arrive."""
        return [self._jobs.get() for _ in range(first.num_to_come)]

    def _arrived(self) -> list[_Job]:
        """The groups that are in the queue before anything else."""
        jobs: list[_Job] = []
        while self._next is None:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job.group is None:
                self._next = job
            else:
                jobs.append(job)
        return jobs

    def _sample(self, jobs: list[_Job]) -> None:
        if has_stream(self._made):
            self._finish(jobs, partial(self._stream, jobs))
            return
        by_params: dict[SampleParams, list[_Job]] = {}
        for job in (*jobs, *self._arrived()):
            params = _group(job).params  # alike but for each prompt's longest completion
            by_params.setdefault(params.plain(0), []).append(job)
        for params, alike in by_params.items():
            self._finish(alike, partial(self._sample_together, params, alike))

    def _sample_together(self, params: SampleParams, jobs: list[_Job]) -> None:
        seeds_N_G = tuple(_group(job).seeds_G for job in jobs)
        max_tokens_N = tuple(_group(job).params.max_tokens for job in jobs)
        params = params.plain(max(max_tokens_N))

        def deliver(index: int, completions_G: list[Completion]) -> None:
            jobs[index].future.set_result(completions_G)

        prompts_N = [_group(job).prompt for job in jobs]
        seeded = SeededParams.of(params, seeds_N_G, max_tokens_N=max_tokens_N)
        self._made.sample(prompts_N, seeded, deliver)

    def _stream(self, jobs: list[_Job]) -> None:
        """Continuous batching. `jobs` grows while it runs."""
        from rl_lora.samplers.vllm.stream import sample_stream

        def as_request(job: _Job) -> tuple[Prompt, SeededParams]:
            group = _group(job)
            return group.prompt, SeededParams.of(group.params, (group.seeds_G,))

        def more() -> list[tuple[Prompt, SeededParams]]:
            new = self._arrived()
            jobs.extend(new)
            return [as_request(job) for job in new]

        def on_answer(number: int, answer: list[Completion] | Exception) -> None:
            future = jobs[number].future
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)

        sampler: Any = self._made
        sample_stream(sampler, [as_request(job) for job in jobs], more, on_answer)


def has_stream(sampler: Sampler) -> bool:
    """Whether it takes groups while it samples others (`samplers.vllm.stream`)."""
    return getattr(sampler, "batches_continuously", False)


def _group(job: _Job) -> GroupRequest:
    assert job.group is not None
    return job.group
