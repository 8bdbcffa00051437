"""Sampling that runs ahead by several versions: which version samples what, in the learner's
process and in a fleet; what is counted, refused and resumed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from rl_lora import build as job
from rl_lora import train as loop
from rl_lora.config import load_config
from rl_lora.data.stream import PromptStream
from rl_lora.errors import StaleAdapterError
from rl_lora.overlap import Batch, Request, RolloutWorker
from rl_lora.runs.log import RunLog
from rl_lora.sampler import OnGroup
from rl_lora.samplers.liveness import check_version, compare
from rl_lora.train import train
from rl_lora.types import Adapter, Completion, Probe, Prompt, SampleParams
from tests.helpers.fakes import FakeReward, FakeSampler, make_prompt
from tests.helpers.torch_fleet import TorchFleet
from tests.test_overlap import WAIT_S, adapter, config
from tests.test_train import SMOKE, metrics_of

NUM_STEPS = 7


def requests(first: int = 1) -> Iterator[Request]:
    """One per step: two prompts that are named by it, whose seed is the step."""
    for step in range(first, NUM_STEPS + 1):
        prompts_N = [make_prompt(f"{step}/{n}") for n in range(2)]
        params = SampleParams(num_samples=2, max_tokens=8, temperature=1.0, seed=step)
        yield Request(prompts_N, params, {"step": step})


def versions_of(batch: Batch) -> list[int]:
    return [g.rollouts_G[0].completion.adapter_version for g in batch.scoring.groups()]


class Engine(FakeSampler):
    """In the learner's process: nothing of it is called from two threads at once."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, index: "7")
        self.lock = threading.Lock()
        self.log: list[tuple[str, int, str]] = []  # (call, version or seed, thread)

    def set_adapter(self, adapter: Adapter | None) -> None:
        assert self.lock.acquire(blocking=False)
        super().set_adapter(adapter)
        self._note("set_adapter", self.adapter_version)
        self.lock.release()

    def sample(
        self, prompts: Sequence[Prompt], params: SampleParams, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        assert self.lock.acquire(blocking=False)
        self._note("sample", params.seed)
        self.on_batch(params.seed)
        try:
            return super().sample(prompts, params, on_group)
        finally:
            self.lock.release()

    def on_batch(self, step: int) -> None:
        """For a test to wait in."""

    def _note(self, call: str, number: int) -> None:
        self.log.append((call, number, threading.current_thread().name.partition("_")[0]))


# --- in the learner's process ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_staleness", "expected"),
    [(1, [0, 0, 1, 2, 3, 4, 5]), (2, [0, 0, 0, 1, 2, 3, 4]), (9, [0] * 7)],
)
@pytest.mark.parametrize("num_done", [0, 1, 2, 5])
def test_each_step_samples_from_its_own_version_also_after_a_resumption(
    max_staleness: int, expected: list[int], num_done: int
) -> None:
    """num_done: steps before the resumption; the versions before it are on disk."""
    engine = Engine()
    with RolloutWorker(
        engine, FakeReward(), requests(num_done + 1), max_staleness=max_staleness
    ) as worker:
        for step in range(num_done + 1, NUM_STEPS + 1):
            older = [adapter(v) for v in range(max(0, step - 1 - max_staleness), step - 1)]
            batch = worker.next_batch(adapter(step - 1), older)
            assert batch.position == {"step": step}
            assert versions_of(batch) == [expected[step - 1]] * 2
            worker.offer(adapter(step))
    sampled = [(number, thread) for call, number, thread in engine.log if call == "sample"]
    assert sampled == [(step, "sampler") for step in range(num_done + 1, NUM_STEPS + 1)]
    assert engine.num_releases == 1  # when all is sampled
    assert engine.adapter_version == NUM_STEPS  # for the last evaluation


