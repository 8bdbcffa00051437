"""An adapter out of the house: merged into a standalone model directory, or pushed to the hub.

W + (alpha / rank) B A, of DoRA with each row at its magnitude, is computed in float32 from the
base's stored weights, once, and rounded once to the dtype that is asked for. Merging in place
during training would round again at every step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from rl_lora.adapter import (
    ADAPTER_FILE,
    MAGNITUDE_SUFFIX,
    MANIFEST_FILE,
    factor_pairs,
    is_directory,
    layer_name,
    load_tensors,
    lora_settings,
)
from rl_lora.card import CARD_FILE, card_text, read_facts, write_card
from rl_lora.config import ModelSection
from rl_lora.errors import UserError
from rl_lora.models import check_model_dir, resolve_model
from rl_lora.moe import split_experts
from rl_lora.shapes import lay_out
from rl_lora.variants import merged_dora, scaling_of

_INDEX_FILE = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
_LM_HEAD = "lm_head.weight"
_NO_LORA: dict[str, Any] = {"alpha": 1.0, "rank": 1, "variant": "lora"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The hub's client and its transport raise from two families.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__mro__[1:2])


@dataclass(frozen=True, slots=True)
class _Patch:
    """What an adapter does to the base's tensors, by the names that they have in the base's files.

    Example: _Patch(lora={"model.layers.0.self_attn.q_proj.weight": (A_RI, B_OR)},
    magnitudes={}, scaling=32.0, replaced={}, embedding="model.embed_tokens.weight", is_tied=True)
    """

    lora: dict[str, tuple[Tensor, Tensor]]  # A [rank, d_in], B [d_out, rank]
    magnitudes: dict[str, Tensor]  # of DoRA: lengths of the rows, [d_out]
    scaling: float  # alpha / rank, or what the variant has for it
    replaced: dict[str, Tensor]  # of full fine-tuning: the new tensor itself
    embedding: str  # name of the input embedding's weight
    is_tied: bool  # lm_head is the input embedding

    @property
    def unties(self) -> bool:
        """The merged lm_head is no longer the embedding."""
        return self.is_tied and _LM_HEAD in self.lora

    @property
    def names(self) -> set[str]:
        """Tensors that change."""
        return set(self.lora) | set(self.replaced)

    def merged(self, name: str, base: Tensor) -> Tensor:
        """The new weight in float32, or the new tensor; the base's own where nothing changes."""
        if name in self.replaced:
            return self.replaced[name]
        if name not in self.lora:
            return base
        lora_A_RI, lora_B_OR = self.lora[name]
        if name in self.magnitudes:
            return merged_dora(base, self.magnitudes[name], lora_A_RI, lora_B_OR, self.scaling)
        return torch.addmm(base.float(), lora_B_OR.float(), lora_A_RI.float(), alpha=self.scaling)


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
    patch = _load_patch(model_dir, adapter_dir, base_name)
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise UserError(f"model directory {model_dir} has no *.safetensors; convert its weights")
    with _whole_directory(out_dir) as scratch:
        for source in model_dir.iterdir():
            if source.is_file() and not _is_left_out(source.name):
                shutil.copyfile(source, scratch / source.name)
        weight_map, num_bytes = _write_weights(files, patch, scratch, _DTYPES.get(dtype or ""))
        if unused := sorted(patch.names - set(weight_map)):
            raise UserError(
                _mismatch(f"the base's files have no {unused[0]}", adapter_dir, model_dir)
            )
        if len(files) > 1:
            index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
            _write_json(scratch / _INDEX_FILE, index)
        _rewrite_config(scratch / "config.json", dtype, unties=patch.unties)
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
        shutil.copyfile(adapter_dir / ADAPTER_FILE, staging / ADAPTER_FILE)
        peft = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
        # A path of this machine means nothing elsewhere.
        peft["base_model_name_or_path"] = facts.base_hub_id
        _write_json(staging / "adapter_config.json", peft)
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
        base = arguments.base or _named_base(adapter_dir)
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
    """A run folder's final adapter (else its newest version), or the directory itself.

    Raises:
        UserError: there is no adapter.
    """
    versions = sorted((source / "adapters").glob("v[0-9]*"))
    for folder in (source, source / "adapter", *reversed(versions)):
        if any(folder.glob("*.safetensors")) and not (folder / "config.json").is_file():
            return folder
    raise UserError(f"{source} holds no adapter: give a run folder or an adapter directory")


# --- the parts of a merge -------------------------------------------------------------------------


