"""A sampler whose engine is started again where it fails or hangs."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from rl_lora import distributed
from rl_lora.errors import EngineError, UserError
from rl_lora.sampler import OnGroup, Sampler
from rl_lora.samplers.watchdog import Hang, watched
from rl_lora.types import Adapter, Completion, Prompt, SampleParams, SeededParams

T = TypeVar("T")


class RestartingSampler:
    """A `Sampler` that replaces one whose engine fails, and sets its adapter again.

    What is missing of a call is sampled again with the same seeds. The adapter's files are checked
    again when they are loaded, and the completions name the version that they are from.

    Engines are made in the main thread only: making one changes much in the process, also what
    other threads work with. A call from another thread that fails raises EngineError, as do calls
    from there after it, and the main thread's next call makes the new engine.

    Args:
        make: makes a sampler that raises EngineError where its engine is unusable. If it has a
            method `progress`, whose result changes with every token and which another thread may
            call, hangs are noticed as well.
        max_restarts: in a row, without a call that succeeds.
        timeout_s: without progress, after which an engine hangs; also the time for making one.
        on_restart: called with one line each time; the other ranks warn by Python's `warnings`.
    """

    has_own_weights = True

    def __init__(
        self,
        make: Callable[[], Sampler],
        *,
        max_restarts: int,
        timeout_s: float,
        on_restart: Callable[[str], None],
    ) -> None:
        self.num_restarts = 0  # in all
        self._make, self._on_restart = make, on_restart
        self._max_restarts, self._timeout_s = max_restarts, timeout_s
        self._sampler = make()
        self._adapter: Adapter | None = None
        self._num_in_row = 0
        self._failure = ""  # of the present engine. Text: an exception's frames hold its memory.

    def set_adapter(self, adapter: Adapter | None) -> None:
        """As the sampler's own. A new engine gets this adapter only, not also the one before."""
        self._call(lambda sampler: sampler.set_adapter(adapter), None)
        self._adapter = adapter

    def sample(
        self,
        prompts_N: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """As the sampler's own; `on_group` gets each group once.

        Raises:
            EngineError: the engine failed, and so did new ones.
        """
        done: dict[int, list[Completion]] = {}

        def sample_missing(sampler: Sampler) -> None:
            missing = {p.prompt_id for n, p in enumerate(prompts_N) if n not in done}
            # All groups of these prompts: a group's seeds count the prompt's occurrences before it.
            chosen = [n for n, prompt in enumerate(prompts_N) if prompt.prompt_id in missing]

            def deliver(index: int, completions_G: list[Completion]) -> None:
                number = chosen[index]
                if number not in done:
                    done[number] = completions_G
                    if on_group is not None:
                        on_group(number, completions_G)

            sampler.sample([prompts_N[n] for n in chosen], _of_some(params, chosen), deliver)

        self._call(sample_missing, self._adapter)
        return [done[n] for n in range(len(prompts_N))]

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        """As the sampler's own. Raises EngineError as `sample`."""
        return self._call(lambda sampler: sampler.token_logprobs(token_ids_N), self._adapter)

    def release_memory(self) -> None:
        """As the sampler's own."""
        self._call(lambda sampler: sampler.release_memory(), self._adapter)

    def close(self) -> None:
        """Frees the engine; what a failed one raises then is not reported as well."""
        try:
            with watched(self._progress, self._timeout_s):
                self._sampler.close()
        except (EngineError, Hang) as error:
            if not self._failure:
                raise EngineError(self._described(error)) from error

    def _call(self, call: Callable[[Sampler], T], adapter: Adapter | None) -> T:
        """The call's result, on a new engine with this adapter where the present one fails."""
        while True:
            try:
                with watched(self._progress, self._timeout_s):
                    if self._failure:
                        self._restart(adapter)
                    result = call(self._sampler)
                self._num_in_row = 0
                return result
            except (EngineError, Hang) as error:
                self._failure = self._described(error)
                if self._num_in_row >= self._max_restarts or not _is_main_thread():
                    raise EngineError(self._last_words()) from (error.__cause__ or error)

    def _restart(self, adapter: Adapter | None) -> None:
        if self._num_in_row >= self._max_restarts or not _is_main_thread():
            raise EngineError(self._failure)  # it failed in another thread, or in a call before
        self._num_in_row += 1
        self.num_restarts += 1
        told = f"{self._failure}; a new engine continues with the same seeds"
        if distributed.is_main():
            self._on_restart(told)
        else:
            warnings.warn(f"rank {distributed.rank()}: {told}", stacklevel=2)
        self._sampler.close()
        try:
            self._sampler = self._make()
        except UserError:
            raise
        except Exception as error:
            raise EngineError(
                f"no new engine starts: {type(error).__name__}: {_first_line(error)}"
            ) from error
        if adapter is not None:
            self._sampler.set_adapter(adapter)
        self._failure = ""

    def _described(self, error: EngineError | Hang) -> str:
        if isinstance(error, Hang):
            return f"vLLM gave no token for {self._timeout_s:g} s (sampling.timeout_s)"
        is_short = isinstance(error.__cause__, torch.OutOfMemoryError)
        return f"{error}; set a lower sampling.memory_fraction" if is_short else str(error)

    def _last_words(self) -> str:
        if not self._num_in_row:
            return self._failure
        again = f"{self._num_in_row} restart{'s' * (self._num_in_row > 1)} in a row"
        return f"{self._failure}; {again} (sampling.max_restarts) did not help"

    def _progress(self) -> object:
        progress = getattr(self._sampler, "progress", object)  # each object() is another
        return self.num_restarts, progress()


def _of_some(params: SampleParams, chosen: Sequence[int]) -> SampleParams:
    """The params of a call for some of its prompts."""
    if not isinstance(params, SeededParams):
        return params
    seeds_N_G, caps_N = params.seeds_N_G, params.max_tokens_N
    return replace(
        params,
        seeds_N_G=tuple(seeds_N_G[n] for n in chosen if seeds_N_G),
        max_tokens_N=tuple(caps_N[n] for n in chosen if caps_N),
    )


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
