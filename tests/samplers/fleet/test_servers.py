"""HttpReplica against a stand-in for `vllm serve`: hand-over, proofs, refused starts and faults."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.sampler import Stops
from rl_lora.samplers.fleet.replica import AdapterFiles, GroupRequest, ReplicaError
from rl_lora.samplers.fleet.servers import HttpReplica, ServedJob
from rl_lora.samplers.fleet.shared_versions import SharedVersions
from rl_lora.samplers.vllm.requests import sampling_settings
from rl_lora.samplers.vllm.sampler import VllmSampler
from rl_lora.types import Adapter, Completion, Prompt, SampleParams
from tests.helpers import fake_server
from tests.helpers.fake_server import BASE, FakeServer, serving

LIMIT_S = 30.0  # of every wait here
PROBES_N = [(3, 4, 5, 6), (7, 8), (9,)]
PARAMS = SampleParams(num_samples=3, max_tokens=6, temperature=0.7, seed=5)
GROUP = GroupRequest(Prompt("p/0", "s", "q", "1", (11, 12, 13)), PARAMS, (101, 2**62, 103))


class Tokenizer:
    """Writes token 5 as "5"; <end> is a special token."""

    added_tokens_decoder = {40: SimpleNamespace(content="<end>", special=True)}  # noqa: RUF012

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(map(str, token_ids))


def make_job(folder: Path, **options: Any) -> ServedJob:
    options = {"vocab_size": 50, "max_samples": 8, "max_lora_rank": 1, "wait_s": 20.0} | options
    options = {"max_model_len": 32} | options
    versions = SharedVersions(folder / "served")
    return ServedJob(Tokenizer(), (2, 7), versions=versions, **options)  # type: ignore[arg-type]


def make_replica(stack: ExitStack, url: str, folder: Path, **options: Any) -> HttpReplica:
    replica = HttpReplica(url, make_job(folder, **options))
    stack.callback(replica.close)
    return replica


def started(stack: ExitStack, server: FakeServer, folder: Path, **options: Any) -> HttpReplica:
    replica = make_replica(stack, stack.enter_context(serving(server)), folder, **options)
    replica.start().result(LIMIT_S)
    return replica


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def load(replica: HttpReplica, adapter: Adapter | None) -> Any:
    files = None if adapter is None else AdapterFiles.read(adapter)
    return replica.load(adapter, files, PROBES_N).result(LIMIT_S)


def sample(replica: HttpReplica, group: GroupRequest = GROUP) -> list[Completion]:
    (future,) = replica.sample([group])
    return future.result(LIMIT_S)


def expected(adapter: Adapter | None, group: GroupRequest = GROUP) -> list[Completion]:
    """By the stand-in's own functions."""
    weights = fake_server.weights_of(None if adapter is None else adapter.path)
    found = []
    for seed in group.seeds_G:
        tokens, logprobs = fake_server.completion(
            weights, group.prompt.token_ids, seed, group.params.max_tokens
        )
        text, version = " ".join(map(str, tokens)), -1 if adapter is None else adapter.version
        is_truncated = tokens[-1] != 2
        found.append(Completion(tuple(tokens), text, tuple(logprobs), is_truncated, version))
    return found


def expected_scores(adapter: Adapter | None) -> list[list[float]]:
    weights = fake_server.weights_of(None if adapter is None else adapter.path)
    return [
        [fake_server.logprob(weights, ids[:i], ids[i]) for i in range(1, len(ids))]
        for ids in PROBES_N
    ]


@pytest.mark.parametrize("version", ["0.32.0", "0.26.0+cu130"])
def test_samples_and_proofs_are_of_the_version_that_was_loaded_last(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter], version: str
) -> None:
    server = FakeServer(version=version)
    replica = started(stack, server, tmp_path)
    assert sample(replica) == expected(None)
    for adapter in (versions[1], None, versions[2], versions[1]):
        proof = load(replica, adapter)
        assert proof.version == (-1 if adapter is None else adapter.version)
        assert proof.fingerprint == ("" if adapter is None else adapter.fingerprint)
        assert proof.logprobs_N == expected_scores(adapter)
        assert sample(replica) == expected(adapter)
        assert replica.token_logprobs(PROBES_N).result(LIMIT_S) == expected_scores(adapter)
    assert len({*server.names}) == 3  # the second time under another name
    assert server.unloaded == server.names[:2]
    replica.close()
    assert server.unloaded == server.names
    assert not (tmp_path / "served").exists()  # no files are left


