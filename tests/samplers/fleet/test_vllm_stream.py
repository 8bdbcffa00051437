"""Groups that arrive while vLLM samples others join its batch, and are what they are by
themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_lora.errors import UserError
from rl_lora.samplers.vllm.stream import Group, sample_stream
from rl_lora.seeds import sample_seeds
from rl_lora.types import Completion, Prompt, SeededParams
from tests.samplers.test_vllm_sampler import (
    CONTEXT,
    PARAMS,
    PROMPTS,
    make_model,
    make_sampler,
    pytestmark,
)

__all__ = ["pytestmark"]  # applies here, too


@pytest.mark.slow
def test_groups_that_arrive_later_are_sampled_as_in_one_call(tmp_path: Path) -> None:
    sampler = make_sampler(make_model(tmp_path / "model"))
    whole = sampler.sample(PROMPTS, PARAMS)
    groups: list[Group] = [
        (
            prompt,
            SeededParams(
                PARAMS.num_samples,
                PARAMS.max_tokens,
                PARAMS.temperature,
                seeds_N_G=(tuple(seeds_G),),
            ),
        )
        for prompt, seeds_G in zip(PROMPTS, sample_seeds(PROMPTS, PARAMS), strict=True)
    ]
    too_long = (Prompt("p/9", "s", "q", "1", tuple(range(CONTEXT))), groups[0][1])
    arriving = [[groups[1]], [], [too_long, groups[2]]]
    answers: dict[int, list[Completion] | UserError] = {}
    sample_stream(
        sampler,
        groups[:1],
        lambda: arriving.pop(0) if arriving else [],
        answers.__setitem__,
    )
    error = answers.pop(2)
    assert isinstance(error, UserError)
    assert "exceeds the context" in str(error)
    for number, completions_G in zip((0, 1, 3), whole, strict=True):
        answer = answers.pop(number)
        assert not isinstance(answer, UserError)
        assert [one.token_ids for one in answer] == [one.token_ids for one in completions_G]
        for one, other in zip(answer, completions_G, strict=True):
            assert one.sampler_logprobs_T == pytest.approx(other.sampler_logprobs_T, abs=1e-4)
    assert not answers
    assert not arriving
    sampler.close()
