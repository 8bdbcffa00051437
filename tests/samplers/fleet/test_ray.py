"""A fleet in Ray's actors, with a real Ray on this machine.

Its processes take about ten seconds to start on two free cores, so that most of this is `long`.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from rl_lora.adapters.files import save_adapter
from rl_lora.config import ModelSection
from rl_lora.errors import EngineError, UserError
from rl_lora.models.resolve import resolve_model
from rl_lora.policy import Policy
from rl_lora.samplers.fleet.fleet import FleetSampler
from rl_lora.samplers.fleet.proofs import Prover
from rl_lora.samplers.fleet.ray_replica import RayReplica, ShippedFiles
from rl_lora.samplers.fleet.ray_start import join_ray
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.types import Prompt, SampleParams
from tests.helpers.host_replicas import torch_spec
from tests.helpers.tiny_models import make_policy, shake

pytestmark = [
    # Not imported here: Ray reads its environment then, which `join_ray` sets before.
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
    pytest.mark.timeout(600),
]

MODEL = resolve_model(ModelSection(name="tiny-noisy"))
PARAMS = SampleParams(num_samples=4, max_tokens=16, temperature=1.0, seed=3)
LONG = SampleParams(num_samples=4, max_tokens=300, temperature=1.0, seed=4)
PROMPTS = [Prompt(f"p/{n}", "s", "q", "1", (5, 6, 7 + n)) for n in range(6)]


@contextmanager
def ray_fleet(
    policy: Policy,
    num: int = 2,
    *,
    timeout_s: float = 300,
    max_model_len: int = 64,
    address: str = "local",
) -> Iterator[tuple[FleetSampler, list[RayReplica], list[str]]]:
    """Closes everything; of a Ray that was started for it no process and no file is left then."""
    warnings: list[str] = []
    spec = replace(torch_spec(MODEL, max_num_seqs=4), max_model_len=max_model_len)
    cluster = join_ray(address, num_samplers=num, gpus_per_sampler=0, num_learner_gpus=0)
    cluster.num_threads = 1
    shipped = ShippedFiles()
    replicas = [RayReplica(f"sampler {n}", cluster, spec, shipped) for n in range(1, num + 1)]
    sampler = FleetSampler(
        replicas,
        Prover(policy, PROMPTS[:4], None),
        max_restarts=2,
        timeout_s=timeout_s,
        on_warning=warnings.append,
        at_end=cluster.close,
    )
    try:
        yield sampler, replicas, warnings
    finally:
        sampler.close()
        assert (cluster.folder is not None) == (address == "local")
        if cluster.folder is not None:
            assert not cluster.folder.exists()
            assert not ray_processes(cluster.folder)


def ray_processes(folder: Path) -> list[str]:
    """Command lines of what Ray has started for a job, on the whole machine."""
    found = [
        " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])
    ]
    return [line for line in found if str(folder) in line]


def expected_of(policy: Policy, adapter: Any, params: SampleParams, max_model_len: int) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the actors have: another number may sum in another order
    one = TorchSampler(policy, end_token_ids=(2,), max_model_len=max_model_len, max_num_seqs=4)
    one.set_adapter(adapter)
    found = one.sample(PROMPTS, params)
    torch.set_num_threads(threads)
    return found


def test_two_actors_sample_what_one_sampler_does_to_the_bit(tmp_path: Path) -> None:
    """Ray leaves nothing behind, also no handlers of signals."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    policy = make_policy(MODEL)
    shake(policy)
    adapter = save_adapter(policy, tmp_path, version=1, run_name="r")
    with ray_fleet(policy) as (sampler, _, warnings):
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        sampler.set_adapter(adapter)
        assert sampler.sample(PROMPTS, PARAMS) == expected_of(policy, adapter, PARAMS, 64)
        with pytest.raises(UserError, match="exceeds the context of 64"):
            sampler.sample(PROMPTS[:1], LONG)
        metrics = sampler.metrics()
    assert metrics["fleet/live"] == 2
    assert metrics["fleet/handover_bytes"] > 0
    assert warnings == []
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.long
@pytest.mark.faults
@pytest.mark.parametrize("num_killed", [1, 2])
def test_kill_9_of_actors_in_a_group(tmp_path: Path, num_killed: int) -> None:
    policy = make_policy(MODEL)
    shake(policy)
    adapter = save_adapter(policy, tmp_path, version=1, run_name="r")
    with ray_fleet(policy, max_model_len=512) as (sampler, replicas, warnings):
        sampler.set_adapter(adapter)
        seen: list[int] = []

        def kill(index: int, _: object) -> None:
            if not seen:  # the others are in the middle of theirs
                for replica in replicas[:num_killed]:
                    os.kill(replica.process_id, signal.SIGKILL)
            seen.append(index)

        found = sampler.sample(PROMPTS, LONG, kill)
        assert found == expected_of(policy, adapter, LONG, 512)
        assert sorted(seen) == list(range(len(PROMPTS)))
        sampler.set_adapter(None)
        assert sampler.num_restarts == num_killed
    assert len(warnings) == num_killed
    assert all("its process has died; it is started again" in line for line in warnings)