def test_each_sample_is_asked_for_as_the_engine_in_the_process_does(
    stack: ExitStack, tmp_path: Path
) -> None:
    server = FakeServer()
    replica = started(stack, server, tmp_path)
    del server.requests[:]
    params = replace(PARAMS, stop=("<end>", "so it is"))
    sample(replica, replace(GROUP, params=params))
    assert sorted(body["sampling_params"]["seed"] for body in server.requests) == [101, 103, 2**62]
    stops = Stops(token_ids=(40,), texts=("so it is",), in_special=False)
    like_vllm_sampler = VllmSampler._sampling_params(
        SimpleNamespace(  # type: ignore[arg-type]
            _vllm=SimpleNamespace(
                SamplingParams=dict, RequestOutputKind=SimpleNamespace(FINAL_ONLY=2)
            ),
            _end_token_ids=[2, 7],
        ),
        params,
        stops,
        101,
    )
    assert like_vllm_sampler.pop("flat_logprobs")  # within a process only
    assert sampling_settings(params, stops, 101, (2, 7)) == like_vllm_sampler
    for body in server.requests:
        assert body["sampling_params"] | {"seed": 101} == like_vllm_sampler
        assert (body["model"], body["token_ids"]) == (BASE, [11, 12, 13])


REFUSED = [
    ({"version": "0.19.1"}, "runs vLLM '0.19.1', and this project works with 0.26 and 0.32"),
    ({"no_runtime_lora": True}, "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its env"),
    ({"no_lora": True}, "start it with --enable-lora "),
    ({"no_scale_out": True}, "start it with --enable-scale-out"),
    ({"raw": True}, "start it with --logprobs-mode processed_logprobs"),
    ({"no_stats": True}, "start it without --disable-log-stats"),
    ({"max_model_len": 31}, "takes 31 tokens.*has 32; start it with --max-model-len 32"),
    ({"no_logprobs": True}, "refuses log-probs: 400: prompt_logprobs are not available"),
    ({"key": "secret"}, "wants a key; set the environment variable VLLM_API_KEY"),
]


@pytest.mark.parametrize(("lacks", "text"), REFUSED)
def test_a_server_that_lacks_something_is_refused_by_name(
    stack: ExitStack, tmp_path: Path, lacks: dict[str, Any], text: str
) -> None:
    url = stack.enter_context(serving(FakeServer(**lacks)))
    replica = make_replica(stack, url, tmp_path)
    with pytest.raises(UserError, match=text) as caught:
        replica.start().result(LIMIT_S)
    assert f"resources.servers: {url}" in str(caught.value)


def test_nothing_or_something_else_at_the_address_is_said(stack: ExitStack, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match=f"{url}/health does not answer.*start `vllm serve`"):
        make_replica(stack, url, tmp_path).start().result(LIMIT_S)
    unhealthy = FakeServer()
    unhealthy.fault = "unhealthy"
    with pytest.raises(UserError, match="answered 503"):
        started(stack, unhealthy, tmp_path)
    with pytest.raises(UserError, match="is no vLLM server"):
        started(stack, FakeServer(version=""), tmp_path)


