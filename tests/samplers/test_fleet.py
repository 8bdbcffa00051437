"""A sampler over many replicas, with small fakes: what comes back when some of them fail."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rl_lora.errors import EngineError, StaleAdapterError, UserError
from rl_lora.sampler import BASE_VERSION
from rl_lora.samplers.fleet.fleet import FleetSampler
from rl_lora.samplers.fleet.proofs import Prover
from rl_lora.samplers.fleet.replica import AdapterFiles, GroupRequest, Proof, ReplicaError
from rl_lora.seeds import sample_seeds
from rl_lora.types import Adapter, Completion, Probe, Prompt, SampleParams

PARAMS = SampleParams(num_samples=2, max_tokens=4, temperature=1.0, seed=5)
FOREVER_S = 600.0


class FakeProver(Prover):
    """The policy scores its one probe token as -version."""

    def __init__(self) -> None:
        pass

    def probe(self, adapter: Adapter | None) -> Probe | None:
        version = BASE_VERSION if adapter is None else adapter.version
        return Probe(((1, 2),), ((-float(version),),), limit=1e-4)


class FakeReplica:
    """Answers at once, except for groups that it is given to hold, which the test answers."""

    def __init__(self, name: str, *, max_samples: int = 4) -> None:
        self.name, self.max_samples = name, max_samples
        self.version = BASE_VERSION
        self.num_starts = 0
        self.num_false_proofs = 0  # to come
        self.is_closed = False
        self.on_sample: Callable[[FakeReplica, GroupRequest], Future[Any] | None] = nothing_else
        self.on_start: Callable[[], Future[None]] = lambda: done(None)
        self.held: list[tuple[Future[Any], GroupRequest, int]] = []
        self.prompts: list[str] = []  # of the groups that it got
        self.waiting_loads: list[Callable[[], None]] = []
        self.steps = 0  # progress
        self.is_alive = False  # progress without a step

    def start(self) -> Future[None]:
        self.num_starts += 1
        self.version, self.held, self.waiting_loads = BASE_VERSION, [], []
        return self.on_start()

    def load(
        self, adapter: Adapter | None, files: AdapterFiles | None, probes_N: Sequence[Sequence[int]]
    ) -> Future[Proof]:
        version = BASE_VERSION if adapter is None else adapter.version
        assert probes_N == ((1, 2),)
        future: Future[Proof] = Future()

        def load() -> None:
            fingerprint = "" if files is None else files.contents["fingerprint"].decode()
            self.version = version
            is_false = self.num_false_proofs > 0
            self.num_false_proofs -= is_false
            future.set_result(Proof(version, fingerprint, [[-float(version) + is_false]]))

        if self.held:
            self.waiting_loads.append(load)
        else:
            load()
        return future

    def sample(self, groups: Sequence[GroupRequest]) -> list[Future[list[Completion]]]:
        self.prompts += [group.prompt.prompt_id for group in groups]
        return [
            self.on_sample(self, group) or done(completions(group, self.version))
            for group in groups
        ]

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> Future[list[list[float]]]:
        return done([[-float(self.version)] * (len(ids) - 1) for ids in token_ids_N])

    def progress(self) -> object:
        return object() if self.is_alive else self.steps

    def close(self) -> None:
        self.is_closed = True

    # --- for tests

    def hold(self, group: GroupRequest) -> Future[Any]:
        future: Future[Any] = Future()
        self.held.append((future, group, self.version))
        return future

    def release(self) -> None:
        """Answers what is held, then loads."""
        for future, group, version in self.held:
            future.set_result(completions(group, version))
        self.held = []
        for load in self.waiting_loads:
            load()

    def die(self) -> None:
        for future, _, _ in self.held:
            future.set_exception(ReplicaError("the process died"))


def nothing_else(replica: FakeReplica, group: GroupRequest) -> None:
    """The usual answer."""


def hold_all(replica: FakeReplica, group: GroupRequest) -> Future[Any]:
    return replica.hold(group)


def done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def completions(group: GroupRequest, version: int) -> list[Completion]:
    """They say which seeds they are from."""
    return [
        Completion((seed % 997,), f"{group.prompt.prompt_id} {seed}", (-0.5,), False, version)
        for seed in group.seeds_G
    ]


def prompts_of(*names: str) -> list[Prompt]:
    return [Prompt(name, "test", "?", "1", (1, 2), columns={"row": object()}) for name in names]


def expected_texts(prompts_N: list[Prompt]) -> list[list[str]]:
    seeds_N_G = sample_seeds(prompts_N, PARAMS)
    return [
        [f"{prompt.prompt_id} {seed}" for seed in seeds_G]
        for prompt, seeds_G in zip(prompts_N, seeds_N_G, strict=True)
    ]


def texts_of(completions_N_G: list[list[Completion]]) -> list[list[str]]:
    return [[completion.text for completion in group] for group in completions_N_G]


def versions_of(completions_N_G: list[list[Completion]]) -> list[int]:
    return [completion.adapter_version for group in completions_N_G for completion in group]


def adapter_of(folder: Path, version: int) -> Adapter:
    path = folder / f"v{version:06d}"
    path.mkdir()
    (path / "fingerprint").write_text(f"print{version}")
    return Adapter(version, f"run-v{version:06d}", path, f"print{version}", 1)


@contextmanager
def fleet_of(
    *replicas: FakeReplica, max_restarts: int = 2, timeout_s: float = FOREVER_S
) -> Iterator[tuple[FleetSampler, list[str]]]:
    warnings: list[str] = []
    sampler = FleetSampler(
        replicas,
        FakeProver(),
        max_restarts=max_restarts,
        timeout_s=timeout_s,
        on_warning=warnings.append,
    )
    try:
        yield sampler, warnings
    finally:
        sampler.close()
        assert all(replica.is_closed for replica in replicas)


def test_groups_come_back_in_order_with_the_seeds_of_one_sampler(tmp_path: Path) -> None:
    a, b = FakeReplica("a", max_samples=2), FakeReplica("b", max_samples=2)
    prompts_N = prompts_of("p", "q", "p", "r", "p")
    seen: list[int] = []
    progress: list[tuple[int, int, int]] = []
    sampler = FleetSampler(
        [a, b],
        FakeProver(),
        max_restarts=2,
        timeout_s=FOREVER_S,
        on_warning=pytest.fail,
        on_progress=lambda *numbers: progress.append(numbers),
    )
    sampler.set_adapter(adapter_of(tmp_path, 3))
    found = sampler.sample(prompts_N, PARAMS, lambda index, group: seen.append(index))
    assert texts_of(found) == expected_texts(prompts_N)
    assert len({text for group in texts_of(found) for text in group}) == 10
    assert set(versions_of(found)) == {3}
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert progress[-1] == (10, 10, 10)
    assert len(a.prompts) + len(b.prompts) == 5
    assert sampler.token_logprobs([(1, 2, 3)]) == [[-3.0, -3.0]]
    assert sampler.sample([], PARAMS) == []
    sampler.close()
    sampler.close()
    with pytest.raises(RuntimeError, match="closed"):
        sampler.sample(prompts_N, PARAMS)


def test_the_data_sets_columns_stay_here() -> None:
    def check(replica: FakeReplica, group: GroupRequest) -> None:
        assert group.prompt.columns == {}

    a = FakeReplica("a")
    a.on_sample = check
    with fleet_of(a) as (sampler, _):
        sampler.sample(prompts_of("p"), PARAMS)


def test_the_next_group_goes_to_the_replica_with_room() -> None:
    """A slow one has its first group still when the other has done all the rest."""
    slow, fast = FakeReplica("slow", max_samples=2), FakeReplica("fast", max_samples=2)
    slow.on_sample = hold_all
    prompts_N = prompts_of(*"abcdefg")
    seen: list[int] = []

    def on_group(index: int, completions_G: list[Completion]) -> None:
        seen.append(index)
        if len(seen) == 6:
            slow.release()

    with fleet_of(slow, fast) as (sampler, _):
        assert texts_of(sampler.sample(prompts_N, PARAMS, on_group)) == expected_texts(prompts_N)
    assert (slow.prompts, fast.prompts) == (["a"], [*"bcdefg"])
    assert seen[-1] == 0


def test_a_group_counts_by_its_samples() -> None:
    """Room for 4: two groups of 2, or four of 1."""
    a = FakeReplica("a", max_samples=4)
    arrived = threading.Event()

    def hold(replica: FakeReplica, group: GroupRequest) -> Future[Any]:
        future = replica.hold(group)
        if len(replica.held) == 4:
            arrived.set()
        return future

    a.on_sample = hold
    one = SampleParams(num_samples=1, max_tokens=4, temperature=0.0)
    with fleet_of(a) as (sampler, _):
        thread = threading.Thread(target=lambda: sampler.sample(prompts_of(*"abcdef"), one))
        thread.start()
        assert arrived.wait(60)
        assert a.prompts == [*"abcd"]
        a.on_sample = nothing_else
        a.release()
        thread.join()


def test_a_replica_that_dies_in_a_group(tmp_path: Path) -> None:
    """It is started again, gets the version, proves it; its group is sampled by the other."""
    a, b = FakeReplica("a", max_samples=2), FakeReplica("b", max_samples=2)

    def die(replica: FakeReplica, group: GroupRequest) -> Future[Any]:
        future = replica.hold(group)
        if group.prompt.prompt_id == "a" and replica.num_starts == 1:
            future.set_exception(ReplicaError("the process died"))
        else:
            future.set_result(completions(group, replica.version))
        replica.held = []
        return future

    a.on_sample = die
    prompts_N = prompts_of(*"abcd")
    seen: list[int] = []
    with fleet_of(a, b) as (sampler, warnings):
        sampler.set_adapter(adapter_of(tmp_path, 1))
        found = sampler.sample(prompts_N, PARAMS, lambda index, _: seen.append(index))
        assert texts_of(found) == expected_texts(prompts_N)
        assert sorted(seen) == [0, 1, 2, 3]
        assert set(versions_of(found)) == {1}
        sampler.set_adapter(None)
        metrics = sampler.metrics()
        assert metrics["fleet/restarts"] == metrics["fleet/groups_sampled_again"] == 1
        assert (metrics["fleet/live"], metrics["fleet/left_out"]) == (2, 0)
        assert 0 <= metrics["fleet/idle_share"] <= 1
        assert sampler.metrics()["fleet/restarts"] == 0
        assert sampler.num_restarts == 1
    assert a.num_starts == 2
    (line,) = warnings
    assert line == (
        "a: the process died; it is started again; its 1 groups are sampled elsewhere, with the "
        "same seeds"
    )


def test_a_late_answer_of_a_replica_that_was_given_up_is_not_counted() -> None:
    a, b = FakeReplica("a", max_samples=2), FakeReplica("b", max_samples=2)
    kept: list[tuple[Future[Any], GroupRequest]] = []

    def hang(replica: FakeReplica, group: GroupRequest) -> Future[Any] | None:
        if replica.num_starts > 1:
            return None
        future = replica.hold(group)
        kept.append((future, group))
        return future

    a.on_sample = hang
    b.is_alive = True
    prompts_N = prompts_of(*"ab")
    seen: list[int] = []

    def answer_late(index: int, _: list[Completion]) -> None:
        seen.append(index)
        if len(seen) == 2:
            for future, group in kept:
                future.set_result(completions(group, BASE_VERSION))

    with fleet_of(a, b, timeout_s=0.2) as (sampler, warnings):
        found = sampler.sample(prompts_N, PARAMS, answer_late)
        assert texts_of(found) == expected_texts(prompts_N)
        assert texts_of(sampler.sample(prompts_N, PARAMS)) == expected_texts(prompts_N)
        assert sampler.num_restarts == 1
    assert sorted(seen) == [0, 1]
    assert len(kept) == 1
    assert "a: gave no token for 0.2 s (sampling.timeout_s)" in warnings[0]


def test_a_slow_replica_that_makes_progress_is_waited_for() -> None:
    a = FakeReplica("a")
    a.on_sample = hold_all
    looks = 0

    def look() -> object:
        nonlocal looks
        looks += 1
        if looks == 40:  # four times the limit
            a.release()
        return object()

    a.progress = look  # type: ignore[method-assign]
    with fleet_of(a, timeout_s=0.2) as (sampler, warnings):
        found = sampler.sample(prompts_of("p"), PARAMS)
    assert texts_of(found) == expected_texts(prompts_of("p"))
    assert warnings == []
    assert looks >= 40


def test_a_replica_that_does_not_start_in_time_is_left_out() -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    a.on_start = Future
    with fleet_of(a, b, timeout_s=0.1, max_restarts=1) as (sampler, warnings):
        found = sampler.sample(prompts_of(*"pq"), PARAMS)
        assert texts_of(found) == expected_texts(prompts_of(*"pq"))
        assert sampler.metrics()["fleet/left_out"] == 1
    assert a.num_starts == 2
    assert warnings[0].endswith("did not start for 0.1 s (sampling.timeout_s); it is started again")
    assert warnings[1].endswith("it is left out from now on")


@pytest.mark.parametrize("num_wrong", [1, 2, 9])
def test_an_answer_with_another_version(tmp_path: Path, num_wrong: int) -> None:
    """It is started again and, where that does not help, left out after two restarts in a row."""
    a, b = FakeReplica("a", max_samples=2), FakeReplica("b", max_samples=2)
    num_left = num_wrong

    def answer(replica: FakeReplica, group: GroupRequest) -> Future[Any] | None:
        nonlocal num_left
        if not num_left:
            return None
        num_left -= 1
        return done(completions(group, replica.version - 1))

    a.on_sample = answer
    prompts_N = prompts_of(*"abcdef")
    with fleet_of(a, b) as (sampler, warnings):
        sampler.set_adapter(adapter_of(tmp_path, 2))
        for _ in range(3):
            found = sampler.sample(prompts_N, PARAMS)
            assert texts_of(found) == expected_texts(prompts_N)
            assert set(versions_of(found)) == {2}
        metrics = sampler.metrics()
    num_noticed = min(num_wrong, 3)
    assert metrics["fleet/false_proofs"] == metrics["fleet/groups_sampled_again"] == num_noticed
    assert metrics["fleet/restarts"] == min(num_wrong, 2)
    assert metrics["fleet/left_out"] == (num_wrong == 9)
    assert "a: it answered with adapter version [1], and has 2" in warnings[0]


@pytest.mark.parametrize("num_false", [1, 2])
def test_a_false_proof(tmp_path: Path, num_false: int) -> None:
    """Once: it is started again and proves the version. Twice: it is left out, and counted."""
    a, b = FakeReplica("a"), FakeReplica("b")
    a.num_false_proofs = num_false
    with fleet_of(a, b, max_restarts=9) as (sampler, warnings):
        sampler.set_adapter(adapter_of(tmp_path, 1))
        found = sampler.sample(prompts_of(*"abcd"), PARAMS)
        assert set(versions_of(found)) == {1}
        sampler.set_adapter(adapter_of(tmp_path, 2))
        metrics = sampler.metrics()
    assert metrics["fleet/false_proofs"] == num_false
    assert metrics["fleet/left_out"] == (num_false == 2)
    assert a.prompts == [] or num_false == 1
    assert warnings[0].startswith(
        "a: sampler and policy disagree on fixed tokens: mean |difference| 1.00e+00 nats"
    )


def test_other_weights_under_the_right_number_are_a_false_proof(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path, 1)
    (adapter.path / "fingerprint").write_text("another")
    wrong = r"no sampler is left \(a: it loaded other weights"
    with (
        fleet_of(FakeReplica("a"), max_restarts=5) as (sampler, _),
        pytest.raises(EngineError, match=wrong),
    ):
        sampler.set_adapter(adapter)


def test_two_at_once_and_all() -> None:
    replicas = [FakeReplica(name, max_samples=2) for name in "abc"]
    prompts_N = prompts_of(*"pqrstu")

    def die_once(replica: FakeReplica, group: GroupRequest) -> Future[Any] | None:
        if replica.num_starts > 1:
            return None
        future: Future[Any] = Future()
        future.set_exception(ReplicaError("the process died"))
        return future

    for replica in replicas[:2]:
        replica.on_sample = die_once
    with fleet_of(*replicas) as (sampler, warnings):
        assert texts_of(sampler.sample(prompts_N, PARAMS)) == expected_texts(prompts_N)
        metrics = sampler.metrics()
        assert metrics["fleet/restarts"] == metrics["fleet/groups_sampled_again"] == 2
        assert len(warnings) == 2
    for replica in replicas:
        replica.num_starts = 0
        replica.on_sample = lambda *_: failed(ReplicaError("the process died"))
    with fleet_of(*replicas, max_restarts=1) as (sampler, warnings):
        with pytest.raises(EngineError, match="no sampler is left") as caught:
            sampler.sample(prompts_N, PARAMS)
        assert str(caught.value).count("the process died") == 3
        assert "\n" not in str(caught.value)
        with pytest.raises(EngineError, match="no sampler is left"):
            sampler.set_adapter(None)
    assert [replica.num_starts for replica in replicas] == [2, 2, 2]


def failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


@pytest.mark.parametrize("error", [UserError("a prompt is too long"), KeyError("a defect")])
def test_other_errors_end_the_call_and_not_the_fleet(error: Exception) -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    a.on_sample = lambda *_: failed(error)
    with fleet_of(a, b) as (sampler, _):
        with pytest.raises(type(error)) as caught:
            sampler.sample(prompts_of(*"pqr"), PARAMS)
        assert caught.value is error
        a.on_sample = nothing_else
        assert texts_of(sampler.sample(prompts_of("p"), PARAMS)) == expected_texts(prompts_of("p"))
        assert sampler.num_restarts == 0


def test_a_replica_that_cannot_be_started_ends_the_job_at_the_start() -> None:
    a, b = FakeReplica("a"), FakeReplica("b")
    b.on_start = lambda: failed(UserError("vLLM is missing there"))
    with pytest.raises(UserError, match="vLLM is missing there"):
        FleetSampler([a, b], FakeProver(), max_restarts=2, timeout_s=9, on_warning=pytest.fail)
    assert a.is_closed
    assert b.is_closed


def test_a_version_is_set_while_others_sample(tmp_path: Path) -> None:
    """What a replica is sampling stays of the old version; what it is sent later is of the new."""
    a, b = FakeReplica("a", max_samples=2), FakeReplica("b", max_samples=2)

    def hold(replica: FakeReplica, group: GroupRequest) -> Future[Any] | None:
        return replica.hold(group) if replica.version == 1 else None

    def sample() -> None:
        found.extend(sampler.sample(prompts_N, PARAMS))

    prompts_N, found = prompts_of(*"pqrs"), list[list[Completion]]()
    is_loading = threading.Event()
    a.on_sample = b.on_sample = hold
    with fleet_of(a, b) as (sampler, _):
        sampler.set_adapter(adapter_of(tmp_path, 1))
        thread = threading.Thread(target=sample)
        thread.start()
        for replica in (a, b):
            watch(replica, is_loading)
        setter = threading.Thread(target=lambda: sampler.set_adapter(adapter_of(tmp_path, 2)))
        while not (a.held and b.held):
            sampler.metrics()  # goes through the same queue
        setter.start()
        assert is_loading.wait(60)
        a.release()
        assert setter.is_alive()
        b.release()
        setter.join()
        thread.join()
    assert versions_of(found) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert texts_of(found) == expected_texts(prompts_N)


def watch(replica: FakeReplica, event: threading.Event) -> None:
    """Sets the event once the last of the replicas has been sent a version."""
    load = replica.load

    def watched(*args: Any) -> Future[Proof]:
        future = load(*args)
        if replica.name == "b":
            event.set()
        return future

    replica.load = watched  # type: ignore[method-assign, assignment]


def test_what_on_group_raises_ends_the_call_and_drops_what_is_not_sent() -> None:
    a = FakeReplica("a", max_samples=2)

    def stop(index: int, completions_G: list[Completion]) -> None:
        raise StaleAdapterError("enough")

    with fleet_of(a) as (sampler, _):
        a.on_sample = lambda replica, group: (
            None if group.prompt.prompt_id == "p" else replica.hold(group)
        )
        with pytest.raises(StaleAdapterError, match="enough"):
            sampler.sample(prompts_of(*"pqrs"), PARAMS, stop)
        sampler.metrics()
        a.on_sample = nothing_else
        a.release()
        assert texts_of(sampler.sample(prompts_of("t"), PARAMS)) == expected_texts(prompts_of("t"))
    assert set(a.prompts) <= {"p", "q", "t"}


def test_files_that_change_on_their_way_are_noticed(tmp_path: Path) -> None:
    files = AdapterFiles.read(adapter_of(tmp_path, 1))
    files.write(tmp_path / "good")
    assert (tmp_path / "good" / "fingerprint").read_text() == "print1"
    for contents in ({"fingerprint": b"print2"}, {"fingerprin": b"tprint1"}, {}):
        with pytest.raises(StaleAdapterError, match="changed on their way"):
            AdapterFiles(contents, files.sha256).write(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
