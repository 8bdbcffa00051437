"""What a `vllm serve` must be able to do; each missing thing is named with the flag that adds it.

All is found out by asking: a server tells its flags only in its development mode.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from rl_lora.errors import UserError
from rl_lora.samplers.fleet.replica import ReplicaError
from rl_lora.samplers.fleet.server_client import API_KEY, Answer, ServerClient
from rl_lora.samplers.fleet.server_messages import GENERATE, sampled, scored, scoring_settings
from rl_lora.samplers.vllm.process import VERSIONS

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
# Fixed tokens that every vocabulary has, and how many more are sampled.
_PROBE, _NUM_SAMPLED = (0, 1, 2, 3, 4, 5, 6, 7), 8
_COUNTER = re.compile(rb"^vllm:(?:generation|prompt)_tokens_total(?:\{.*\})? (\S+)\s*$", re.M)
HINT = "`rl-lora serve-command JOB.toml` prints the whole line"


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server says about itself.

    Example: ServerFacts(model="Qwen/Qwen3-8B", max_model_len=4096)
    """

    model: str  # its name for the base model
    max_model_len: int


def missing(url: str, what: str, flag: str) -> UserError:
    """The error for a server without something that it needs."""
    return UserError(f"resources.servers: {url} {what}; start it with {flag} ({HINT})")


async def check_server(client: ServerClient, max_model_len: int) -> ServerFacts:
    """Asks a server that is up for all that sampling needs, except for its weights.

    Args:
        client: of the server.
        max_model_len: tokens of the job's longest prompt with its longest completion.

    Raises:
        UserError: it lacks something.
        ReplicaError: it fails, or its answers make no sense.
    """
    await _check_version(client)
    facts = await _facts(client, max_model_len)
    if await tokens_so_far(client) is None:
        raise UserError(
            f"resources.servers: {client.url} does not count its tokens, and a slow server "
            "cannot be distinguished from one that hangs; start it without --disable-log-stats"
        )
    await _check_adapters(client)
    await _check_sampling(client, facts)
    return facts


async def tokens_so_far(client: ServerClient) -> float | None:
    """Tokens that the server has read and sampled, for anyone; None if it does not count them.

    Raises:
        ReplicaError: it does not answer.
    """
    answer = await client.get("/metrics")
    found = _COUNTER.findall(answer.body)
    try:
        return sum(map(float, found)) if answer.is_ok and found else None
    except ValueError as error:
        raise ReplicaError(f"{answer.url} answered no metrics: {found[0][:40]!r}") from error


def load_error(url: str, answer: Answer, path: Path, max_lora_rank: int) -> UserError:
    """The error for a server that refuses the adapter in a folder.

    Args:
        url: of the server.
        answer: its refusal.
        path: of the adapter.
        max_lora_rank: that the job needs.
    """
    reason = answer.described()
    if "max_lora_rank" in reason:
        what = f"takes only adapters of lower ranks ({reason})"
        return missing(url, what, f"--max-lora-rank {max_lora_rank}")
    if answer.status == 404:
        return UserError(
            f"resources.servers: {url} finds no adapter in {path} ({reason}); let it see the run's "
            "folder under the same path, or set resources.servers_folder to one that both see"
        )
    return UserError(f"resources.servers: {url} does not load adapter {path}: {reason}")


async def _check_version(client: ServerClient) -> None:
    answer = await client.get("/version")
    version = str(answer.json().get("version", "")) if answer.is_ok else ""
    if not version:
        raise UserError(
            f"resources.servers: {client.url} is no vLLM server (/version answered "
            f"{answer.described()}); give the address of a `vllm serve`"
        )
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        raise UserError(
            f"resources.servers: {client.url} runs vLLM {version[:40]!r}, and this project works "
            f"with {' and '.join(VERSIONS)}; install one of these there"
        )


async def _facts(client: ServerClient, max_model_len: int) -> ServerFacts:
    answer = await client.get("/v1/models")
    if answer.status in (401, 403):
        raise UserError(
            f"resources.servers: {client.url} wants a key; set the environment variable {API_KEY} "
            "to its --api-key"
        )
    cards = answer.json().get("data")
    try:
        card = next(card for card in cards or [] if not card.get("parent"))
        facts = ServerFacts(str(card["id"]), int(card["max_model_len"]))
    except (StopIteration, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ReplicaError(f"{answer.url} names no base model: {answer.described()}") from error
    if facts.max_model_len < max_model_len:
        raise missing(
            client.url,
            f"takes {facts.max_model_len} tokens, and the job's longest prompt with "
            f"sampling.max_tokens more has {max_model_len}",
            f"--max-model-len {max_model_len}",
        )
    return facts


async def _check_adapters(client: ServerClient) -> None:
    """By an adapter that does not exist."""
    body = {"lora_name": "rl-lora-probe", "lora_path": "/rl-lora/no/such/adapter"}
    answer = await client.post(LOAD, body)
    text = answer.described()
    if answer.status in (404, 405) and "adapter" not in text:
        raise missing(
            client.url,
            "takes no adapters while it runs",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment",
        )
    if "not enabled" in text:
        raise missing(client.url, f"takes no adapters ({text})", "--enable-lora")
    if answer.status != 404:
        raise ReplicaError(f"{answer.url} answered {text} for an adapter that does not exist")


async def _check_sampling(client: ServerClient, facts: ServerFacts) -> None:
    """By greedy tokens: with top_k=1 the distribution sampled from has one token, of log-prob 0."""
    sampling = scoring_settings() | {"temperature": 1.0, "top_k": 1, "logprobs": 0}
    sampling["max_tokens"] = _NUM_SAMPLED
    body = {"model": facts.model, "token_ids": list(_PROBE), "sampling_params": sampling}
    answer = await client.post(GENERATE, body)
    if answer.status in (403, 404, 405):
        raise missing(
            client.url,
            f"has no {GENERATE} ({answer.described()})",
            "--enable-scale-out (vLLM 0.32)",
        )
    if answer.status == 400:
        raise UserError(
            f"resources.servers: {client.url} refuses log-probs: {answer.described()} ({HINT})"
        )
    _, logprobs_T, _ = sampled(answer, facts.model, _NUM_SAMPLED, sys.maxsize)
    scored(answer, facts.model, _PROBE)
    if any(logprobs_T):
        raise missing(
            client.url,
            "gives log-probs of another distribution than the one that it samples from",
            "--logprobs-mode processed_logprobs",
        )
