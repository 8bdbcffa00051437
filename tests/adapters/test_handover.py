"""Versions published in memory, and what of them the run's folder gets."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rl_lora import state as run_state
from rl_lora import train as loop
from rl_lora.adapters.files import fingerprint, load_tensors
from rl_lora.adapters.handover import memory_folder
from rl_lora.build import RunContext
from rl_lora.train import train
from tests.test_train import smoke


def test_a_folder_in_memory_goes_with_its_run(tmp_path: Path) -> None:
    with memory_folder(tmp_path / "run", 100, tmp_path) as folder:
        assert folder is not None
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "v000001").mkdir()
        with memory_folder(tmp_path / "other", 100, tmp_path) as second:
            assert second != folder
    assert not folder.exists()
    folder.mkdir()
    (folder / "v000009").mkdir()  # a killed run's
    with memory_folder(tmp_path / "run", 100, tmp_path) as again:
        assert again == folder
        assert not any(folder.iterdir())


def test_without_room_or_memory_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory_folder(tmp_path, 1, tmp_path / "absent") as folder:
        assert folder is None
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=399))
    with memory_folder(tmp_path, 400, tmp_path) as folder:
        assert folder is None
    with memory_folder(tmp_path, 399, tmp_path) as folder:
        assert folder is not None


@pytest.mark.parametrize(("device", "mode", "is_used"), [
    ("cuda", "lora", True), ("cpu", "lora", False), ("cuda", "full", False),
])  # fmt: skip
def test_adapters_of_a_gpu_are_handed_over_in_memory(
    device: str, mode: str, is_used: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    @contextlib.contextmanager
    def recorded(run_folder: Path, num_bytes: int) -> Iterator[Path]:
        sizes.append(num_bytes)
        yield tmp_path

    monkeypatch.setattr(run_state, "memory_folder", recorded)
    policy: Any = SimpleNamespace(
        device=torch.device(device), published_tensors=lambda: {"a": torch.zeros(6)}
    )
    config = smoke(tmp_path)
    config = config.model_copy(update={"lora": config.lora.model_copy(update={"mode": mode})})
    parts: list[Any] = [config, None, None, None, policy, None, None]
    with run_state.with_handover(RunContext(*parts)) as job:
        assert job.handover == (tmp_path if is_used else None)
    assert sizes == ([4 * 24] if is_used else [])  # room for four versions


def test_a_run_with_versions_in_memory_keeps_those_of_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    at_rest: list[list[str]] = []  # versions in the run's folder, when each is published

    @contextlib.contextmanager
    def in_memory(job: RunContext) -> Iterator[RunContext]:
        with memory_folder(job.config.run.folder, 1, memory) as folder:
            yield run_state.replace(job, handover=folder)

    def publish(job: RunContext, state: Any) -> Any:
        adapter = run_state.publish(job, state)
        assert adapter.path.parent.parent == memory
        folder = job.config.run.folder / "adapters"
        at_rest.append(sorted(path.name for path in folder.glob("*")))
        return adapter

    monkeypatch.setattr(loop, "with_handover", in_memory)
    monkeypatch.setattr(loop, "publish", publish)
    train(smoke(tmp_path, "run.num_steps=2", "run.checkpoint_every=2"), quiet=True)
    assert at_rest == [[], ["v000000"], ["v000000"]]
    # The checkpoint of step 2 brings its version and the one before.
    run = tmp_path / "smoke"
    assert sorted(path.name for path in (run / "adapters").iterdir()) == ["v000001", "v000002"]
    assert not any(memory.iterdir())
    last = fingerprint(load_tensors(run / "adapters" / "v000002"))
    assert fingerprint(load_tensors(run / "adapter")) == last
