"""Sampling while learning: that it happens, how old the samples are, kills, errors of a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora import build as job
from rl_lora import train as loop
from rl_lora.adapters.files import load_tensors, saved_version
from rl_lora.config import RunConfig, load_config
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.overlap import Request, RolloutWorker
from rl_lora.policy import Policy, open_policy
from rl_lora.runs.checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint
from rl_lora.runs.log import RunLog
from rl_lora.runs.record import read_record
from rl_lora.sampler import OnGroup
from rl_lora.samplers.liveness import drop_stale
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.storage.jsonl import read_json, write_json
from rl_lora.train import train
from rl_lora.types import Adapter, Completion, Prompt, RolloutGroup, SampleParams
from tests.helpers.fakes import FakeReward, FakeSampler, make_prompt, make_rollout
from tests.test_train import SMOKE, metrics_of

SHORT = ["run.num_steps=4", "data.held_out=4", "sampling.num_prompts=3", "sampling.max_tokens=12"]
SHORT += ["sampling.num_samples=4", "optim.lr=1e-2"]
WAIT_S = 60.0  # for what comes soon, or never
PARAMS = SampleParams(num_samples=2, max_tokens=64, temperature=1.0, seed=1)


def one_request() -> Iterator[Request]:
    return iter([Request([make_prompt()], PARAMS, {"position": 1})])


def config(folder: Path, *overrides: str) -> RunConfig:
    settings = [*SHORT, "sampling.backend=vllm", "sampling.max_staleness=1", *overrides]
    return load_config(SMOKE, [f"run.output_dir={folder}", *settings])


class OwnWeights(TorchSampler):
    """A sampler with its own copy of the weights, as an engine's; one thread may be in it.

    `calls` has the version and the seed of each batch that was sampled in the other thread.
    """

    has_own_weights = True

    def __init__(self, policy: Policy, **options: Any) -> None:
        section = load_config(SMOKE).model
        own = open_policy(policy.model_dir, section, policy.lora, seed=0)
        super().__init__(own, **options)
        self.lock = threading.Lock()
        self.calls: list[tuple[int, int]] = []
        self.num_releases = 0
        self.is_stuck_at: int | None = None

    def set_adapter(self, adapter: Adapter | None) -> None:
        assert not self.lock.locked()
        stuck = self.is_stuck_at is not None and adapter and adapter.version >= self.is_stuck_at
        if adapter is not None and not stuck:
            self.policy.load_tensors(load_tensors(adapter.path))
        if stuck:
            assert adapter is not None
            self._version = adapter.version  # and the weights are of another one
        else:
            super().set_adapter(adapter)

    def sample(
        self,
        prompts_N: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        assert self.lock.acquire(blocking=False)
        try:
            if threading.current_thread() is not threading.main_thread():
                self.calls.append((self._version, params.seed))
                self.on_batch(len(self.calls))
            return super().sample(prompts_N, params, on_group)
        finally:
            self.lock.release()

    def on_batch(self, number: int) -> None:
        """For a test to wait in, or to raise."""

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        assert not self.lock.locked()
        return super().token_logprobs(token_ids_N)

    def release_memory(self) -> None:
        assert not self.lock.locked()
        self.num_releases += 1


@pytest.fixture
def samplers(monkeypatch: pytest.MonkeyPatch) -> list[OwnWeights]:
    """The samplers that jobs have made."""
    made: list[OwnWeights] = []

    def make(section: Any, policy: Policy, *, learner_bytes: int, **options: Any) -> Any:
        assert learner_bytes == 0  # on a CPU
        del options["on_warning"]
        made.append(OwnWeights(policy, **options))
        return made[-1]

    monkeypatch.setattr(job, "make_sampler", make)
    # No job here has vLLM's engine, so these run where it is not installed.
    monkeypatch.setattr("rl_lora.samplers.vllm.checks.check_vllm", lambda *_: None)
    return made


def test_a_batch_is_sampled_while_the_one_before_is_learned_from(
    tmp_path: Path, samplers: list[OwnWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither side advances without the other: each waits for the other to begin."""
    meeting = threading.Barrier(2, timeout=WAIT_S)
    learn = loop.learn

    def meet_and_learn(*arguments: Any) -> dict[str, float]:
        if arguments[-1] < 3:  # while the last step learns, nothing is sampled
            meeting.wait()
        return learn(*arguments)

    def on_batch(self: OwnWeights, number: int) -> None:
        if number > 1:
            meeting.wait()

    monkeypatch.setattr(loop, "learn", meet_and_learn)
    monkeypatch.setattr(OwnWeights, "on_batch", on_batch)
    train(config(tmp_path, "run.eval_every=2"), quiet=True)
    rows = metrics_of(tmp_path / "smoke")
    assert [row["rollouts/staleness_mean"] for row in rows] == [0, 1, 1, 1]
    assert [row["rollouts/staleness_max"] for row in rows] == [0, 1, 1, 1]
    (sampler,) = samplers
    assert [version for version, _ in sampler.calls] == [0, 0, 1, 2]  # four batches, none wasted
    assert len({seed for _, seed in sampler.calls}) == 4
    assert sampler.num_releases == 1
    assert 0 <= rows[0]["mismatch/kl"] < 1e-10
    assert max(row["mismatch/kl"] for row in rows[1:]) > 1e-6  # the policy has changed since
    assert all(row["mismatch/live_abs_mean"] < 1e-5 for row in rows)
    assert [thread.name for thread in threading.enumerate() if "sampler" in thread.name] == []


