"""Which device and dtype the processes of a job take."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rl_lora import distributed
from rl_lora.errors import UserError
from rl_lora.models import device as devices
from rl_lora.models.device import pick_device, pick_dtype


@pytest.fixture
def in_job(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this process one of a job's, on a node of which it sees `num_gpus`."""

    def join(
        local_rank: int, num_gpus: int, *, uuids: list[str] | None = None, main: Any = None
    ) -> None:
        place = {"world_size": 2, "local_rank": local_rank}
        for name, number in place.items():
            monkeypatch.setattr(distributed, name, lambda number=number: number)
        monkeypatch.setattr(
            distributed, "from_main", lambda make, phase: make() if main is None else main
        )
        monkeypatch.setattr(distributed, "gather", lambda value, phase: uuids or ["other", value])
        card = SimpleNamespace(uuid=f"gpu-{local_rank}")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: None)

    return join


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("local_rank", "num_gpus", "index"),
    [(0, 8, 0), (3, 8, 3), (3, 1, 0)],  # the last: the launcher shows each process its own GPU
)
def test_each_process_of_a_job_has_its_gpu(
    in_job: Callable[..., None], name: str, local_rank: int, num_gpus: int, index: int
) -> None:
    in_job(local_rank, num_gpus)
    assert pick_device(name) == torch.device("cuda", index)


def test_one_gpu_for_several_processes_is_refused(in_job: Callable[..., None]) -> None:
    in_job(1, 2)
    for name in ("cuda:0", "cuda:1"):
        with pytest.raises(UserError, match=rf"'{name}' is one GPU for all .*device='cuda'"):
            pick_device(name)
    in_job(1, 1, uuids=["a", "b", "b", "a"])
    with pytest.raises(UserError, match=r"ranks 0, 3 have the same GPU: start as many"):
        pick_device("cuda")


def test_rank_0_decides_what_is_open(
    in_job: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(1, 2, main="cpu")
    assert pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(devices, "_matmul_seconds", lambda dtype, device: dtype == torch.float32)
    in_job(1, 0, main=torch.float32)  # this process would choose bfloat16
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


def test_a_process_without_the_gpu_that_rank_0_has(in_job: Callable[..., None]) -> None:
    in_job(1, 0, main="cuda")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("No CUDA GPUs are available\nmore")

    torch.empty = fail  # type: ignore[assignment]  # in_job restores it
    told = "model.device='cuda' is not usable here: No CUDA GPUs are available"
    with pytest.raises(UserError, match=re.escape(told)):
        pick_device("auto")