def _load_patch(model_dir: Path, adapter_dir: Path, base_name: str | None) -> _Patch:
    """Raises UserError where the adapter's layers are not the base's."""
    named = _named_base(adapter_dir)
    is_other = base_name is not None and named not in (None, base_name)
    if is_other and not is_directory(str(named), model_dir):
        raise UserError(f"adapter {adapter_dir} belongs to base model {named!r}, not {base_name!r}")
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    model: Any = lay_out(config)
    embedding = model.get_input_embeddings()
    layout = split_experts(model, model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in layout.items()}
    tensors = load_tensors(adapter_dir)
    is_lora = (adapter_dir / ADAPTER_FILE).is_file()
    settings = lora_settings(adapter_dir) if is_lora else _NO_LORA
    patch = _Patch(
        lora=_pairs(tensors, adapter_dir, settings["rank"]) if is_lora else {},
        magnitudes=_magnitudes(tensors),
        scaling=scaling_of(settings["variant"], settings["alpha"], settings["rank"]),
        replaced={} if is_lora else tensors,
        embedding=next(f"{n}.weight" for n, m in model.named_modules() if m is embedding),
        is_tied=bool(config.get_text_config().tie_word_embeddings),
    )
    if patch.magnitudes.keys() != (patch.lora.keys() if settings["variant"] == "dora" else set()):
        raise UserError(f"adapter {adapter_dir}: DoRA has a magnitude for each layer; not merged")
    found: dict[str, tuple[int, ...]] = {
        name: (b.shape[0], a.shape[1]) for name, (a, b) in patch.lora.items()
    }
    found |= {name: tuple(tensor.shape) for name, tensor in patch.replaced.items()}
    for name, shape in found.items():
        if name not in shapes:
            raise UserError(_mismatch(f"the base has no {name}", adapter_dir, model_dir))
        if shapes[name] != shape:
            what = f"{name} is {list(shapes[name])} in the base, {list(shape)} in the adapter"
            raise UserError(_mismatch(what, adapter_dir, model_dir))
    return patch


def _magnitudes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """DoRA's, by the name of the weight they go with."""
    return {
        f"{layer_name(name.removesuffix(MAGNITUDE_SUFFIX))}.weight": tensor
        for name, tensor in tensors.items()
        if name.endswith(MAGNITUDE_SUFFIX)
    }


def _pairs(
    tensors: dict[str, Tensor], adapter_dir: Path, rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the name of the weight they go with, B for the scaling of `rank`: that of a lower
    rank, as experts have it, is larger. Raises UserError as `factor_pairs`."""
    pairs = {}
    for layer, (lora_A, lora_B) in factor_pairs(tensors, adapter_dir).items():
        own = lora_A.shape[0]
        pairs[f"{layer}.weight"] = (
            lora_A,
            lora_B if own == rank else lora_B.float() * (rank / own),
        )
    return pairs


def _write_weights(
    files: list[Path], patch: _Patch, target: Path, dtype: torch.dtype | None
) -> tuple[dict[str, str], int]:
    """The merged files, under the base's file names: (tensor -> file, bytes in all)."""
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for file in files:
        tensors = {}
        for name, base in _tensors_of(file):
            if name == _LM_HEAD and patch.is_tied:
                continue  # a copy of the embedding, which the line below writes where it differs
            tensors[name] = patch.merged(name, base).to(dtype or base.dtype)
            if name == patch.embedding and patch.unties:
                tensors[_LM_HEAD] = patch.merged(_LM_HEAD, base).to(dtype or base.dtype)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, target / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    return weight_map, num_bytes


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  # the handle is no mapping
            yield name, opened.get_tensor(name)


def _rewrite_config(path: Path, dtype: str | None, *, unties: bool) -> None:
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)  # the key's older name
        config["dtype"] = dtype
    if unties:
        config["tie_word_embeddings"] = False
    _write_json(path, config)


def _check_target(out_dir: Path, model_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} exists and is not empty; give another directory")
    if model_dir.resolve() in out_dir.resolve().parents:
        raise UserError(f"{out_dir} lies in the base model's directory; give another one")


@contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    """A scratch directory that becomes `target` at the end, or goes if anything fails."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        scratch.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _named_base(adapter_dir: Path) -> str | None:
    """The base model's name in the manifest, else in PEFT's file."""
    for file, key in (
        (MANIFEST_FILE, "base_model"),
        ("adapter_config.json", "base_model_name_or_path"),
    ):
        if (adapter_dir / file).is_file():
            name = json.loads((adapter_dir / file).read_text(encoding="utf-8")).get(key)
            if name:
                return str(name)
    return None


def _mismatch(what: str, adapter_dir: Path, model_dir: Path) -> str:
    named = _named_base(adapter_dir)
    of = f" (of base model {named!r})" if named else ""
    return f"adapter {adapter_dir}{of} does not fit model {model_dir}: {what}"


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or name == CARD_FILE or name.endswith(_WEIGHT_SUFFIXES)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