def test_the_key_is_sent_and_in_no_message(
    stack: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    server = FakeServer(key="s3cret")
    replica = started(stack, server, tmp_path)
    assert set(server.headers) == {"Bearer s3cret"}
    server.fault = "500"
    with pytest.raises(ReplicaError) as caught:
        sample(replica)
    assert "s3cret" not in str(caught.value) + repr(caught.value.__cause__)


def test_an_adapter_of_too_high_a_rank_or_out_of_sight_is_refused_by_name(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeServer(max_lora_rank=0)
    replica = started(stack, server, tmp_path, max_lora_rank=8)
    with pytest.raises(UserError, match=r"lower ranks .* start it with --max-lora-rank 8 "):
        load(replica, versions[1])
    server.lacks["max_lora_rank"] = 8
    monkeypatch.setattr(Path, "is_dir", lambda path: False)
    with pytest.raises(UserError, match=r"finds no adapter in .*resources\.servers_folder"):
        load(replica, versions[1])
    monkeypatch.undo()
    load(replica, versions[1])
    assert sample(replica) == expected(versions[1])
    server.lacks["no_lora"] = True  # from here on it is a server that fails: others may work
    with pytest.raises(ReplicaError, match="LoRA is not enabled"):
        load(replica, versions[2])


FAULTS = {
    "500": "answered 500: EngineCore encountered an issue",
    "no JSON": r"answered no JSON: <html> \[31mBad gateway</html>",
    "a list": "answered no JSON object",
    "deep": "answered no JSON",
    "huge": "answers with more than 68,608 bytes",
    "cut off": "answered no JSON",
    "the base": "answered for model 'the-base', and 'run-v000001-.*' was asked for",
    "no log-probs": "without token ids and their log-probs",
    "too few log-probs": "log-probs are of other tokens",
    "other log-probs": "log-probs are of other tokens",
    "NaN": "log-probs that are no numbers",
    "no log-prob": "log-probs that are no numbers",
    "too many tokens": "of 54 tokens, where 6 were asked for",
    "too few tokens": "of 1 tokens, where 6 were asked for",
    "text tokens": "log-probs are of other tokens",
    "unknown token": "with tokens that the model does not have",
    "aborted": "ended a sample with 'abort'",
    "no choice": "without token ids",
    "two choices": "without token ids",
}


@pytest.mark.faults
def test_answers_that_make_no_sense_fail_the_replica_which_then_proves_itself_again(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter]
) -> None:
    server = FakeServer()
    replica = started(stack, server, tmp_path)
    group = replace(GROUP, seeds_G=(104,))
    (whole,) = expected(versions[1], group)
    assert len(whole.token_ids) == 6
    for fault, text in FAULTS.items():
        load(replica, versions[1])
        server.fault = fault
        with pytest.raises(ReplicaError, match=text):
            sample(replica, group)
        server.fault = ""
        replica.start().result(LIMIT_S)
        assert load(replica, versions[1]).logprobs_N == expected_scores(versions[1])
        assert sample(replica, group) == [whole]
    assert len({*server.names}) == len(server.names) == 2 * len(FAULTS)
    assert list(server.adapters) == server.names[-1:]  # what a failed life had loaded is unloaded


@pytest.mark.faults
def test_a_server_that_forgot_the_adapter_or_computes_with_another_is_found(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter]
) -> None:
    server = FakeServer()
    replica = started(stack, server, tmp_path)
    load(replica, versions[1])
    server.fault = "stale"
    proof = load(replica, versions[2])
    assert proof.logprobs_N == expected_scores(versions[1]) != expected_scores(versions[2])
    server.fault = ""
    server.adapters.clear()  # as after a restart that nobody noticed
    with pytest.raises(ReplicaError, match=r"404: The model `run-v000002-\w+` does not exist"):
        sample(replica)


@pytest.mark.faults
def test_a_server_that_dies_is_waited_for_and_gets_the_adapter_again(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter]
) -> None:
    first, second = FakeServer(), FakeServer()
    with serving(first) as url:
        replica = make_replica(stack, url, tmp_path)
        replica.start().result(LIMIT_S)
        load(replica, versions[1])
        first.fault = "hang"
        (under_way,) = replica.sample([GROUP])
        assert all(first.arrived.acquire(timeout=LIMIT_S) for _ in range(4))  # one was the probe
    with pytest.raises(ReplicaError, match="does not answer"):
        under_way.result(LIMIT_S)
    with pytest.raises(ReplicaError):
        sample(replica)
    restart = replica.start()
    with serving(second, int(url.rpartition(":")[2])):
        restart.result(LIMIT_S)
        assert load(replica, versions[1]).logprobs_N == expected_scores(versions[1])
        assert sample(replica) == expected(versions[1])
        second.lacks["raw"] = True
        with pytest.raises(ReplicaError, match="processed_logprobs"):  # not the end of the run
            replica.start().result(LIMIT_S)


@pytest.mark.faults
def test_a_server_that_does_not_come_back_is_given_up(stack: ExitStack, tmp_path: Path) -> None:
    with serving(FakeServer()) as url:
        replica = make_replica(stack, url, tmp_path, wait_s=0.05)
        replica.start().result(LIMIT_S)
    with pytest.raises(ReplicaError, match=r"did not come back for 0\.05 s"):
        replica.start().result(LIMIT_S)
    with pytest.raises(ReplicaError, match="was not found to be up"):
        sample(replica)