def test_the_learner_goes_ahead_while_batches_before_the_newest_are_sampled() -> None:
    """Step 2 begins to learn while step 3's batch, the next one, is still being sampled; the new
    version waits for it, and neither waits for the learner."""
    engine, is_learning = Engine(), threading.Event()

    def on_batch(step: int) -> None:
        if step == 3:
            assert is_learning.wait(WAIT_S)

    engine.on_batch = on_batch  # type: ignore[method-assign]
    with RolloutWorker(engine, FakeReward(), requests(), max_staleness=2) as worker:
        for step in (1, 2):
            assert versions_of(worker.next_batch(adapter(step - 1))) == [0, 0]
            worker.offer(adapter(step))
        is_learning.set()
        assert versions_of(worker.next_batch(adapter(2))) == [0, 0]
        worker.wait()
    assert [(call, number) for call, number, _ in engine.log] == [
        ("set_adapter", 0), ("sample", 1), ("sample", 2), ("sample", 3),
        ("set_adapter", 1), ("sample", 4), ("set_adapter", 2), ("sample", 5),
    ]  # fmt: skip


def test_an_evaluation_has_the_newest_version_and_the_batches_keep_theirs() -> None:
    engine = Engine()
    with RolloutWorker(engine, FakeReward(), requests(), max_staleness=2) as worker:
        for step in range(1, NUM_STEPS + 1):
            assert versions_of(worker.next_batch(adapter(step - 1))) == [max(0, step - 3)] * 2
            worker.ensure_adapter(adapter(step))
            assert engine.adapter_version == step
            assert not engine.lock.locked()


def test_the_sampler_is_checked_under_each_version_before_it_samples() -> None:
    engine, checked = Engine(), []

    def check(adapter: Adapter) -> dict[str, float]:
        assert adapter.version == engine.adapter_version
        checked.append(adapter.version)
        if adapter.version == 3:
            raise StaleAdapterError("not version 3")
        return {"mismatch/live_abs_mean": float(adapter.version)}

    with RolloutWorker(engine, FakeReward(), requests(), max_staleness=2, check=check) as worker:
        for step in range(1, 6):
            batch = worker.next_batch(adapter(step - 1))
            assert batch.metrics()["mismatch/live_abs_mean"] == max(0, step - 3)
        with pytest.raises(StaleAdapterError, match="not version 3"):
            worker.next_batch(adapter(5))
    assert checked[:6] == [0, 0, 0, 1, 2, 3]
    assert ("sample", 6, "sampler") not in engine.log


def test_a_probe_is_compared_in_nats_per_token() -> None:
    """FakeSampler answers -0.5 for each token."""
    sampler = FakeSampler(lambda prompt, index: "7")
    near = Probe(((1, 2, 3), (4, 5)), ((-0.5, -0.75), (-0.5,)), limit=0.1)
    found = check_version(sampler, Adapter(1, "v1", Path(), "", 1, near))
    assert found == {"mismatch/live_abs_mean": pytest.approx(0.25 / 3)}
    with pytest.raises(StaleAdapterError, match=r"mean \|difference\| 8.33e-02 nats"):
        compare(Probe(near.token_ids_N, near.logprobs_N, 0.08), [[-0.5, -0.5], [-0.5]])
    with pytest.raises(StaleAdapterError):
        compare(near, [[-0.5, float("nan")], [-0.5]])
    assert check_version(sampler, adapter(1)) == {}  # of a checkpoint of an earlier release


# --- a fleet --------------------------------------------------------------------------------------


