"""A failed or hanging engine is replaced: what is sampled again, what is not, and when it ends."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora.errors import EngineError, StaleAdapterError, UserError
from rl_lora.overlap import Request, RolloutWorker
from rl_lora.sampler import OnGroup
from rl_lora.samplers.restarts import RestartingSampler
from rl_lora.seeds import sample_seeds
from rl_lora.types import Adapter, Completion, Prompt, SampleParams
from tests.helpers.fakes import FakeReward, make_prompt

pytestmark = pytest.mark.faults
ROOT = Path(__file__).resolve().parents[2]
PARAMS = SampleParams(num_samples=2, max_tokens=8, temperature=1.0, seed=3)
PROMPTS = [make_prompt(name) for name in ("a", "b", "a", "c", "b")]  # two occur twice
ADAPTER = Adapter(4, "v4", Path("v4"), "f" * 16, rank=1)
LONG_S = 60.0  # what a healthy test never waits for

Fault = Callable[[int], None]  # of the number of groups that the engine has sampled


class Engines:
    """Makes engines, and has each fail by its own fault; the last one for all that come after."""

    def __init__(self, *faults: Fault | None) -> None:
        self.faults = list(faults)
        self.made: list[Engine] = []
        self.warnings: list[str] = []

    def make(self) -> Engine:
        self.made.append(Engine(self.faults.pop(0) if self.faults else None))
        return self.made[-1]

    def sampler(self, max_restarts: int = 2, timeout_s: float = LONG_S) -> RestartingSampler:
        return RestartingSampler(
            self.make,
            max_restarts=max_restarts,
            timeout_s=timeout_s,
            on_restart=self.warnings.append,
        )


class Engine:
    """A sampler whose tokens are the seeds. It delivers the groups in the opposite order."""

    def __init__(self, fault: Fault | None) -> None:
        self.fault, self.num_groups, self.is_closed = fault, 0, False
        self.version = -1
        self.sampled: list[str] = []

    def progress(self) -> int:
        return self.num_groups

    def set_adapter(self, adapter: Adapter | None) -> None:
        self.version = -1 if adapter is None else adapter.version

    def sample(
        self, prompts_N: Sequence[Prompt], params: SampleParams, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        assert not self.is_closed
        seeds_N_G = sample_seeds(prompts_N, params)
        groups_N = [
            [Completion((s,), str(s), (-0.5,), False, self.version) for s in seeds_G]
            for seeds_G in seeds_N_G
        ]
        for index in reversed(range(len(groups_N))):
            if self.fault is not None:
                self.fault(self.num_groups)
            self.num_groups += 1
            self.sampled.append(prompts_N[index].prompt_id)
            if on_group is not None:
                on_group(index, groups_N[index])
        return groups_N

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        if self.fault is not None:
            self.fault(self.num_groups)
        return [[float(self.version)] for _ in token_ids_N]

    def release_memory(self) -> None:
        """It holds none."""

    def close(self) -> None:
        self.is_closed = True


def fails(at: int = 0, error: Exception | None = None) -> Fault:
    def fault(num_groups: int) -> None:
        if num_groups == at:
            raise error or EngineError(f"failed at {at}")

    return fault


def seeds_of(groups_N: list[list[Completion]]) -> list[list[int]]:
    return [[c.token_ids[0] for c in completions_G] for completions_G in groups_N]


def test_the_missing_groups_are_sampled_again_with_their_seeds_and_delivered_once() -> None:
    engines = Engines(fails(at=2), fails(at=1))
    sampler = engines.sampler()
    sampler.set_adapter(ADAPTER)
    delivered: list[int] = []
    groups_N = sampler.sample(PROMPTS, PARAMS, lambda index, _: delivered.append(index))
    assert seeds_of(groups_N) == sample_seeds(PROMPTS, PARAMS)
    assert {c.adapter_version for completions_G in groups_N for c in completions_G} == {4}
    assert delivered == [4, 3, 2, 1, 0]
    # Prompt c is done when the first engine fails; b is not, since its first group is missing.
    assert [engine.sampled for engine in engines.made] == [["b", "c"], ["b"], ["b", "a", "b", "a"]]
    assert [engine.is_closed for engine in engines.made] == [True, True, False]
    assert sampler.num_restarts == 2
    assert engines.warnings == [
        f"failed at {at}; a new engine continues with the same seeds" for at in (2, 1)
    ]
    sampler.sample(PROMPTS, PARAMS)
    assert sampler.num_restarts == 2
    sampler.close()
    assert engines.made[-1].is_closed


def test_a_restart_is_not_spent_on_what_a_call_has_survived() -> None:
    engines = Engines(fails(), fails(at=5), fails(at=5))
    sampler = engines.sampler(max_restarts=1)
    for _ in range(3):
        sampler.sample(PROMPTS, PARAMS)
    assert sampler.num_restarts == 3


def test_more_failures_in_a_row_than_allowed_end_in_the_engines_error() -> None:
    cause = ZeroDivisionError("deep inside")
    last = EngineError("the last")
    last.__cause__ = cause
    engines = Engines(fails(), fails(), fails(error=last))
    with pytest.raises(EngineError, match=r"^the last; 2 restarts in a row \(sampling\.max") as got:
        engines.sampler().sample(PROMPTS, PARAMS)
    assert got.value.__cause__ is cause
    assert len(engines.made) == 3
    none = Engines(fails())
    with pytest.raises(EngineError, match=r"^failed at 0$"):
        none.sampler(max_restarts=0).sample(PROMPTS, PARAMS)
    assert none.warnings == []


def test_out_of_memory_names_the_setting() -> None:
    error = EngineError("vLLM failed")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    engines = Engines(fails(error=error))
    engines.sampler().sample(PROMPTS, PARAMS)
    assert engines.warnings[0].startswith("vLLM failed; set a lower sampling.memory_fraction;")


@pytest.mark.parametrize(
    "error", [UserError("too long"), StaleAdapterError("stale"), ValueError("a defect of ours")]
)
def test_what_is_not_the_engines_fault_is_raised(error: Exception) -> None:
    engines = Engines(fails(error=error))
    with pytest.raises(type(error)) as got:
        engines.sampler().sample(PROMPTS, PARAMS)
    assert got.value is error
    assert len(engines.made) == 1


def test_an_error_of_the_caller_is_raised() -> None:
    engines, error = Engines(), RuntimeError("scoring failed")

    def refuse(index: int, completions_G: list[Completion]) -> None:
        raise error

    with pytest.raises(RuntimeError) as got:
        engines.sampler().sample(PROMPTS, PARAMS, refuse)
    assert got.value is error
    assert len(engines.made) == 1


def test_an_engine_that_does_not_start_again() -> None:
    engines = Engines(fails())
    sampler = engines.sampler(max_restarts=1)

    def broken() -> Engine:
        raise MemoryError("no room\nfor it")

    sampler._make = broken
    told = "^no new engine starts: MemoryError: no room; 1 restart in a row"
    with pytest.raises(EngineError, match=told):
        sampler.sample(PROMPTS, PARAMS)


def test_an_engine_that_fails_when_it_gets_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The new engine gets the new adapter, not the one before, whose files may be gone."""
    engines, loaded = Engines(), []
    sampler = engines.sampler()
    sampler.set_adapter(ADAPTER)
    original = Engine.set_adapter

    def faulty(engine: Engine, adapter: Adapter | None) -> None:
        loaded.append(adapter)
        if len(loaded) == 1:
            raise EngineError("failed")
        original(engine, adapter)

    monkeypatch.setattr(Engine, "set_adapter", faulty)
    newer = Adapter(5, "v5", Path("v5"), "e" * 16, rank=1)
    sampler.set_adapter(newer)
    assert loaded == [newer, newer]
    engines.made[-1].fault = fails()
    assert sampler.token_logprobs([(1, 2)]) == [[5.0]]  # a third engine
    assert sampler.num_restarts == 2