@pytest.mark.long
@pytest.mark.parametrize("max_staleness", [1, 2])
def test_a_run_killed_with_a_batch_under_way_ends_where_an_unbroken_one_does(
    tmp_path: Path,
    samplers: list[OwnWeights],
    monkeypatch: pytest.MonkeyPatch,
    max_staleness: int,
) -> None:
    """Step 3 is published and batch 4 is under way when it ends; the checkpoint is of step 2."""
    often = ["run.checkpoint_every=2", "run.eval_every=2"]
    often += [f"sampling.max_staleness={max_staleness}"]
    train(config(tmp_path, "run.name=whole", *often), quiet=True)
    write = RunLog.write

    def die_at_3(log: RunLog, step: int, metrics: Any) -> None:
        if step == 3:
            raise ConnectionAbortedError("killed")
        write(log, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", die_at_3)
        with pytest.raises(ConnectionAbortedError):
            train(config(tmp_path, "run.name=killed", *often), quiet=True)
    versions = {path.name for path in (tmp_path / "killed" / "adapters").iterdir()}
    assert {"v000001", "v000002", "v000003"} <= versions
    train(config(tmp_path, "run.name=killed", *often), resume=True, quiet=True)
    whole, killed, resumed = (sampler.calls for sampler in samplers)
    assert killed[:3] == whole[:3]
    assert resumed == whole[2:]
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "killed")
    last, again = (load_tensors(tmp_path / name / "adapter") for name in ("whole", "killed"))
    assert last.keys() == again.keys()
    assert all(torch.equal(last[name], again[name]) for name in last)


@pytest.mark.long
@pytest.mark.usefixtures("samplers")
def test_a_run_of_an_earlier_release_with_overlap_resumes(tmp_path: Path) -> None:
    """To the end of an unbroken one; what the policy said of fixed tokens was not kept then."""
    train(config(tmp_path, "run.name=whole"), quiet=True)
    train(config(tmp_path, "run.name=old", "run.num_steps=2"), quiet=True)
    folder = tmp_path / "old"
    path = latest_checkpoint(folder)
    assert path is not None
    tensors, state = read_checkpoint(path)
    (before,) = state.pop("older")
    assert before["version"] == 1
    state["previous"] = before["fingerprint"]
    record = read_json(folder / "run.json")
    for settings in (state["config"]["sampling"], record["config"]["sampling"]):
        assert settings.pop("max_staleness") == 1
        settings["overlap"] = True
    write_checkpoint(folder, 2, tensors, state)
    write_json(folder / "run.json", record)
    assert read_record(folder)["config"]["sampling"]["max_staleness"] == 1
    train(config(tmp_path, "run.name=old"), resume=True, quiet=True)
    expected, found = (metrics_of(tmp_path / name) for name in ("whole", "old"))
    del expected[2]["mismatch/live_abs_mean"]
    assert found == expected