class Fleet(FakeSampler):
    """Each call samples its groups in turn, each from the version that is newest then."""

    switches_while_sampling = True

    def __init__(self) -> None:
        super().__init__(lambda prompt, index: "7")
        self.threads: set[str] = set()

    def set_adapter(self, adapter: Adapter | None) -> None:
        self.on_version(-1 if adapter is None else adapter.version)
        super().set_adapter(adapter)

    def sample(
        self, prompts: Sequence[Prompt], params: SampleParams, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        assert on_group is not None
        self.threads.add(threading.current_thread().name)
        groups = []
        for index, prompt in enumerate(prompts):
            self.on_prompt(prompt.prompt_id)
            groups += super().sample([prompt], params)
            on_group(index, groups[-1])
        return groups

    def on_version(self, version: int) -> None:
        """For a test to wait in."""

    def on_prompt(self, prompt_id: str) -> None:
        """For a test to wait in."""

    def metrics(self) -> dict[str, float]:
        return {"fleet/live": 2.0}


def test_a_fleet_gets_all_batches_that_may_be_sampled_at_once() -> None:
    """Three calls meet in their first prompts, or none ends."""
    fleet, meeting = Fleet(), threading.Barrier(3, timeout=WAIT_S)

    def on_prompt(prompt_id: str) -> None:
        if prompt_id in ("1/0", "2/0", "3/0"):
            meeting.wait()

    fleet.on_prompt = on_prompt  # type: ignore[method-assign]
    with RolloutWorker(fleet, FakeReward(), requests(), max_staleness=2) as worker:
        batch = worker.next_batch(adapter(0))
        assert batch.position == {"step": 1}
        assert batch.metrics()["fleet/live"] == 2.0
    assert len(fleet.threads) == 3


def test_a_version_reaches_a_fleet_in_the_midst_of_a_batch() -> None:
    """Batch 2 is half sampled when version 1 is published: its other group is of version 1, and
    nobody has waited for it."""
    fleet, has_begun, is_switched = Fleet(), threading.Event(), threading.Event()

    def on_prompt(prompt_id: str) -> None:
        if prompt_id == "2/1":
            has_begun.set()
            assert is_switched.wait(WAIT_S)

    fleet.on_prompt = on_prompt  # type: ignore[method-assign]
    with RolloutWorker(fleet, FakeReward(), requests(), max_staleness=1) as worker:
        assert versions_of(worker.next_batch(adapter(0))) == [0, 0]
        assert has_begun.wait(WAIT_S)
        worker.offer(adapter(1))
        worker.wait()  # for the version, not for the batch
        assert fleet.adapter_version == 1
        is_switched.set()
        assert versions_of(worker.next_batch(adapter(1))) == [0, 1]


class SlowToSwitch(Fleet):
    """Versions from 1 on arrive when `may_switch` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_switch = threading.Event()

    def on_version(self, version: int) -> None:
        assert version == 0 or self.may_switch.wait(WAIT_S)


def test_a_batch_waits_for_the_oldest_version_that_it_may_be_of() -> None:
    """Step 4 may be sampled from version 1 at the earliest: until that is there only steps 1 to 3
    are, although the learner has published it, and the next one."""
    fleet = SlowToSwitch()
    with RolloutWorker(fleet, FakeReward(), requests(), max_staleness=2) as worker:
        for step in (1, 2, 3):
            assert versions_of(worker.next_batch(adapter(step - 1))) == [0, 0]
            worker.offer(adapter(step))
        sampled = {prompt.prompt_id[0] for prompts, _ in fleet.calls for prompt in prompts}
        assert sampled == {"1", "2", "3"}
        fleet.may_switch.set()
        assert {*versions_of(worker.next_batch(adapter(3)))} <= {1, 2, 3}


def test_a_run_that_ends_does_not_wait_for_a_version() -> None:
    fleet = SlowToSwitch()
    with RolloutWorker(fleet, FakeReward(), requests(), max_staleness=1) as worker:
        worker.next_batch(adapter(0))
        worker.offer(adapter(1))
        worker.next_batch(adapter(1))
        job, has_polled = worker._under_way[-1], threading.Event()
        check_wanted, waiting = job.scoring.check_wanted, job.sampled

        def check() -> None:
            has_polled.set()
            check_wanted()

        job.scoring.check_wanted = check  # type: ignore[method-assign]
        waiting.add_done_callback(lambda _: fleet.may_switch.set())  # only the worker's end ends it
        assert has_polled.wait(WAIT_S)  # or the batch may not have begun, and is cancelled at once
    with pytest.raises(CancelledError, match="no longer wanted"):
        waiting.result()


def test_a_version_that_a_run_no_longer_waited_for_is_set_for_the_evaluation_at_its_end() -> None:
    fleet = SlowToSwitch()
    with RolloutWorker(fleet, FakeReward(), requests(), max_staleness=1) as worker:
        worker.next_batch(adapter(0))
        worker.offer(adapter(1))  # under way
        worker.offer(adapter(2))  # waits for it, and is cancelled by the worker's end
        worker._has_version.add_done_callback(lambda _: fleet.may_switch.set())
    worker.ensure_adapter(adapter(2))
    assert fleet.adapter_version == 2


def test_what_a_fleet_raises_at_a_version_is_the_runs() -> None:
    fleet = Fleet()

    def on_version(version: int) -> None:
        if version == 1:
            raise StaleAdapterError("no replica has proved version 1")

    fleet.on_version = on_version  # type: ignore[method-assign]
    with RolloutWorker(fleet, FakeReward(), requests(), max_staleness=1) as worker:
        worker.next_batch(adapter(0))
        worker.offer(adapter(1))
        with pytest.raises(StaleAdapterError, match="has proved version 1"):
            worker.ensure_adapter(adapter(1))  # an evaluation
        worker.next_batch(adapter(1))
        with pytest.raises(StaleAdapterError, match="has proved version 1"):
            worker.next_batch(adapter(1))


# --- jobs with a fleet ----------------------------------------------------------------------------


@pytest.fixture
def fleets(monkeypatch: pytest.MonkeyPatch) -> list[TorchFleet]:
    """The fleets that jobs have made."""
    made: list[TorchFleet] = []

    def make(section: Any, policy: Any, **options: Any) -> TorchFleet:
        del options["learner_bytes"], options["on_warning"]
        made.append(TorchFleet(policy, model=load_config(SMOKE).model, **options))
        return made[-1]

    monkeypatch.setattr(job, "make_sampler", make)
    monkeypatch.setattr("rl_lora.samplers.vllm.checks.check_vllm", lambda *_: None)
    monkeypatch.setattr(loop, "draw_figures", lambda folder: None)  # it takes longer than the job
    return made


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.usefixtures("fleets")
def test_a_run_with_a_fleet_that_is_killed_uses_each_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies in step 4 with 5 and 6 under way; the checkpoint is of step 2. Every step learns from
    the prompts that follow those of the step before in the stream."""
    often = ["run.num_steps=6", "run.checkpoint_every=2", "sampling.max_staleness=2"]
    learn, write = loop.learn, RunLog.write
    learned: list[tuple[int, list[str]]] = []
    expected: list[list[str]] = []

    def note_and_learn(*arguments: Any) -> dict[str, float]:
        context, _, groups_N, version = arguments
        learned.append((version + 1, [group.prompt.prompt_id for group in groups_N]))
        stream = PromptStream(context.prompts.train, context.config.run.seed)
        expected[:] = [[prompt.prompt_id for prompt in stream.take(3)] for _ in range(6)]
        return learn(*arguments)

    def die_at_4(log: RunLog, step: int, metrics: Any) -> None:
        if step == 4:
            raise ConnectionAbortedError("killed")
        write(log, step, metrics)

    monkeypatch.setattr(loop, "learn", note_and_learn)
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write", die_at_4)
        with pytest.raises(ConnectionAbortedError):
            train(config(tmp_path, *often), quiet=True)
    train(config(tmp_path, *often), resume=True, quiet=True)
    steps = [1, 2, 3, 4, 3, 4, 5, 6]
    assert learned == [(step, expected[step - 1]) for step in steps]
    assert len({name for names in expected for name in names}) == 18
    rows = metrics_of(tmp_path / "smoke")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["rollouts/staleness_max"] <= 2 for row in rows)
    assert all(row["rollouts/stale_groups"] == 0 for row in rows)
    assert rows[0]["rollouts/staleness_max"] == rows[2]["rollouts/staleness_max"] == 0


@pytest.mark.slow
def test_groups_of_a_replica_that_misses_versions_are_left_out_and_counted(
    tmp_path: Path, fleets: list[TorchFleet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once both do, the run ends."""
    learn = loop.learn

    def deafen(*arguments: Any) -> dict[str, float]:
        (fleet,) = fleets
        fleet.deaf = {0, 1} if arguments[-1] >= 4 else {0}
        return learn(*arguments)

    monkeypatch.setattr(loop, "learn", deafen)
    settings = ["run.num_steps=9", "sampling.max_staleness=1", "sampling.num_prompts=8"]
    with pytest.raises(StaleAdapterError, match="staleness 0 to 1 is allowed"):
        train(config(tmp_path, *settings), quiet=True)
    rows = metrics_of(tmp_path / "smoke")
    counts = [row["rollouts/stale_groups"] for row in rows]
    assert counts[:2] == [0, 0]
    assert sum(counts) > 0
    assert all(row["rollouts/staleness_max"] <= 1 for row in rows)
    assert all(row["groups/num"] == 8 for row in rows)