# --- hangs ----------------------------------------------------------------------------------------


def loops(num_groups: int) -> None:
    while True:
        pass


def test_a_hang_in_python_is_broken_off() -> None:
    engines = Engines(loops)
    sampler = engines.sampler(timeout_s=0.2)
    groups_N = sampler.sample(PROMPTS, PARAMS)
    assert seeds_of(groups_N) == sample_seeds(PROMPTS, PARAMS)
    told = "vLLM gave no token for 0.2 s (sampling.timeout_s); a new engine continues with the same"
    assert engines.warnings == [f"{told} seeds"]
    engines = Engines(loops, loops)
    with pytest.raises(EngineError, match=r"no token for 0\.2 s .*; 1 restart in a row"):
        engines.sampler(max_restarts=1, timeout_s=0.2).sample(PROMPTS, PARAMS)


def test_what_makes_progress_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that takes 50 looks of the watchdog, of which 10 without progress would end it."""
    looks, is_long = itertools.count(1), threading.Event()

    def progress(engine: Engine) -> int:
        number = next(looks)
        if number == 50:
            is_long.set()
        return number // 5

    monkeypatch.setattr(Engine, "progress", progress)
    engines = Engines(lambda num_groups: None if is_long.wait(LONG_S) else loops(0))
    engines.sampler(timeout_s=0.1).sample(PROMPTS, PARAMS)
    assert len(engines.made) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


@pytest.mark.parametrize("is_caught", [True, False])
def test_a_hang_in_native_code_ends_the_process(is_caught: bool) -> None:
    program = f"""
