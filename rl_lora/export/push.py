"""Pushes an adapter with its model card to the hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file

from rl_lora.adapters.files import load_tensors
from rl_lora.adapters.model_card import CARD_FILE, card_text, hub_id
from rl_lora.adapters.peft_files import (
    ADAPTER_FILE,
    named_base,
    peft_rank,
    peft_settings,
    read_manifest,
)
from rl_lora.errors import UserError
from rl_lora.storage.jsonl import write_json

# The hub's client raises its own errors, its transport httpx's.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__mro__[1:2])


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
    peft = peft_settings(adapter_dir)
    api = api or HfApi()
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        if (adapter_dir / ADAPTER_FILE).is_file():
            shutil.copyfile(adapter_dir / ADAPTER_FILE, staging / ADAPTER_FILE)
        else:
            save_file(load_tensors(adapter_dir), staging / ADAPTER_FILE, metadata={"format": "pt"})
        # A path of this machine means nothing elsewhere.
        peft["base_model_name_or_path"] = hub_id(named_base(adapter_dir) or "")
        write_json(staging / "adapter_config.json", peft)
        (staging / CARD_FILE).write_text(card_text(adapter_dir), encoding="utf-8")
        rank = peft_rank(peft, read_manifest(adapter_dir))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staging,
                commit_message=f"LoRA adapter of rank {rank}",
            )
        except _HUB_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot push to {repo_id!r}: {reason}; check the name, the network and "
                "`hf auth login`"
            ) from error
    return str(commit)
