"""Pushes an adapter with its model card to the hub, also during its run."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from rl_lora import distributed
from rl_lora.adapters.files import load_tensors
from rl_lora.adapters.handover import keep_version
from rl_lora.adapters.model_card import CARD_FILE, card_text, hub_id
from rl_lora.adapters.peft_files import (
    ADAPTER_FILE,
    named_base,
    peft_rank,
    peft_settings,
    read_manifest,
)
from rl_lora.config import RunSection
from rl_lora.errors import UserError
from rl_lora.storage.jsonl import write_json
from rl_lora.types import Adapter

# The hub's client raises its own errors, its transport httpx's.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__mro__[1:2])
_LAST_PUSH_S = 600.0  # that a run waits for at its end


def push_adapter(
    adapter_dir: Path, repo_id: str, *, private: bool = False, api: HfApi | None = None
) -> str:
    """Uploads an adapter with its model card; returns the URL of the commit.

    Args:
        adapter_dir: a PEFT LoRA directory.
        repo_id: owner/name, created if it does not exist.
        private: whether a new repository is private.
        api: the hub's client; None: one with the user's own token.

    Raises:
        UserError: not an adapter directory, or the hub refuses or cannot be reached.
    """
    api = api or HfApi()
    with tempfile.TemporaryDirectory() as folder:
        message = _stage(adapter_dir, Path(folder))
        _make_repository(api, repo_id, private=private)
        return _upload(api, repo_id, Path(folder), message)


class Pushes:
    """Pushes a run's newest adapters in a thread, while training continues.

    While one is uploaded the newest one waits, and replaces an older one that waits. A failed
    upload is a warning: the next one has a newer adapter. Without run.push_to, and in all processes
    but rank 0, nothing is pushed.

    Args:
        section: says where to and how often.
        on_warning: called with one line for each upload that failed, in the caller's thread.
        api: the hub's client; None: one with the user's own token.

    Raises:
        UserError: the hub refuses or cannot be reached.
    """

    def __init__(
        self, section: RunSection, on_warning: Callable[[str], None], api: HfApi | None = None
    ) -> None:
        self._section, self._on_warning = section, on_warning
        self._repo_id = (section.push_to or "") if distributed.is_main() else ""  # "": none
        if not self._repo_id:
            return
        self._api = api or HfApi()
        _make_repository(self._api, self._repo_id, private=True)
        self._changed = threading.Condition()
        self._waiting: tuple[tempfile.TemporaryDirectory[str], str] | None = None
        self._is_busy = False
        self._failures: list[str] = []
        # A daemon: a run that is stopped does not wait for the network. The hub shows a commit
        # whole or not at all.
        threading.Thread(target=self._work, name="push", daemon=True).start()

    def step(self, adapter: Adapter | None) -> None:
        """Uploads a step's adapter soon, if it is due; it may be deleted after this call. That of
        the last step waits for `last`: its model card has the last evaluation."""
        every, num_steps = self._section.push_every, self._section.num_steps
        if not self._repo_id or adapter is None or not every:
            return
        if adapter.version % every == 0 and adapter.version != num_steps:
            folder = self._section.folder / "adapters"
            keep_version(adapter, folder)  # the card's figures come from the run's folder
            self._offer(folder / adapter.path.name)

    def last(self) -> None:
        """Uploads RUN/adapter, and waits for it, for at most ten minutes."""
        if not self._repo_id:
            return
        self._offer(self._section.folder / "adapter")
        with self._changed:
            is_done = self._changed.wait_for(
                lambda: self._waiting is None and not self._is_busy, _LAST_PUSH_S
            )
        if not is_done:
            self._failures.append(f"not finished after {_LAST_PUSH_S:.0f} s")
        self._warn()

    def _offer(self, adapter_dir: Path) -> None:
        folder = tempfile.TemporaryDirectory(prefix="rl_lora_push_")
        step = read_manifest(adapter_dir)["version"]
        message = f"{_stage(adapter_dir, Path(folder.name))}, step {step}"
        with self._changed:
            if self._waiting is not None:
                self._waiting[0].cleanup()
            self._waiting = folder, message
            self._changed.notify_all()
        self._warn()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                assert self._waiting is not None
                (folder, message), self._waiting, self._is_busy = self._waiting, None, True
            with folder:
                try:
                    _upload(self._api, self._repo_id, Path(folder.name), message)
                except UserError as error:
                    self._failures.append(str(error))
                except Exception as error:  # noqa: BLE001 (none ends a run)
                    self._failures.append(f"{type(error).__name__}: {error}")
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()

    def _warn(self) -> None:
        while self._failures:
            self._on_warning(f"run.push_to: {self._failures.pop(0)}")


@contextlib.contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    try:
        yield
    except _HUB_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot push to {repo_id!r}: {reason}; check the name, the network and `hf auth login`"
        ) from error


def _make_repository(api: HfApi, repo_id: str, *, private: bool) -> None:
    with _one_line(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)


def _upload(api: HfApi, repo_id: str, folder: Path, message: str) -> str:
    with _one_line(repo_id):
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    return str(commit)


def _stage(adapter_dir: Path, folder: Path) -> str:
    """Copies into the folder what is uploaded; returns the commit's message."""
    peft = peft_settings(adapter_dir)
    if (adapter_dir / ADAPTER_FILE).is_file():
        shutil.copyfile(adapter_dir / ADAPTER_FILE, folder / ADAPTER_FILE)
    else:
        save_file(load_tensors(adapter_dir), folder / ADAPTER_FILE, metadata={"format": "pt"})
    # A path of this machine means nothing elsewhere.
    peft["base_model_name_or_path"] = hub_id(named_base(adapter_dir) or "")
    write_json(folder / "adapter_config.json", peft)
    (folder / CARD_FILE).write_text(card_text(adapter_dir), encoding="utf-8")
    return f"LoRA adapter of rank {peft_rank(peft, read_manifest(adapter_dir))}"
