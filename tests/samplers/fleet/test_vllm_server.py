"""HttpReplica on a real `vllm serve` of a tiny random model, compared with VllmSampler and PEFT."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

from rl_lora.samplers.fleet.replica import AdapterFiles, GroupRequest, ReplicaError
from rl_lora.samplers.fleet.servers import HttpReplica, ServedJob
from rl_lora.samplers.fleet.shared_versions import SharedVersions
from rl_lora.samplers.vllm.sampler import VllmSampler
from rl_lora.seeds import sample_seeds
from rl_lora.types import Adapter, Completion
from tests.helpers.tiny_models import VOCAB
from tests.helpers.vllm_servers import free_port, kill, vllm_server
from tests.samplers.test_vllm_sampler import (
    CONTEXT,
    END,
    PARAMS,
    PROMPTS,
    differences,
    expected_logprobs,
    make_model,
    make_sampler,
    publish,
)

LIMIT_S = 600.0
PROBES_N = [tuple(range(20, 60)), (5, 6, 7)]
GREEDY = replace(PARAMS, temperature=0.0, num_samples=1)

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.usefixtures("vllm_installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a server on the CPU"),
]

JOB = """
[model]
name = "{model}"
device = "cpu"
dtype = "float32"

[data]
max_prompt_tokens = {prompt}
train = [{{ name = "generated:chain_sum" }}]

[sampling]
max_tokens = 12
max_num_seqs = 16
"""


def load(replica: HttpReplica, model_dir: Path, adapter: Adapter | None) -> None:
    """The version, whose proof is compared with transformers and PEFT."""
    files = None if adapter is None else AdapterFiles.read(adapter)
    proof = replica.load(adapter, files, PROBES_N).result(LIMIT_S)
    assert proof.fingerprint == ("" if adapter is None else adapter.fingerprint)
    for token_ids, logprobs in zip(PROBES_N, proof.logprobs_N, strict=True):
        expected = expected_logprobs(model_dir, adapter, token_ids)
        assert (torch.tensor(logprobs) - expected).abs().max() < 1e-4


def sample(replica: HttpReplica, params: Any) -> list[list[Completion]]:
    """PROMPTS' groups, with the seeds of a sampler's call."""
    groups = [
        GroupRequest(prompt, params, tuple(seeds_G))
        for prompt, seeds_G in zip(PROMPTS, sample_seeds(PROMPTS, params), strict=True)
    ]
    return [future.result(LIMIT_S) for future in replica.sample(groups)]


def check_close(found: Sequence[list[Completion]], expected: Sequence[list[Completion]]) -> None:
    """The same tokens, with log-probs of the same size up to rounding."""
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        logprobs = torch.tensor(one.sampler_logprobs_T), torch.tensor(other.sampler_logprobs_T)
        assert (logprobs[0] - logprobs[1]).abs().max() < 1e-4
        assert replace(one, sampler_logprobs_T=()) == replace(other, sampler_logprobs_T=())


def in_process(
    model_dir: Path, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[list[list[Completion]]]]:
    """What VllmSampler samples from each version, with vLLM's own drawing of tokens."""
    from rl_lora.samplers.vllm import cpu_sampling

    monkeypatch.setattr(cpu_sampling, "install", lambda worker: False)
    sampler: VllmSampler = make_sampler(model_dir)
    try:
        found: dict[str, list[list[list[Completion]]]] = {}
        for adapter in adapters:
            sampler.set_adapter(adapter)
            found[adapter.name] = [sampler.sample(PROMPTS, params) for params in (PARAMS, GREEDY)]
        return found
    finally:
        sampler.close()
        monkeypatch.undo()


def test_a_server_samples_as_the_engine_in_the_process_and_is_proved_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = make_model(tmp_path / "model", tied=False)
    first, second = (publish(model_dir, tmp_path / "versions", version) for version in (1, 2))
    high = publish(model_dir, tmp_path / "high", 3, rank=4)
    expected = in_process(model_dir, [first, second], monkeypatch)
    job_file, port, log = tmp_path / "job.toml", free_port(), tmp_path / "server.log"
    job_file.write_text(JOB.format(model=model_dir, prompt=CONTEXT - 12))
    job = ServedJob(
        AutoTokenizer.from_pretrained(model_dir), (END,), CONTEXT, VOCAB, 16, 1, LIMIT_S,
        SharedVersions(tmp_path / "served"),
    )  # fmt: skip
    with ExitStack() as stack:
        replica = HttpReplica(f"http://127.0.0.1:{port}", job)
        stack.callback(replica.close)
        with vllm_server(job_file, port, log) as server:
            replica.start().result(LIMIT_S)
            # Each prompt is sampled from under each version, so that a prefix cache that took one
            # for the other would show; the second time from the first version as well.
            for adapter in (None, first, second, None, first):
                load(replica, model_dir, adapter)
                groups = sample(replica, PARAMS)
                assert differences(model_dir, adapter, groups, PARAMS.temperature).max() < 1e-4
                if adapter is not None:
                    check_close(groups, expected[adapter.name][0])
                    check_close(sample(replica, GREEDY), expected[adapter.name][1])
            metrics = httpx.get(f"{replica.name}/metrics", trust_env=False).text
            hits = [line for line in metrics.splitlines() if "prefix_cache_hits_total{" in line]
            assert sum(float(line.split()[-1]) for line in hits) > 0
            with pytest.raises(
                ReplicaError, match=r"rank 4 is .* start it with --max-lora-rank 1 "
            ):
                replica.load(high, AdapterFiles.read(high), PROBES_N).result(LIMIT_S)
            load(replica, model_dir, second)
            os.killpg(server.pid, signal.SIGSTOP)  # so that it dies with the samples under way
            requests = replica.sample(
                [GroupRequest(prompt, PARAMS, (1, 2, 3)) for prompt in PROMPTS]
            )
            kill(server)
            for request in requests:
                with pytest.raises(ReplicaError, match="does not answer"):
                    request.result(LIMIT_S)
        restart = replica.start()
        with vllm_server(job_file, port, log):
            restart.result(LIMIT_S)
            load(replica, model_dir, second)
            check_close(sample(replica, PARAMS), expected[second.name][0])
