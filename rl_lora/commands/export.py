"""An adapter out of the house: merged into a standalone model directory, or pushed to the hub.

W + (alpha / rank) B A, of DoRA with each row at its magnitude, is computed in float32 from the
base's stored weights, once, and rounded once to the dtype that is asked for. Merging in place
during training would round again at every step.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rl_lora.adapters.files import is_lora_dir, load_tensors
from rl_lora.adapters.model_card import CARD_FILE, card_text, read_facts, write_card
from rl_lora.adapters.patch import Patch, load_patch, mismatch, named_base
from rl_lora.adapters.peft_files import (
    ADAPTER_FILE,
)
from rl_lora.config import ModelSection
from rl_lora.errors import UserError
from rl_lora.models.hub import adapter_path
from rl_lora.models.resolve import check_model_dir, resolve_model
from rl_lora.storage.directories import atomic_directory
from rl_lora.storage.jsonl import write_json

_INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The hub's client and its transport raise from two families.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__mro__[1:2])


def export_merged(
    model_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    dtype: str | None = None,
    base_name: str | None = None,
) -> Path:
    """Writes base plus adapter as a model directory that needs neither PEFT nor this project.

    One weight file is in memory at a time; the base's directory is only read. The target appears
    whole or not at all. An adapter on a tied lm_head unties it from the embedding. A version of
    full fine-tuning is exported the same way, its tensors in place of the base's.

    Args:
        model_dir: the base, with safetensors weights.
        adapter_dir: a PEFT LoRA directory, or a full version.
        out_dir: the new directory; it must not exist, or be empty.
        dtype: "float32", "bfloat16" or "float16"; None: each tensor in the base's own.
        base_name: what the base is called, to be compared with the name in the adapter.

    Raises:
        UserError: target not empty or not writable, no safetensors in the base, or an adapter of
            another base model.
    """
    check_model_dir(model_dir)
    _check_target(out_dir, model_dir)
    patch = load_patch(model_dir, adapter_dir, base_name)
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(f"model directory {model_dir} has no *.safetensors; convert its weights")
    with _written_whole(out_dir) as scratch:
        for source in model_dir.iterdir():
            if source.is_file() and not _is_left_out(source.name):
                shutil.copyfile(source, scratch / source.name)
        weight_map, num_bytes = _write_weights(files, patch, scratch, _DTYPES.get(dtype or ""))
        if unused := sorted(patch.names - set(weight_map)):
            raise UserError(
                mismatch(f"the base's files have no {unused[0]}", adapter_dir, model_dir)
            )
        if len(files) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            write_json(scratch / _INDEX_FILE, index)
        _rewrite_config(scratch / "config.json", dtype, unties=patch.unties or not patch.is_tied)
        if patch.lora:
            card = card_text(read_facts(adapter_dir), merged=True)
            (scratch / CARD_FILE).write_text(card, encoding="utf-8")
    return out_dir


def push_adapter(
    adapter_dir: Path, repo_id: str, *, private: bool = False, api: HfApi | None = None
) -> str:
    """Uploads an adapter with its model card; returns the repository's address.

    Args:
        adapter_dir: a PEFT LoRA directory.
        repo_id: owner/name, made if it is not there.
        private: whether a new repository is private.
        api: the hub's client; None: one with the user's own token.

    Raises:
        UserError: no adapter there, or the hub refuses or is not reached.
    """
    facts = read_facts(adapter_dir)
    api = api or HfApi()
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        if (adapter_dir / ADAPTER_FILE).is_file():
            shutil.copyfile(adapter_dir / ADAPTER_FILE, staging / ADAPTER_FILE)
        else:
            save_file(load_tensors(adapter_dir), staging / ADAPTER_FILE, metadata={"format": "pt"})
        peft = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
        # A path of this machine means nothing elsewhere.
        peft["base_model_name_or_path"] = facts.base_hub_id
        write_json(staging / "adapter_config.json", peft)
        (staging / CARD_FILE).write_text(card_text(facts), encoding="utf-8")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staging,
                commit_message=f"LoRA adapter of rank {facts.rank}",
            )
        except _HUB_ERRORS as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"cannot push to {repo_id!r}: {reason}; check the name, the network and "
                "`hf auth login`"
            ) from error
    return str(commit)


def run(arguments: argparse.Namespace) -> int:
    """`rl-lora export SOURCE [--merged DIR] [--push REPO_ID]`; with neither, the card alone.

    Raises:
        UserError: what the two functions above raise, or a source without adapter.
    """
    adapter_dir = find_adapter(arguments.source)
    if arguments.merged is not None:
        base = arguments.base or named_base(adapter_dir)
        if base is None:
            raise UserError(f"{adapter_dir} names no base model; give --base")
        model_dir = resolve_model(ModelSection(name=base))
        # A directory may be a copy of the named base: there the layers' shapes decide.
        base_name = None if Path(base).is_dir() else base
        export_merged(
            model_dir, adapter_dir, arguments.merged, dtype=arguments.dtype, base_name=base_name
        )
        print(f"merged model: {arguments.merged}")
    if arguments.push is not None:
        print(f"pushed: {push_adapter(adapter_dir, arguments.push, private=arguments.private)}")
    if arguments.merged is None and arguments.push is None:
        print(f"model card: {write_card(adapter_dir)}")
    return 0


def find_adapter(source: Path) -> Path:
    """A run folder's final adapter (else its newest version), the directory itself, or a hub id's.

    Raises:
        UserError: there is no adapter.
    """
    source = adapter_path(source)
    versions = sorted((source / "adapters").glob("v[0-9]*"))
    for folder in (source, source / "adapter", *reversed(versions)):
        has_weights = is_lora_dir(folder) or any(folder.glob("*.safetensors"))
        if has_weights and not (folder / "config.json").is_file():
            return folder
    raise UserError(f"{source} holds no adapter: give a run folder or an adapter directory")


# --- the parts of a merge -------------------------------------------------------------------------


def _write_weights(
    files: list[Path], patch: Patch, target: Path, dtype: torch.dtype | None
) -> tuple[dict[str, str], int]:
    """The merged files, under the base's file names: (tensor -> file, bytes in all)."""
    weight_map: dict[str, str] = {}
    num_bytes = 0
    is_there = any(patch.embedding in _names_of(file) for file in files)
    stored = patch.embedding if is_there else patch.head  # where the files have a tied pair
    for file in files:
        tensors = {}
        for name, base in _tensors_of(file):
            names = [name]
            if patch.is_tied and name in (patch.embedding, patch.head):
                if name != stored:
                    continue  # a copy of the one that is taken
                names = [patch.embedding, patch.head] if patch.unties else [patch.embedding]
            for new in names:
                tensors[new] = patch.merged(new, base).to(dtype or base.dtype)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, target / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    return weight_map, num_bytes


def _names_of(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # the handle is no mapping
            yield name, opened.get_tensor(name)


def _rewrite_config(path: Path, dtype: str | None, *, unties: bool) -> None:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)  # the key's older name
        config["dtype"] = dtype
    if unties and config.get("tie_word_embeddings", True):
        config["tie_word_embeddings"] = False
    write_json(path, config)


def _check_target(out_dir: Path, model_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists and is not empty; give another directory")
    if model_dir.resolve() in out_dir.resolve().parents:
        raise UserError(f"{out_dir} lies in the base model's directory; give another one")


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """`atomic_directory`, the disk's errors as the user's."""
    try:
        with atomic_directory(target) as scratch:
            yield scratch
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == CARD_FILE or name.endswith(_WEIGHT_SUFFIXES)
