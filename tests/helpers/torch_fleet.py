"""A fleet of PyTorch samplers in threads, each with its own copy of the policy."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from rl_lora.adapters.files import load_tensors
from rl_lora.policy import Policy, open_policy
from rl_lora.sampler import OnGroup
from rl_lora.samplers.liveness import compare
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.types import Adapter, Completion, Prompt, SampleParams


class TorchFleet:
    """A sampler that switches while it samples: each group goes to the replica that is free first.

    The replicas in `deaf` miss every version from 1 on.
    """

    has_own_weights = True
    switches_while_sampling = True

    def __init__(self, policy: Policy, *, model: Any, num: int = 2, **options: Any) -> None:
        self.deaf: set[int] = set()
        self.replicas = [
            TorchSampler(open_policy(policy.model_dir, model, policy.lora, seed=0), **options)
            for _ in range(num)
        ]
        self._locks = [threading.Lock() for _ in self.replicas]  # held by whoever uses a replica
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(num):
            self._free.put(number)
        self._threads = ThreadPoolExecutor(num, "replica")

    def set_adapter(self, adapter: Adapter | None) -> None:
        tensors = None if adapter is None else load_tensors(adapter.path)
        for number, replica in enumerate(self.replicas):
            if number in self.deaf and adapter is not None and adapter.version:
                continue
            with self._locks[number]:
                if tensors is not None:
                    replica.policy.load_tensors(tensors)
                replica.set_adapter(adapter)
                if adapter is not None and adapter.probe is not None:
                    compare(adapter.probe, replica.token_logprobs(adapter.probe.token_ids_N))

    def sample(
        self, prompts_N: Sequence[Prompt], params: SampleParams, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        assert len({prompt.prompt_id for prompt in prompts_N}) == len(prompts_N)
        jobs = {
            self._threads.submit(self._sample_one, prompt, params): index
            for index, prompt in enumerate(prompts_N)
        }
        try:
            for job in as_completed(jobs):
                if on_group is not None:
                    on_group(jobs[job], job.result())
        finally:
            for job in jobs:
                job.cancel()
        return [job.result() for job in jobs]

    def _sample_one(self, prompt: Prompt, params: SampleParams) -> list[Completion]:
        number = self._free.get()
        try:
            with self._locks[number]:
                (completions_G,) = self.replicas[number].sample([prompt], params)
            return completions_G
        finally:
            self._free.put(number)

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        with self._locks[0]:
            return self.replicas[0].token_logprobs(token_ids_N)

    def release_memory(self) -> None:
        """The replicas' memory is not the learner's."""

    def close(self) -> None:
        self._threads.shutdown()
