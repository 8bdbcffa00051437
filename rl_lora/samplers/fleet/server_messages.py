"""What is sent to a server's `/inference/v1/generate`, and what its answers must contain."""

from __future__ import annotations

from typing import Any

from rl_lora.samplers.fleet.replica import ReplicaError
from rl_lora.samplers.fleet.server_client import Answer
from rl_lora.samplers.vllm.requests import FINAL_ONLY

GENERATE = "/inference/v1/generate"
_NO_LOGPROB = -9999.0  # vLLM's mark
_TOKEN_BYTES, _ANSWER_BYTES = 512, 2**16  # of an answer, at most: for each token, and besides


def max_answer_bytes(num_tokens: int) -> int:
    """Of an answer with log-probs of so many tokens."""
    return _ANSWER_BYTES + _TOKEN_BYTES * num_tokens


def scoring_settings() -> dict[str, Any]:
    """vLLM's SamplingParams that score a prompt; one token is sampled as well."""
    return {
        "temperature": 0.0,
        "max_tokens": 1,
        "prompt_logprobs": 0,
        "ignore_eos": True,
        "detokenize": False,
        "output_kind": FINAL_ONLY,
    }


def sampled(
    answer: Answer, model: str, max_tokens: int, vocab_size: int
) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
    """An answer's completion: token ids, their log-probs in nats, and whether it is truncated.

    Raises:
        ReplicaError: the answer is an error, or makes no sense.
    """
    found = answer.json()
    _check_model(answer, found, model)
    try:
        (choice,) = found["choices"]
        reason, token_ids = choice["finish_reason"], tuple(choice["token_ids"])
        content = choice["logprobs"]["content"] if token_ids else []
        logprobs_T = tuple(float(token["logprob"]) for token in content)
        scored_ids = tuple(_token_id(token) for token in content)
    except (LookupError, TypeError, ValueError) as error:
        raise _nonsense(answer, "without token ids and their log-probs") from error
    if reason not in ("stop", "length"):
        raise ReplicaError(f"{answer.url} ended a sample with {str(reason)[:40]!r}")
    is_truncated = reason == "length"
    if scored_ids != token_ids:
        raise _nonsense(answer, "whose log-probs are of other tokens")
    if not all(type(token) is int and 0 <= token < vocab_size for token in token_ids):
        raise _nonsense(answer, "with tokens that the model does not have")
    if len(token_ids) > max_tokens or (is_truncated and len(token_ids) < max_tokens):
        raise _nonsense(answer, f"of {len(token_ids)} tokens, where {max_tokens} were asked for")
    if not all(_NO_LOGPROB < logprob < 1e-3 for logprob in logprobs_T):  # NaN neither
        raise _nonsense(answer, "with log-probs that are no numbers (has the policy diverged?)")
    return token_ids, logprobs_T, is_truncated


def scored(answer: Answer, model: str, token_ids: tuple[int, ...]) -> list[float]:
    """An answer's log-probs of tokens 1, 2, ... of the prompt.

    Raises:
        ReplicaError: the answer is an error, or makes no sense.
    """
    found = answer.json()
    _check_model(answer, found, model)
    try:
        rows = found["prompt_logprobs"][1:]
        return [
            float(row[str(token)]["logprob"])
            for row, token in zip(rows, token_ids[1:], strict=True)
        ]
    except (LookupError, TypeError, ValueError) as error:
        raise _nonsense(answer, "without log-probs of the prompt") from error


def _check_model(answer: Answer, found: dict[str, object], model: str) -> None:
    if found.get("model") != model:
        raise ReplicaError(
            f"{answer.url} answered for model {str(found.get('model'))[:80]!r}, and {model!r} was "
            "asked for"
        )


def _token_id(token: dict[str, object]) -> int:
    """vLLM 0.32 gives a token's number, 0.26 the text "token_id:17"."""
    number = token.get("token_id")
    if number is None:
        number = str(token["token"]).removeprefix("token_id:")
    return int(str(number))


def _nonsense(answer: Answer, what: str) -> ReplicaError:
    return ReplicaError(f"{answer.url} gave an answer {what}: {answer.shown()}")
