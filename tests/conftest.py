"""Fixtures that several test files use."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable

# Before torch and the hub client are imported: waiting threads sleep, and nothing is looked up.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# `make test` gives its two processes one file after another in this order, so that none of the long
# ones is left for the end.
LONG_FILES = [
    "models/test_architectures.py",
    "samplers/test_vllm_sampler.py",
    "models/test_tiny_model.py",
    "distributed/test_failures.py",
    "distributed/test_equal.py",
    "test_train.py",
    "runs/test_resume.py",
    "test_overlap.py",
    "nn/test_sharded.py",
    "scripts/test_gpu_check.py",
    "samplers/test_vllm_experts.py",
    "runs/test_disk_full.py",
    "runs/test_kill_anywhere.py",
    "studies/test_studies.py",
    "sft/test_sft.py",
    "rewards/test_verifier_doors.py",
    "rewards/test_verifier_workers.py",
    "test_cli.py",
    "test_learning.py",
    "test_packaging.py",
    "test_distributed.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of LONG_FILES first, in its order."""
    places = {TESTS / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def vllm_installed() -> None:
    """Skips where vLLM is absent, without importing it, which would change the process."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")


@pytest.fixture
def shared_dir() -> Path:
    """The folder of real data next to the checkout; skips where it is absent."""
    folder = TESTS.parents[1] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the real data files next to the checkout: {folder} is absent")
    return folder


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Writes a user's own module, name and text, into tmp_path, from where it can be imported.

    The test's end forgets the module, so that another test's of the same name is imported.
    """

    def write(name: str, text: str) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))  # the end takes it out again
        del sys.modules[name]
        return path

    return write
