"""What the tests of replicas on servers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from rl_lora.adapters.files import save_adapter
from rl_lora.samplers.fleet import servers
from rl_lora.types import Adapter
from tests.helpers.tiny_models import make_policy, random_llama, shake


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Versions 0, 1 and 2 of a tiny policy, each with other weights."""
    folder = tmp_path_factory.mktemp("versions")
    policy = make_policy(random_llama(folder / "model"))
    found = []
    for version in range(3):
        shake(policy, seed=version)
        found.append(save_adapter(policy, folder, version=version, run_name="run"))
    return found


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    """Closes what a test opens; without a key, and servers are asked often."""
    monkeypatch.setattr(servers, "_POLL_S", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with ExitStack() as opened:
        yield opened
