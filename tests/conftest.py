"""Fixtures that several test files use."""

from __future__ import annotations

import os

# Before torch and the hub client are imported: waiting threads sleep, and nothing is looked up.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest


@pytest.fixture
def shared_dir() -> Path:
    """The folder with real data beside the checkout; skips where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the real data files beside the checkout: {folder} is absent")
    return folder
