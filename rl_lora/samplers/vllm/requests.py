"""What vLLM is asked for, by the engine in this process and by servers. vLLM is not imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_lora.config.checks import MIN_TEMPERATURE
from rl_lora.errors import UserError
from rl_lora.sampler import Stops, check_lengths
from rl_lora.types import Prompt, SampleParams

FINAL_ONLY = 2  # vLLM's RequestOutputKind: the whole answer at the end


def sampling_settings(
    params: SampleParams, stops: Stops, seed: int, end_token_ids: Sequence[int]
) -> dict[str, Any]:
    """vLLM's SamplingParams of one sample; they are complete, so that a server's own defaults
    (generation_config.json) play no part."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": -1,
        "max_tokens": params.max_tokens,
        "stop": list(stops.texts) or None,
        "stop_token_ids": [*end_token_ids, *stops.token_ids],
        "skip_special_tokens": not stops.in_special,  # in the text searched for stops
        "ignore_eos": True,  # it is among stop_token_ids
        "seed": seed,
        "logprobs": 0,
        "detokenize": bool(stops.texts),
        "output_kind": FINAL_ONLY,
    }


def check_request(prompts_N: Sequence[Prompt], params: SampleParams, max_model_len: int) -> None:
    """Raises UserError for a temperature that vLLM would change, or too long a prompt."""
    if 0 < params.temperature < (lowest := MIN_TEMPERATURE["vllm"]):
        raise UserError(
            f"temperature {params.temperature} is below {lowest}, which vLLM would use "
            "instead; use 0 (greedy) or a higher one"
        )
    check_lengths(prompts_N, params, max_model_len)