def test_an_error_of_the_sampling_thread_is_the_runs(
    tmp_path: Path, samplers: list[OwnWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_batch(self: OwnWeights, number: int) -> None:
        if number == 2:
            raise ZeroDivisionError("in the sampler")

    monkeypatch.setattr(OwnWeights, "on_batch", on_batch)
    with pytest.raises(ZeroDivisionError, match="in the sampler"):
        train(config(tmp_path), quiet=True)
    assert len(metrics_of(tmp_path / "smoke")) == 1  # the step it overlapped is kept


def test_a_stale_sampler_is_found_although_samples_may_be_a_version_old(
    tmp_path: Path, samplers: list[OwnWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_batch(self: OwnWeights, number: int) -> None:
        self.is_stuck_at = 1  # it says 1, 2, ... from now on, and samples from 0

    monkeypatch.setattr(OwnWeights, "on_batch", on_batch)
    with pytest.raises(StaleAdapterError, match="disagree on fixed tokens"):
        train(config(tmp_path, "sampling.max_kl=1e-8"), quiet=True)


class Endless(FakeSampler):
    """Runs for ever, as long as it can hand groups over."""

    was_ended = False

    def sample(
        self, prompts: Sequence[Prompt], params: SampleParams, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        groups = super().sample(prompts, params)
        assert on_group is not None
        try:
            while True:
                on_group(0, groups[0])
                time.sleep(0.01)
        finally:
            self.was_ended = True


def adapter(version: int) -> Adapter:
    return Adapter(version, f"v{version}", Path("none"), f"hash {version}", 1)


def test_the_end_of_a_run_ends_the_sampling() -> None:
    sampler = Endless(lambda prompt, index: "7")
    with RolloutWorker(sampler, FakeReward(), one_request(), max_staleness=1) as worker:
        assert worker.start(adapter(0))
        while not sampler.calls:
            time.sleep(0.01)
    assert sampler.was_ended


def test_a_batch_of_another_version_is_refused_whoever_waits_for_it() -> None:
    sampler = FakeSampler(lambda prompt, index: "7")
    sampler.set_adapter = lambda adapter: None  # type: ignore[method-assign]
    with RolloutWorker(sampler, FakeReward(), one_request(), max_staleness=1) as worker:
        assert worker.start(adapter(5))
        with pytest.raises(StaleAdapterError, match="version 5 was asked for"):
            worker.wait()
        with pytest.raises(StaleAdapterError):
            worker.pop()


def test_the_worker_stops_where_the_requests_do() -> None:
    sampler = FakeSampler(lambda prompt, index: "7")
    with RolloutWorker(sampler, FakeReward(), one_request(), max_staleness=1) as worker:
        assert worker.start(adapter(0))
        assert worker.pop().position == {"position": 1}
        assert not worker.start(adapter(0))
    assert len(sampler.calls) == 1


def group_of(*versions: int) -> RolloutGroup:
    rollouts = tuple(make_rollout(1.0, adapter_version=version) for version in versions)
    return RolloutGroup(make_prompt(), rollouts)


def test_staleness_is_counted_and_limited() -> None:
    group = group_of(3, 4, 4, 4)
    kept, metrics = drop_stale([group], 4, 1)
    assert kept == [group]
    assert metrics == {
        "rollouts/staleness_mean": 0.25,
        "rollouts/staleness_max": 1.0,
        "rollouts/num_versions": 2.0,
        "rollouts/stale_groups": 0.0,
    }
    assert drop_stale([group_of(4, 4)], 4, 0)[1] == {
        "rollouts/staleness_mean": 0.0,
        "rollouts/staleness_max": 0.0,
    }
    allowed = "staleness 0 to 1 for policy version 4, and staleness 0 to 0 is allowed"
    with pytest.raises(StaleAdapterError, match=allowed):
        drop_stale([group_of(4, 4), group], 4, 0)
    with pytest.raises(StaleAdapterError, match="staleness -1 to 0 for policy version 3"):
        drop_stale([group, group_of(3, 3)], 3, 1)


def test_groups_that_are_too_old_are_left_out_and_counted() -> None:
    """One sample that is too old is enough; at least one group must be left."""
    groups = [group_of(3, 3), group_of(2, 3), group_of(4, 5), group_of(1, 1)]
    kept, metrics = drop_stale(groups, 5, 2)
    assert kept == [groups[0], groups[2]]
    assert metrics == {
        "rollouts/staleness_mean": 1.25,
        "rollouts/staleness_max": 2.0,
        "rollouts/num_versions": 3.0,
        "rollouts/stale_groups": 2.0,
    }
    with pytest.raises(StaleAdapterError, match="staleness 2 to 4 for policy version 5"):
        drop_stale([groups[1], groups[3]], 5, 1)


def test_staleness_needs_a_sampler_with_its_own_weights(tmp_path: Path) -> None:
    told = r'sampling\.max_staleness=1: .* sampling\.backend="vllm"'
    with pytest.raises(UserError, match=told):
        config(tmp_path, "sampling.backend=torch")


@pytest.mark.slow
def test_real_vllm_samples_while_the_learner_learns_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    if torch.cuda.is_available():
        pytest.skip("rounding on a GPU depends on the batch")
    make, has_drawn = RolloutWorker._sample, []

    def make_and_look(*args: Any) -> Any:
        """The thread does not touch PyTorch's random state, which nothing in it puts back."""
        before = torch.get_rng_state()
        batch = make(*args)
        has_drawn.append(not torch.equal(torch.get_rng_state(), before))
        return batch

    monkeypatch.setattr(RolloutWorker, "_sample", make_and_look)
    options = ["sampling.max_num_seqs=16", "sampling.max_tokens=24"]
    train(config(tmp_path, "run.num_steps=3", "run.name=whole", *options), quiet=True)
    assert has_drawn == [False] * 3
    train(config(tmp_path, "run.num_steps=2", "run.name=parts", *options), quiet=True)
    train(config(tmp_path, "run.num_steps=3", "run.name=parts", *options), resume=True, quiet=True)
    rows, again = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row["rollouts/staleness_max"] for row in rows] == [0, 1, 1]
    assert rows[0]["mismatch/kl"] < 1e-7
    assert all(row["mismatch/live_abs_mean"] < 1e-4 for row in rows)
    for row, same in zip(rows, again, strict=True):
        assert row["reward/mean"] == same["reward/mean"]
        assert row["adapter/norm"] == pytest.approx(same["adapter/norm"], rel=1e-4)


def test_a_version_that_was_changed_is_not_sampled_from_again(
    tmp_path: Path, samplers: list[OwnWeights]
) -> None:
    train(config(tmp_path, "run.num_steps=1"), quiet=True)
    path = tmp_path / "smoke" / "adapters" / "v000001"
    with pytest.raises(UserError, match="not the one that the run sampled from"):
        saved_version(path, "0123")
