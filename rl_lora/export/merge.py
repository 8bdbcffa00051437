"""Merges an adapter into a standalone model directory.

W + (alpha / rank) B A (for DoRA with each row rescaled to its magnitude) is computed once, in
float32, from the base's stored weights and rounded once to the requested dtype. Merging in place
during training would round again at every step.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rl_lora.adapters.model_card import CARD_FILE, card_text, run_config
from rl_lora.adapters.patch import Patch, load_patch, mismatch
from rl_lora.data.chat_template import end_of_turn
from rl_lora.errors import UserError
from rl_lora.models.resolve import check_model_dir, load_tokenizer
from rl_lora.storage.directories import atomic_directory
from rl_lora.storage.jsonl import write_json

_INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_merged(
    model_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    *,
    dtype: str | None = None,
    base_name: str | None = None,
) -> Path:
    """Writes base plus adapter as a model directory that needs neither PEFT nor this project.

    One weight file at a time is in memory, and the base's directory is only read. The target
    appears whole or not at all. An adapter on a tied lm_head unties it from the embedding. A full
    fine-tuning version is exported the same way, its tensors replacing the base's. For an adapter
    in a run folder, the token that ends the assistant's turn in the run's chat template is added to
    generation_config.json's eos_token_id, so that generation stops where the policy learned to.

    Args:
        model_dir: the base model, with safetensors weights.
        adapter_dir: a PEFT LoRA directory, or a full fine-tuning version.
        out_dir: the new directory; it must not exist, or be empty.
        dtype: "float32", "bfloat16" or "float16"; None: each tensor in the base's own dtype.
        base_name: the base's name, to be compared with the name in the adapter.

    Raises:
        UserError: the target is not empty or not writable, the base has no safetensors, or the
            adapter is of another base model.
    """
    check_model_dir(model_dir)
    _check_target(out_dir, model_dir)
    patch = load_patch(model_dir, adapter_dir, base_name)
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(f"model directory {model_dir} has no *.safetensors; convert its weights")
    try:
        with atomic_directory(out_dir) as scratch:
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
            unties = patch.unties or not patch.is_tied
            _rewrite_config(scratch / "config.json", dtype, unties=unties)
            _add_turn_end(scratch, adapter_dir)
            if patch.lora:
                card = card_text(adapter_dir, merged=True)
                (scratch / CARD_FILE).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot write {out_dir}: {reason}") from error
    return out_dir


# --- parts of a merge -----------------------------------------------------------------------------


def _write_weights(
    files: list[Path], patch: Patch, target: Path, dtype: torch.dtype | None
) -> tuple[dict[str, str], int]:
    """Writes merged files under the base's file names; returns (tensor -> file, total bytes)."""
    weight_map: dict[str, str] = {}
    num_bytes = 0
    has_embedding = any(patch.embedding in load_file(file) for file in files)
    stored = patch.embedding if has_embedding else patch.head  # name of a tied pair in the files
    for file in files:
        tensors = {}
        for name, base in load_file(file).items():
            names = [name]
            if patch.is_tied and name in (patch.embedding, patch.head):
                if name != stored:
                    continue  # a copy of the stored one
                names = [patch.embedding, patch.head] if patch.unties else [patch.embedding]
            for new in names:
                tensors[new] = patch.merged(new, base).to(dtype or base.dtype)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, target / file.name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(str(error)) from error
        weight_map |= dict.fromkeys(tensors, file.name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    return weight_map, num_bytes


def _rewrite_config(path: Path, dtype: str | None, *, unties: bool) -> None:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)  # the key's older name
        config["dtype"] = dtype
    if unties and config.get("tie_word_embeddings", True):
        config["tie_word_embeddings"] = False
    write_json(path, config)


def _add_turn_end(model_dir: Path, adapter_dir: Path) -> None:
    """Adds the end of the assistant's turn to the end tokens that generation stops at."""
    config = run_config(adapter_dir)
    if config is None:  # of another tool: nothing says how its turns end
        return
    tokenizer, data = load_tokenizer(model_dir), config.data
    has_template = bool(tokenizer.chat_template or data.chat_template_kwargs.get("chat_template"))
    template = data.template if has_template else "base"
    end = end_of_turn(tokenizer, template, data.chat_template_kwargs)
    path = model_dir / "generation_config.json"
    is_there = path.is_file()
    source = path if is_there else model_dir / "config.json"
    settings: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    known = settings.get("eos_token_id")
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if end not in ids:
        kept = settings if is_there else {}
        write_json(path, {**kept, "eos_token_id": [*ids, end]})


def _check_target(out_dir: Path, model_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists and is not empty; give another directory")
    if model_dir.resolve() in out_dir.resolve().parents:
        raise UserError(f"{out_dir} is inside the base model's directory; give another one")


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == CARD_FILE or name.endswith(_WEIGHT_SUFFIXES)
