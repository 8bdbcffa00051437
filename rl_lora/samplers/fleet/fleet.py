"""One sampler over many replicas, which come and go without a sample being lost or counted twice.

Groups are the unit of work. Each is sampled by one replica from the one version that the replica
has then, and its seeds are fixed beforehand, so that a group whose replica failed can be sampled by
another one: the completions are the same, up to rounding where engines differ or batch differently.
The first complete answer of the replica that has a group counts, and no other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rl_lora.launchers import interruption
from rl_lora.sampler import OnGroup, OnProgress
from rl_lora.samplers.fleet.dispatcher import Dispatcher, Target
from rl_lora.samplers.fleet.members import Answers, Task
from rl_lora.samplers.fleet.proofs import Prover
from rl_lora.samplers.fleet.replica import AdapterFiles, Replica, group_requests
from rl_lora.types import Adapter, Completion, Prompt, SampleParams

_POLL_S = 0.2  # between two looks for a signal


class FleetSampler:
    """A `Sampler` over replicas.

    Threads may call it at once: while some sample, another may set the adapter. Groups are sent in
    the order of the calls and, within one, of the prompts. Those sent before a replica gets the new
    version are of the old one.

    Args:
        replicas: not started yet; this object starts and closes them.
        prover: judges what they have loaded.
        max_restarts: of one replica in a row, until it is left out.
        timeout_s: without a token, after which a replica hangs; also the time for starting one.
        on_warning: called with one line where a replica failed, in another thread.
        on_progress: called with (completions done, in all, tokens sampled).
        at_end: called once when all replicas are closed.

    Raises:
        UserError: the job's samplers cannot be started.
        EngineError: none is left.
    """

    has_own_weights = True
    switches_while_sampling = True

    # limits: keywords of the settings
    def __init__(
        self,
        replicas: Sequence[Replica],
        prover: Prover,
        *,
        max_restarts: int,
        timeout_s: float,
        on_warning: Callable[[str], None],
        on_progress: OnProgress | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self._prover, self._on_progress, self._at_end = prover, on_progress, at_end
        self._dispatcher = Dispatcher(
            replicas,
            prover,
            max_restarts=max_restarts,
            timeout_s=timeout_s,
            on_warning=on_warning,
        )
        try:
            self._wait(self._dispatcher.start())
        except BaseException:
            self.close()
            raise

    @property
    def num_restarts(self) -> int:
        """Of all replicas, in all."""
        return self._dispatcher.counters.restarts

    def set_adapter(self, adapter: Adapter | None) -> None:
        """As the protocol says. It returns when every replica that works has proved the version;
        one that is being started again will do so before it samples.

        Raises:
            EngineError: no replica is left.
        """
        started = time.monotonic()
        files = None if adapter is None else AdapterFiles.read(adapter)
        target = Target(adapter, files, self._prover.probe(adapter))
        self._wait(self._dispatcher.set_target(target))
        counters = self._dispatcher.counters
        counters.handover_bytes = 0 if files is None else files.num_bytes
        counters.handover_s = time.monotonic() - started

    def sample(
        self,
        prompts_N: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """As the protocol says.

        Raises:
            UserError: a prompt is too long.
            EngineError: no replica is left.
        """
        requests = group_requests(prompts_N, params)
        tasks = [Task(index, len(one.seeds_G), one) for index, one in enumerate(requests)]
        found: dict[int, list[Completion]] = {}
        num_tokens = 0
        answers = self._dispatcher.submit(tasks)
        try:
            while len(found) < len(tasks):
                index, completions_G = self._wait(answers, interruption.check)
                found[index] = completions_G
                num_tokens += sum(len(completion.token_ids) for completion in completions_G)
                if self._on_progress is not None:
                    total = len(tasks) * params.num_samples
                    self._on_progress(len(found) * params.num_samples, total, num_tokens)
                if on_group is not None:
                    on_group(index, completions_G)
        finally:
            self._dispatcher.leave(answers)
        return [found[index] for index in range(len(tasks))]

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        """As the protocol says, from any one replica.

        Raises:
            UserError: a sequence is too long.
            EngineError: no replica is left.
        """
        answers = self._dispatcher.submit([Task(0, len(token_ids_N), token_ids_N=token_ids_N)])
        try:
            _, logprobs_N = self._wait(answers)
        finally:
            self._dispatcher.leave(answers)
        return logprobs_N

    def metrics(self) -> dict[str, float]:
        """fleet/*: what happened since the last call. idle_share is of the replicas' time, in which
        they had nothing to sample."""
        return self._wait(self._dispatcher.metrics())

    def release_memory(self) -> None:
        """Nothing to free: the engines' memory is not the learner's."""

    def close(self) -> None:
        """Closes all replicas; a second call does nothing."""
        self._dispatcher.close()
        if self._at_end is not None:
            self._at_end()
            self._at_end = None

    def _wait(self, answers: Answers, check: Callable[[], None] = lambda: None) -> Any:
        def check_both() -> None:
            self._dispatcher.check_open()
            check()

        return answers.get(check_both, _POLL_S)
