"""A run's adapters on the hub: what is uploaded, when, and what becomes of a hub that fails."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from rl_lora import train as loop
from rl_lora.adapters.files import save_adapter
from rl_lora.config import RunConfig, RunSection, load_config
from rl_lora.config.sft import load_sft_config
from rl_lora.errors import UserError
from rl_lora.export import push
from rl_lora.export.push import Pushes
from rl_lora.train import train
from rl_lora.types import Adapter
from tests.helpers.tiny_models import make_policy, random_llama, shake

CONFIGS = Path(__file__).parents[2] / "configs"


class Hub:
    """Keeps each commit's files; one upload is let through by each `let()`."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.repositories: list[tuple[str, bool]] = []
        self.commits: list[tuple[str, dict[str, bytes]]] = []
        self.errors: list[Exception] = []
        self.has_begun = threading.Semaphore(0)
        self.passes = threading.Semaphore(1000 if is_open else 0)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        if self.errors:
            raise self.errors.pop()
        self.repositories.append((repo_id, private))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        self.has_begun.release()
        assert self.passes.acquire(timeout=60)
        if self.errors:
            raise self.errors.pop()
        files = {file.name: file.read_bytes() for file in folder_path.iterdir()}
        self.commits.append((commit_message, files))
        return f"https://hub.example/{repo_id}"


def section(folder: Path, **more: Any) -> RunSection:
    given = {"name": "mine", "output_dir": str(folder), "num_steps": 9, "push_to": "me/mine"}
    return RunSection(**(given | more))


def versions(tmp_path: Path, *numbers: int) -> list[Adapter]:
    policy = make_policy(random_llama(tmp_path / "base"), rank=2)
    shake(policy)
    folder = tmp_path / "mine" / "adapters"
    return [save_adapter(policy, folder, version=n, run_name="mine") for n in numbers]


def test_the_newest_adapter_replaces_one_that_waits(tmp_path: Path) -> None:
    hub: Any = Hub(is_open=False)
    pushes = Pushes(section(tmp_path, push_every=2), print, hub)
    assert hub.repositories == [("me/mine", True)]
    two, three, four, six, nine = versions(tmp_path, 2, 3, 4, 6, 9)
    pushes.step(two)
    assert hub.has_begun.acquire(timeout=60)
    for adapter in (three, four, six, nine):  # 3 is not due, and 9 is the last
        pushes.step(adapter)
    for _ in range(3):
        hub.passes.release()
    nine.path.rename(tmp_path / "mine" / "adapter")
    pushes.last()
    names = [message for message, _ in hub.commits]
    assert names in (
        [f"LoRA adapter of rank 2, step {step}" for step in (2, 6, 9)],
        [f"LoRA adapter of rank 2, step {step}" for step in (2, 9)],  # before 6 had begun
    )


def test_a_version_in_memory_gets_the_runs_card(tmp_path: Path) -> None:
    (adapter,) = versions(tmp_path / "elsewhere", 4)
    run = tmp_path / "mine"
    run.mkdir()
    config = RunConfig(run=section(tmp_path))
    (run / "run.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    hub: Any = Hub()
    pushes = Pushes(section(tmp_path, push_every=4), print, hub)
    pushes.step(adapter)
    adapter.path.rename(run / "adapter")
    pushes.last()
    for _, files in hub.commits:
        assert b"4 of 16 prompts x 8 samples" in files["README.md"]
        assert set(files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("no route"), "run.push_to: cannot push to 'me/mine': no route; check the name"),
        (RuntimeError("a bug"), "run.push_to: RuntimeError: a bug"),
    ],
)
def test_a_failed_upload_is_a_warning_and_the_next_one_goes_through(
    tmp_path: Path, error: Exception, line: str
) -> None:
    hub: Any = Hub()
    warnings: list[str] = []
    pushes = Pushes(section(tmp_path, push_every=1), warnings.append, hub)
    one, two = versions(tmp_path, 1, 2)
    hub.errors.append(error)
    one.path.rename(tmp_path / "mine" / "adapter")
    pushes.last()
    assert [text.startswith(line) for text in warnings] == [True]
    pushes.step(two)
    pushes.last()
    assert len(warnings) == 1
    assert hub.commits


def test_a_hub_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub: Any = Hub(is_open=False)
    warnings: list[str] = []
    pushes = Pushes(section(tmp_path), warnings.append, hub)
    (one,) = versions(tmp_path, 1)
    one.path.rename(tmp_path / "mine" / "adapter")
    monkeypatch.setattr(push, "_LAST_PUSH_S", 0.01)
    pushes.last()
    assert warnings == ["run.push_to: not finished after 0 s"]
    hub.passes.release()


def smoke(folder: Path, *more: str) -> RunConfig:
    overrides = (f"run.output_dir={folder}", "run.num_steps=3", "data.held_out=4", *more)
    return load_config(CONFIGS / "smoke.toml", list(overrides))


@pytest.mark.slow
def test_a_run_pushes_its_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    config = smoke(tmp_path, "run.push_to=me/mine", "run.push_every=2", "run.checkpoint_every=9")
    train(config, quiet=True)
    last, files = hub.commits[-1]  # that of step 2 may still have waited then
    assert last == "LoRA adapter of rank 1, step 3"
    pushed = load(files["adapter_model.safetensors"])
    kept = load((config.run.folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert pushed.keys() == kept.keys()
    assert all(bool((pushed[name] == kept[name]).all()) for name in kept)
    assert b"this adapter" in files["README.md"]


def test_a_hub_that_refuses_is_found_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    hub.errors.append(OSError("401 Unauthorized"))
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    monkeypatch.setattr(loop, "loop", lambda *_: pytest.fail("it has trained"))
    with pytest.raises(UserError, match="cannot push to 'me/mine': 401 Unauthorized; check"):
        train(smoke(tmp_path, "run.push_to=me/mine"), quiet=True)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["run.push_every=5"], "push_every=5 has no effect without run.push_to"),
        (["run.push_to=me/mine", "lora.mode=full"], "lora.mode='full' has none"),
        (["run.push_to=mine"], "run.push_to"),
    ],
)
def test_settings_that_push_nothing_are_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_config(None, overrides)


def test_supervised_runs_are_pushed_afterwards() -> None:
    with pytest.raises(UserError, match=r"run\.push_to='me/mine' is for RL runs"):
        load_sft_config(None, ["run.push_to=me/mine"])