@pytest.mark.long
@pytest.mark.faults
def test_an_actor_that_stops_answering(tmp_path: Path) -> None:
    policy = make_policy(MODEL)
    adapter = save_adapter(policy, tmp_path, version=1, run_name="r")
    with ray_fleet(policy, timeout_s=60) as (sampler, replicas, warnings):
        sampler.set_adapter(adapter)
        os.kill(replicas[0].process_id, signal.SIGSTOP)
        assert sampler.sample(PROMPTS, PARAMS) == expected_of(policy, adapter, PARAMS, 64)
    assert warnings[0].startswith("sampler 1: gave no token for 60 s (sampling.timeout_s)")


@pytest.mark.long
@pytest.mark.faults
def test_an_actor_that_answers_with_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds version 1 and is believed to hold version 2: its log-probs give it away."""
    policy = make_policy(MODEL)
    shake(policy)
    old = save_adapter(policy, tmp_path, version=1, run_name="r")
    shake(policy, seed=1)
    new = save_adapter(policy, tmp_path, version=2, run_name="r")
    load = RayReplica.load

    def stale(self: RayReplica, adapter: Any, files: Any, probes_N: Any) -> Future[Any]:
        if self.name == "sampler 1" and adapter is new:
            from rl_lora.samplers.fleet.replica import AdapterFiles

            return load(self, old, AdapterFiles.read(old), probes_N)
        return load(self, adapter, files, probes_N)

    monkeypatch.setattr(RayReplica, "load", stale)
    with ray_fleet(policy) as (sampler, _, warnings):
        sampler.set_adapter(new)
        assert sampler.sample(PROMPTS, PARAMS) == expected_of(policy, new, PARAMS, 64)
        sampler.token_logprobs([(1, 2)])
        metrics = sampler.metrics()
    assert metrics["fleet/false_proofs"] >= 1
    assert "it answered with adapter version 1, and 2 was sent" in warnings[0]


@pytest.mark.long
@pytest.mark.faults
def test_without_any_actor_the_job_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(MODEL)
    with ray_fleet(policy) as (sampler, replicas, _):
        failed: Future[None] = Future()
        failed.set_exception(EngineError("no process starts"))
        monkeypatch.setattr(RayReplica, "start", lambda self: failed)
        for replica in replicas:
            os.kill(replica.process_id, signal.SIGKILL)
        with pytest.raises(EngineError, match="no sampler is left") as caught:
            sampler.sample(PROMPTS, PARAMS)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_the_smoke_job_with_two_samplers_in_ray(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rl_lora", "train", "smoke", "sampling.backend=torch"]
    command += ["resources.samplers=2", "run.num_steps=2", f"run.output_dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "raylet" not in done.stdout + done.stderr
    lines = (tmp_path / "smoke" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert '"fleet/live": 2.0' in lines[-1]
