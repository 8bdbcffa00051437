"""Continuous batching: groups that arrive while vLLM samples others join the running batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rl_lora.errors import UserError
from rl_lora.sampler import Groups, Stops
from rl_lora.samplers.vllm.requests import check_request
from rl_lora.samplers.vllm.sampler import VllmSampler
from rl_lora.types import Completion, Prompt, SeededParams

Group = tuple[Prompt, SeededParams]  # of one prompt


def sample_stream(
    sampler: VllmSampler,
    groups: Sequence[Group],
    more: Callable[[], Sequence[Group]],
    on_answer: Callable[[int, list[Completion] | UserError], None],
) -> None:
    """Samples groups, and those that `more` returns meanwhile; it ends when all are done.

    Args:
        sampler: its adapter stays the same.
        groups: to begin with.
        more: called between two steps.
        on_answer: called with the number of a group, in the order of arrival, and its completions,
            or what is wrong with the request.

    Raises:
        EngineError, StaleAdapterError: as `VllmSampler.sample`.
    """
    found: list[Groups] = []  # of one group each

    def requests_of(new: Sequence[Group]) -> dict[str, Any]:
        requests: dict[str, Any] = {}
        for prompt, params in new:
            number, (seeds_G,) = len(found), params.seeds_N_G
            found.append(Groups(1, len(seeds_G), partial(answer, number)))
            try:
                check_request([prompt], params, sampler.max_model_len)
            except UserError as error:
                on_answer(number, error)
                continue
            stops = Stops.of(params.stop, sampler._tokenizer)
            for sample, seed in enumerate(seeds_G):
                options = sampler._sampling_params(params, stops, seed)
                requests[f"{number}/{sample}"] = (prompt.token_ids, options)
        return requests

    def answer(number: int, _: int, completions_G: list[Completion]) -> None:
        on_answer(number, completions_G)

    def on_output(output: Any) -> None:
        number, sample = map(int, output.request_id.split("/"))
        found[number].add(sample, sampler._completion(output))

    sampler._run(requests_of(groups), None, on_output, lambda: requests_of(more()))
