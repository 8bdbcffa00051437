"""Engines of replicas, with PyTorch samplers: they load what is sent and sample what one would."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from rl_lora.adapters.files import save_adapter
from rl_lora.config import ModelSection
from rl_lora.environments.bridge import Bridge
from rl_lora.environments.episodes import EpisodeSampler
from rl_lora.environments.protocol import Step, Turn
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.models.resolve import resolve_model
from rl_lora.policy import Policy
from rl_lora.samplers.fleet.fleet import FleetSampler
from rl_lora.samplers.fleet.hosted import Host
from rl_lora.samplers.fleet.proofs import Prover
from rl_lora.samplers.fleet.replica import AdapterFiles, GroupRequest
from rl_lora.samplers.liveness import check_at_start
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.types import Prompt, SampleParams, SeededParams
from tests.helpers.host_replicas import HostReplica, torch_spec
from tests.helpers.tiny_models import make_policy, shake

MODEL = resolve_model(ModelSection(name="tiny-noisy"))
PARAMS = SampleParams(num_samples=4, max_tokens=8, temperature=1.0, seed=3)
PROMPTS = [
    Prompt("p/0", "s", "q", "1", (5, 6, 7)),
    Prompt("p/1", "s", "q", "1", (11, 12)),
    Prompt("p/0", "s", "q", "1", (5, 6, 7)),
    Prompt("p/2", "s", "q", "1", (3, 4, 5, 6, 7, 8)),
    Prompt("p/3", "s", "q", "1", (9, 9, 1)),
    Prompt("p/4", "s", "q", "1", (4, 2, 4)),
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as the replicas have: another number may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def fleet_of(policy: Policy, *replicas: HostReplica) -> Iterator[tuple[FleetSampler, list[str]]]:
    warnings: list[str] = []
    sampler = FleetSampler(
        replicas,
        Prover(policy, PROMPTS[:4], None),
        max_restarts=2,
        timeout_s=300,
        on_warning=warnings.append,
    )
    try:
        yield sampler, warnings
    finally:
        sampler.close()


@pytest.mark.parametrize("num_groups", [None, 1])
def test_two_engines_sample_what_one_does_to_the_bit(
    tmp_path: Path, one_thread: None, num_groups: int | None
) -> None:
    """A group by itself, as where max_num_seqs has room for one; also where an engine fails."""
    policy = make_policy(MODEL)
    spec = torch_spec(MODEL, max_num_seqs=4)
    replicas = HostReplica("a", spec, num_groups=num_groups), HostReplica("b", spec)
    one = TorchSampler(policy, end_token_ids=(2,), max_model_len=64, max_num_seqs=4)
    with fleet_of(policy, *replicas) as (sampler, warnings):
        for version in (1, 2):
            shake(policy, seed=version)
            adapter = save_adapter(policy, tmp_path, version=version, run_name="r")
            sampler.set_adapter(adapter)
            one.set_adapter(adapter)
            found, expected = sampler.sample(PROMPTS, PARAMS), one.sample(PROMPTS, PARAMS)
            assert found == expected  # tokens, log-probs, texts, versions
            assert {c.adapter_version for group in found for c in group} == {version}
        sampler.set_adapter(None)
        one.set_adapter(None)
        assert sampler.sample(PROMPTS, PARAMS) == one.sample(PROMPTS, PARAMS)
        ids = [prompt.token_ids for prompt in PROMPTS]
        assert sampler.token_logprobs(ids) == one.token_logprobs(ids)
        assert sampler.num_restarts == len(warnings) == (num_groups is not None)


class Twice:
    """Two observations, the second one longer."""

    is_graded = False

    def reset(self, prompt: Prompt, seed: int) -> None:
        self.num_turns = 0

    def step(self, turn: Turn) -> Step:
        self.num_turns += 1
        return Step(observation=None if self.num_turns == 3 else "1 + 2" * self.num_turns)


def test_episodes_of_two_engines_are_those_of_one(tmp_path: Path, one_thread: None) -> None:
    policy = make_policy(MODEL)
    shake(policy)
    adapter = save_adapter(policy, tmp_path, version=1, run_name="r")
    bridge = Bridge(AutoTokenizer.from_pretrained(MODEL))
    params = replace(PARAMS, max_tokens=40)
    ends = tuple(range(64))  # so that turns end before the limit
    one = TorchSampler(policy, end_token_ids=ends, max_model_len=64, max_num_seqs=4)
    spec = replace(torch_spec(MODEL, max_num_seqs=4), end_token_ids=ends)
    found = []
    with fleet_of(policy, HostReplica("a", spec), HostReplica("b", spec)) as (sampler, _):
        for each in (sampler, one):
            each.set_adapter(adapter)
            found.append(EpisodeSampler(each, Twice, bridge).sample(PROMPTS, params))
    pairs = list(zip(*(itertools.chain.from_iterable(groups) for groups in found), strict=True))
    assert max(first.episode.num_turns for first, _ in pairs if first.episode) == 3
    for first, other in pairs:
        assert replace(first, sampler_logprobs_T=()) == replace(other, sampler_logprobs_T=())
        assert first.sampler_logprobs_T == pytest.approx(other.sampler_logprobs_T, abs=1e-5)


def test_the_checks_at_the_start_pass_and_tell_the_probe_from_the_base(tmp_path: Path) -> None:
    policy = make_policy(MODEL)
    spec = torch_spec(MODEL, max_num_seqs=64)
    with fleet_of(policy, HostReplica("a", spec), HostReplica("b", spec)) as (sampler, _):
        found = check_at_start(policy, sampler, PROMPTS[:4], tmp_path / "probe", None)
        assert found["probe"] < 1e-5
        assert found["control"] > 1e-2


def test_groups_that_are_sent_together_are_decoded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    sample = TorchSampler.sample

    def noted(self: TorchSampler, prompts_N, params, on_group=None):  # type: ignore[no-untyped-def]
        assert isinstance(params, SeededParams)
        calls.append([prompt.prompt_id for prompt in prompts_N])
        return sample(self, prompts_N, params, on_group)

    monkeypatch.setattr(TorchSampler, "sample", noted)
    host = Host(torch_spec(MODEL, max_num_seqs=64), num_threads=1)
    groups = [GroupRequest(prompt, PARAMS, (1, 2, 3, 4)) for prompt in PROMPTS[:3]]
    groups[1] = replace(groups[1], params=PARAMS.plain(5))  # its own limit
    futures = [host.sample(group, 2 - place) for place, group in enumerate(groups)]
    assert [len(future.result(300)) for future in futures] == [4, 4, 4]
    assert calls == [["p/0", "p/1", "p/0"]]
    assert max(len(one.token_ids) for one in futures[0].result()) == PARAMS.max_tokens
    assert max(len(one.token_ids) for one in futures[1].result()) == 5
    for first, other in zip(futures[0].result(), futures[2].result(), strict=True):
        assert first.token_ids == other.token_ids  # of the same prompt and seeds
        # Rows of a product may be rounded by their place.
        assert first.sampler_logprobs_T == pytest.approx(other.sampler_logprobs_T, abs=1e-5)
    too_long = host.sample(replace(groups[0], params=replace(PARAMS, max_tokens=99)))
    with pytest.raises(UserError, match="exceeds the context of 64"):
        too_long.result(300)
    host.close()


def test_a_host_proves_what_it_has_loaded_and_keeps_one_version(tmp_path: Path) -> None:
    policy = make_policy(MODEL)
    spec = torch_spec(MODEL, max_num_seqs=8)
    (folder := tmp_path / "there").mkdir()
    host = Host(spec, folder, num_threads=1)
    assert host.started.result(300) == 8
    adapters = []
    for version in (1, 2):
        shake(policy, seed=version)
        adapters.append(save_adapter(policy, tmp_path, version=version, run_name="r"))
    for adapter in adapters:
        version, files = adapter.version, AdapterFiles.read(adapter)
        # It says what arrived, and not what it was asked for.
        asked = replace(adapter, version=7, path=Path("/nowhere"))
        proof = host.load(asked, files, [(1, 2, 3)]).result(300)
        assert (proof.version, proof.fingerprint) == (version, adapter.fingerprint)
        assert len(proof.logprobs_N[0]) == 2
    (own,) = folder.iterdir()
    assert [path.name for path in own.iterdir()] == ["000002"]
    files = AdapterFiles.read(adapters[-1])
    damaged = AdapterFiles({**files.contents, "adapter_model.safetensors": b"x"}, files.sha256)
    with pytest.raises(StaleAdapterError, match="on their way"):
        host.load(adapters[-1], damaged, []).result(300)
    host.close()
    assert list(folder.iterdir()) == []