@pytest.mark.faults
def test_a_server_that_hangs_makes_no_progress_and_is_left_behind(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter]
) -> None:
    server = FakeServer()
    replica = started(stack, server, tmp_path)
    load(replica, versions[1])
    server.fault = "hang"
    (hanging,) = replica.sample([GROUP])
    assert all(server.arrived.acquire(timeout=LIMIT_S) for _ in range(6))  # of these 3 are probes
    polled = server.calls["/metrics"]
    wait_until(lambda: server.calls["/metrics"] >= polled + 2)
    before = replica.progress()
    wait_until(lambda: server.calls["/metrics"] >= polled + 5)
    assert replica.progress() == before
    server.num_tokens += 1  # slow, but it works
    wait_until(lambda: replica.progress() != before)
    server.fault = ""
    replica.start().result(LIMIT_S)
    assert hanging.cancelled()
    load(replica, versions[2])
    assert sample(replica) == expected(versions[2])


def test_samples_under_way_keep_their_version_while_the_next_is_loaded(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter]
) -> None:
    server = FakeServer()
    replica = started(stack, server, tmp_path)
    load(replica, versions[1])
    server.fault = "hang"
    (old,) = replica.sample([GROUP])
    assert all(server.arrived.acquire(timeout=LIMIT_S) for _ in range(6))
    server.fault = ""
    loading = replica.load(versions[2], AdapterFiles.read(versions[2]), PROBES_N)
    (new,) = replica.sample([GROUP])  # it need not wait for the proof
    assert loading.result(LIMIT_S).version == 2
    assert new.result(LIMIT_S) == expected(versions[2])
    assert server.unloaded == []
    server.release.set()
    assert old.result(LIMIT_S) == expected(versions[1])
    load(replica, None)
    assert server.unloaded == server.names


def test_loads_that_come_at_once_are_done_in_their_order(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter]
) -> None:
    server = FakeServer()
    replica = started(stack, server, tmp_path)
    order = [versions[1], versions[0], versions[2]]
    proofs = [replica.load(adapter, AdapterFiles.read(adapter), PROBES_N) for adapter in order]
    assert [proof.result(LIMIT_S).version for proof in proofs] == [1, 0, 2]
    assert sample(replica) == expected(versions[2])
    assert server.unloaded == server.names[:2]


def test_bad_input_leaves_the_replica_usable(
    stack: ExitStack, tmp_path: Path, versions: list[Adapter]
) -> None:
    replica = started(stack, FakeServer(), tmp_path)
    long = replace(GROUP, params=replace(PARAMS, max_tokens=30))
    with pytest.raises(UserError, match="exceeds the context of 32"):
        sample(replica, long)
    with pytest.raises(UserError, match=r"temperature 0\.001 is below 0\.01"):
        sample(replica, replace(GROUP, params=replace(PARAMS, temperature=0.001)))
    with pytest.raises(UserError, match="64 tokens leaves no room in the 64"):
        replica.token_logprobs([range(64)]).result(LIMIT_S)
    changed = replace(AdapterFiles.read(versions[1]), sha256="0" * 64)
    with pytest.raises(StaleAdapterError, match="changed on their way"):
        replica.load(versions[1], changed, PROBES_N).result(LIMIT_S)
    load(replica, versions[1])
    assert sample(replica) == expected(versions[1])
    replica.close()
    with pytest.raises(RuntimeError, match="is closed"):
        sample(replica)


def test_servers_share_one_copy_of_a_version_and_what_killed_jobs_left_is_deleted(
    tmp_path: Path, versions: list[Adapter]
) -> None:
    host = socket.gethostname()
    ours, others = tmp_path / f"rl-lora-{host}-{2**22 + 1}", tmp_path / "rl-lora-elsewhere-1"
    alive, user = tmp_path / f"rl-lora-{host}-{os.getppid()}", tmp_path / f"rl-lora-{host}-notes"
    for folder in (ours, others, alive, user):
        folder.mkdir()
    shared, files = SharedVersions(tmp_path), AdapterFiles.read(versions[1])
    assert {*tmp_path.iterdir()} == {others, alive, user}
    held = [shared.hold(versions[1], files) for _ in range(2)]
    assert held[0] == held[1]
    assert held[0].fingerprint == versions[1].fingerprint
    assert AdapterFiles.read(replace(versions[1], path=held[0].path)) == files
    shared.release(held[0])
    assert held[1].path.is_dir()
    shared.release(held[1])
    assert {*tmp_path.iterdir()} == {others, alive, user}


def test_closing_ends_the_thread(stack: ExitStack, tmp_path: Path) -> None:
    before = threading.active_count()
    replica = make_replica(stack, "http://127.0.0.1:9", tmp_path)
    assert threading.active_count() == before + 1
    replica.close()
    replica.close()
    assert threading.active_count() == before