import ctypes
from rl_lora.samplers import watchdog
watchdog._GRACE_S = 0.2
def loop():
    while True: pass
try:
    with watchdog.watched(lambda: 0, 0.2):
        if {is_caught}:
            try: loop()
            except Exception: pass
        else:
            ctypes.CDLL(None).pause()
except watchdog.Hang:
    print("broken off")
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LONG_S,
        check=False,
    )
    if is_caught:  # a handler of ordinary errors does not swallow it
        assert (ended.returncode, ended.stdout) == (0, "broken off\n")
        return
    assert ended.returncode == 3
    assert ended.stderr.startswith("rl-lora: the run stopped: the sampler gave no token for 0.2 s")
    assert ended.stderr.count("\n") == 1


# --- in another thread ----------------------------------------------------------------------------


def requests() -> Iterator[Request]:
    return iter([Request([make_prompt(name)], PARAMS) for name in "abc"])


@pytest.mark.parametrize(("max_restarts", "max_staleness"), [(0, 1), (1, 1), (0, 2), (1, 2)])
def test_only_the_main_thread_makes_a_new_engine(max_restarts: int, max_staleness: int) -> None:
    """Nor do the batches that are under way after the one whose engine failed."""
    threads: list[Any] = []
    engines = Engines(fails())
    made = engines.make

    def make() -> Engine:
        threads.append(threading.current_thread())
        return made()

    sampler = RestartingSampler(
        make, max_restarts=max_restarts, timeout_s=LONG_S, on_restart=engines.warnings.append
    )
    with RolloutWorker(sampler, FakeReward(), requests(), max_staleness=max_staleness) as worker:
        if not max_restarts:
            with pytest.raises(EngineError, match="failed at 0"):
                worker.next_batch(ADAPTER)
            assert len(engines.made) == 1
            return
        batches = [worker.next_batch(ADAPTER) for _ in range(3)]
        groups = [batch.scoring.groups() for batch in batches]
    assert [g.prompt.prompt_id for (g,) in groups] == ["a", "b", "c"]
    assert set(threads) == {threading.main_thread()}
    assert [batch.metrics().get("system/engine_restarts") for batch in batches] == [1.0, None, None]
    expected = [sample_seeds([make_prompt(name)], PARAMS)[0] for name in "abc"]
    assert [[r.completion.token_ids[0] for r in g.rollouts_G] for (g,) in groups] == expected


def test_restarts_count_in_the_step_after_them() -> None:
    engines = Engines(fails(at=1))
    sampler = engines.sampler()
    with RolloutWorker(sampler, FakeReward(), requests()) as worker:
        batches = [worker.next_batch(ADAPTER)]
        sampler.token_logprobs([(1, 2)])  # an evaluation, say, with a restart
        batches += [worker.next_batch(ADAPTER) for _ in range(2)]
        for batch in batches:
            batch.scoring.groups()
    assert [batch.metrics().get("system/engine_restarts") for batch in batches] == [None, 1.0, None]
