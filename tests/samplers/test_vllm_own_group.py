"""The process groups of an engine, apart from those of the job around it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from rl_lora import distributed
from rl_lora.samplers.vllm.engine import make_engine
from rl_lora.samplers.vllm.own_group import keep_job_groups, own_group


class FakeVllm:
    """What vLLM does with process groups; in place of its module `vllm.v1.engine.core`."""

    def __init__(self) -> None:
        self.groups: list[dist.ProcessGroup] = []

    def start(self, *, has_room: bool = True) -> None:
        keep_job_groups()
        with own_group("gloo"):
            assert dist.get_world_size() == 1
            self.default = dist.group.WORLD
            self.groups += [dist.new_group([0], backend="gloo") for _ in range(2)]
            if not has_room:
                raise ValueError("no room")

    def cleanup_dist_env_and_memory(self) -> None:
        for group in self.groups:
            dist.destroy_process_group(group)
        self.groups.clear()
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake: Any = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm.v1.engine.core", fake)
    return fake


@pytest.fixture
def second() -> Iterator[dist.ProcessGroup]:
    """The second group of a job, here of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group([0], backend="gloo")
    dist.destroy_process_group()


@pytest.mark.parametrize("num_failed", [0, 2])
def test_a_job_does_not_see_the_groups_of_its_engines(
    vllm: FakeVllm, second: dist.ProcessGroup, num_failed: int
) -> None:
    default, hook = dist.group.WORLD, sys.excepthook
    for _ in range(num_failed):
        with pytest.raises(ValueError, match="no room"):
            vllm.start(has_room=False)
    for _ in range(2):  # one engine after another
        vllm.start()
        assert vllm.default not in (default, None)
        assert (dist.group.WORLD, sys.excepthook) == (default, hook)
        vllm.cleanup_dist_env_and_memory()
        assert dist.group.WORLD is default
    third = dist.new_group([0], backend="gloo")
    # Ranks that count differently, since one started more engines, would not find one another.
    assert [group.group_name for group in (second, third)] == ["1", "2"]
    for group in (second, third):
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        total = functional.all_reduce(tensor, "sum", group.group_name)
        assert float(functional.wait_tensor(total)) == 1


def test_engines_before_and_after_a_job(vllm: FakeVllm) -> None:
    vllm.start()
    assert not dist.is_initialized()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    vllm.cleanup_dist_env_and_memory()
    assert dist.is_initialized()
    vllm.start()
    dist.destroy_process_group()
    vllm.cleanup_dist_env_and_memory()
    assert not dist.is_initialized()


@pytest.mark.parametrize(("rank", "expected"), [(0, "/cache"), (3, "/cache/rank_3")])
def test_ranks_write_compiled_graphs_to_different_folders(
    vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch, rank: int, expected: str
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.envs", SimpleNamespace(VLLM_CACHE_ROOT="/cache"))
    monkeypatch.delenv("VLLM_CACHE_ROOT", raising=False)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr("rl_lora.samplers.vllm.engine.own_group", contextlib.nullcontext)
    monkeypatch.setattr(
        "rl_lora.samplers.vllm.engine.classes_kept", lambda: contextlib.nullcontext(lambda _: None)
    )
    found = []

    def made(settings: Any) -> str:
        found.append(os.environ.get("VLLM_CACHE_ROOT", "/cache"))
        return "engine"

    module: Any = SimpleNamespace(EngineArgs=dict, LLMEngine=SimpleNamespace(from_engine_args=made))
    assert make_engine(module, {"model": "m"}, on_cpu=False) == "engine"
    assert found == [expected]
    assert "VLLM_CACHE_ROOT" not in os.environ
