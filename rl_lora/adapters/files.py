"""Published versions of the policy on disk: PEFT directories, fingerprinted, written atomically.

An adapter directory has adapter_config.json and adapter_model.safetensors, which PEFT and vLLM
read, and rl_lora.json with the version, the base model and hashes of the two. A version of full
fine-tuning has model.safetensors instead.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_lora import distributed
from rl_lora.adapters.peft_files import (
    ADAPTER_FILE,
    MANIFEST_FILE,
    layer_scalings,
    lora_settings,
    read_manifest,
)
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.models.hub import adapter_path
from rl_lora.models.resolve import list_models
from rl_lora.nn.experts import expert_rank, num_active_experts
from rl_lora.nn.variants import scaling_of, served_alpha, served_rank
from rl_lora.storage.directories import atomic_directory
from rl_lora.storage.jsonl import write_json
from rl_lora.types import Adapter

if TYPE_CHECKING:
    from rl_lora.policy import Policy

OLD_ADAPTER_FILE = "adapter_model.bin"  # as PEFT wrote it before safetensors
FULL_FILE = "model.safetensors"
_VISIBLE_S = 90.0  # an NFS client looks at a directory again after a minute at most


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 of the tensors' names, shapes, dtypes and bytes, as hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # NumPy has no bfloat16; for other dtypes a view as bytes would cost more than the hash.
        has_numpy = tensor.dtype in (torch.float32, torch.float16)
        plain = tensor if has_numpy else tensor.view(-1).view(torch.uint8)
        digest.update(plain.numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def save_adapter(
    policy: Policy, folder: Path, *, version: int, run_name: str, on_each_node: bool = False
) -> Adapter:
    """Writes the policy's current weights to folder/vNNNNNN and returns the handle.

    Of a job's processes all call it; rank 0 writes, and each gets the handle once it has.

    Args:
        policy: whose weights.
        folder: of the versions.
        version: their number.
        run_name: of the handle, with the version.
        on_each_node: the folder is a node's own: the first process of each node writes.

    Raises:
        StaleAdapterError: the processes hold different weights.
        UserError: the disk is full or not writable.
    """
    on_host = policy.on_host(policy.published_tensors())
    tensors = {name: tensor.contiguous() for name, tensor in on_host.items()}
    adapter = Adapter(
        version=version,
        name=f"{run_name}-v{version:06d}",
        path=folder / f"v{version:06d}",
        fingerprint=_same_fingerprint(fingerprint(tensors) if tensors else None, version),
        rank=policy.published_rank,
    )
    if is_writer(on_each_node=on_each_node):
        write_adapter(adapter, tensors, policy)
    distributed.gather(None, f"publishing version {version}")
    return adapter


def is_writer(*, on_each_node: bool) -> bool:
    """Whether this process writes and deletes versions; see `save_adapter`."""
    return distributed.is_main() or (on_each_node and distributed.local_rank() == 0)


def _same_fingerprint(own: str | None, version: int) -> str:
    """Rank 0's fingerprint; None: another rank's, of which the weights were not gathered there."""
    found = distributed.gather(own, f"publishing version {version}")
    for rank, other in enumerate(found):
        if other not in (found[0], None):
            raise StaleAdapterError(
                f"rank {rank} holds other weights than rank 0 in version {version} "
                f"({str(other)[:12]} and {str(found[0])[:12]}): the processes' learners have "
                "drifted apart; resume from the last checkpoint"
            )
    assert found[0] is not None
    return found[0]


def write_adapter(adapter: Adapter, tensors: dict[str, Tensor], policy: Policy) -> None:
    """Writes the directory of one version; it appears whole or not at all.

    Raises:
        UserError: the disk is full or not writable.
    """
    manifest: dict[str, Any] = {
        "version": adapter.version,
        "name": adapter.name,
        "fingerprint": adapter.fingerprint,
        "base_model": policy.base_name,
        "rank": adapter.rank,
        "is_full": adapter.is_full,
        "trained_as": {"variant": policy.lora.variant, "rank": policy.lora.rank},
    }
    if policy.quantize is not None:
        dtype = str(policy.dtype).removeprefix("torch.")
        manifest["trained_as"] |= {"quantize": policy.quantize, "dtype": dtype}
    try:
        with atomic_directory(adapter.path) as scratch:
            if adapter.is_full:
                save_file(tensors, scratch / FULL_FILE, metadata={"format": "pt"})
            else:
                save_file(tensors, scratch / ADAPTER_FILE, metadata={"format": "pt"})
                _peft_config(policy).save_pretrained(str(scratch))
                manifest["config_sha256"] = _config_sha256(scratch)
            write_json(scratch / MANIFEST_FILE, manifest)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"adapter {adapter.path} cannot be written ({error}); make room on the disk and run "
            "the command again, with --resume to continue a training run"
        ) from error


def check_published(adapter: Adapter, *, with_tensors: bool) -> None:
    """Checks that an adapter's directory is what was published under this handle.

    Another node's process may see a new directory late (NFS): there it waits for it.

    Args:
        adapter: not a whole model.
        with_tensors: read and hash the tensors as well, for a reader that does not.

    Raises:
        StaleAdapterError: its version, its settings (rank, alpha, ...) or its tensors are others.
        UserError: it is missing or cannot be read.
    """
    deadline = time.monotonic() + (
        _VISIBLE_S if distributed.local_size() < distributed.world_size() else 0.0
    )
    while True:
        try:
            _check_directory(adapter, with_tensors=with_tensors)
            return
        except (StaleAdapterError, UserError):
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)


def _check_directory(adapter: Adapter, *, with_tensors: bool) -> None:
    path = adapter.path
    if path.parent.is_dir():
        list(path.parent.iterdir())  # makes an NFS client look again
    if not path.is_dir():
        raise UserError(f"adapter directory {path} does not exist")
    for name in ("adapter_config.json", ADAPTER_FILE):
        if not (path / name).is_file():
            raise UserError(f"adapter directory {path} has no {name}")
    manifest = read_manifest(path)  # empty for adapters of other tools
    own = {"version": adapter.version, "fingerprint": adapter.fingerprint}
    differs = [key for key, value in own.items() if manifest.get(key, value) != value]
    config = _config_sha256(path)
    if manifest.get("config_sha256", config) != config:
        differs.append("adapter_config.json")
    if with_tensors and fingerprint(load_tensors(path)) != adapter.fingerprint:
        differs.append("tensors")
    if differs:
        raise StaleAdapterError(
            f"{path} was changed after {adapter.name} was published ({', '.join(differs)})"
        )


def _config_sha256(path: Path) -> str:
    return hashlib.sha256((path / "adapter_config.json").read_bytes()).hexdigest()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a published version.

    Raises:
        UserError: no such directory, no weights in it, or unreadable weights.
    """
    for name in (ADAPTER_FILE, OLD_ADAPTER_FILE, FULL_FILE):
        if (path / name).is_file():
            try:
                if name == OLD_ADAPTER_FILE:  # weights_only: no code in the pickle is run
                    old = torch.load(path / name, map_location="cpu", weights_only=True)
                    return {key: tensor.contiguous() for key, tensor in old.items()}
                return load_file(path / name)
            except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"adapter {path / name} cannot be read: {reason}") from error
    raise UserError(f"adapter directory {path} holds neither {ADAPTER_FILE} nor {FULL_FILE}")


def is_lora_dir(path: Path) -> bool:
    """Whether a directory has an adapter's weights (and not all weights of a model)."""
    return any((path / name).is_file() for name in (ADAPTER_FILE, OLD_ADAPTER_FILE))


def find_adapter(source: Path) -> Path:
    """The adapter directory of a run folder (the final one, else the newest version), a directory
    or a hub id.

    Raises:
        UserError: there is no adapter.
    """
    source = adapter_path(source)
    versions = sorted((source / "adapters").glob("v[0-9]*"))
    for folder in (source, source / "adapter", *reversed(versions)):
        has_weights = is_lora_dir(folder) or any(folder.glob("*.safetensors"))
        if has_weights and not (folder / "config.json").is_file():
            return folder
    raise UserError(
        f"{source} holds no adapter; give a run folder, an adapter directory or a hub id"
    )


def open_adapter(path: Path, policy: Policy, *, name: str | None = None) -> Adapter:
    """Loads a version from disk into the policy and returns its handle.

    Any PEFT LoRA directory of the same base, rank, alpha and layers can be loaded.

    Raises:
        UserError: another base model, rank or alpha, or a wrong fingerprint.
    """
    tensors = load_tensors(path)
    mode = "lora" if is_lora_dir(path) else "full"
    if mode != policy.lora.mode:
        what = "an adapter" if mode == "lora" else "a whole model"
        raise UserError(f"{path} is {what}; set lora.mode={mode!r}")
    if mode == "lora":
        _check_peft_config(path, policy)
    manifest = read_manifest(path)
    found = fingerprint(tensors)
    if manifest.get("fingerprint", found) != found:
        raise UserError(
            f"adapter {path} was changed after it was written: its fingerprint differs; restore "
            "it, or use another one"
        )
    check_base(path, policy)
    policy.load_tensors(tensors)
    version = int(manifest.get("version", 0))
    return Adapter(
        version=version,
        name=name or str(manifest.get("name", path.name)),
        path=path,
        fingerprint=found,
        rank=policy.published_rank,
    )


def saved_version(path: Path, expected: str) -> Adapter:
    """The handle of a version published by this run; the policy is not changed.

    Raises:
        UserError: it is missing, or its tensors do not have the expected fingerprint.
    """
    tensors, manifest = load_tensors(path), read_manifest(path)
    if fingerprint(tensors) != expected:
        raise UserError(
            f"adapter {path} is not the one that the run sampled from, and sampling.max_staleness "
            "needs it to resume; start a new run under another run.name"
        )
    return Adapter(
        version=int(manifest["version"]),
        name=str(manifest["name"]),
        path=path,
        fingerprint=expected,
        rank=int(manifest["rank"]),
    )


def check_base(path: Path, policy: Policy) -> None:
    """Raises UserError if the manifest names another base model than the policy's."""
    base = str(read_manifest(path).get("base_model", policy.base_name))
    if base != policy.base_name and not is_directory(base, policy.model_dir):
        raise UserError(
            f"adapter {path} belongs to base model {base!r}, not {policy.base_name!r}; set "
            f"model.name={base}"
        )


def is_directory(name: str, model_dir: Path) -> bool:
    """Whether a base model's name is a path to this directory."""
    return Path(name).is_dir() and Path(name).samefile(model_dir)


def remove_old(folder: Path, *, keep: set[int]) -> None:
    """Deletes the published versions in folder, except those to keep."""
    for path in folder.glob("v[0-9]*"):
        if int(path.name[1:]) not in keep:
            shutil.rmtree(path)
    for leftover in folder.glob(".v[0-9]*"):  # of a killed process
        shutil.rmtree(leftover)


def version_in(path: Path) -> int | None:
    """The version number of a directory; None if it is missing or not of this project."""
    version = read_manifest(path).get("version")
    return None if version is None else int(version)


def _check_peft_config(path: Path, policy: Policy) -> None:
    settings = lora_settings(path)
    for key in ("variant", "rank", "alpha"):
        value, wanted = settings[key], getattr(policy.lora, key)
        if value != wanted:
            raise UserError(f"adapter {path} has {key} {value}; set lora.{key}={value}")
    scaling = layer_scalings(path)
    own = scaling_of(settings["variant"], settings["alpha"], settings["rank"])
    for layer in policy.target_names:
        if scaling(layer, settings["rank"]) != own:
            raise UserError(
                f"adapter {path} has layers with different alphas (alpha_pattern), {layer} first, "
                "and cannot be trained further; `rl-lora eval` and `rl-lora export` support it"
            )


def _peft_config(policy: Policy) -> LoraConfig:
    """The config for PEFT and vLLM.

    In a mixture, the experts have rank r and the other layers rank_pattern: PEFT fuses an expert's
    gate and up into one layer of rank 2 r, so r must be the experts'.
    """
    suffixes = {name.rsplit(".", 1)[-1] for name in policy.target_names}
    experts = policy.expert_names
    one_rank = served_rank(policy.lora)
    # Two parts of a name: only `gate_proj`, of a shared expert, would match every expert's.
    whole = sorted({".".join(name.split(".")[-2:]) for name in policy.target_names})
    if experts:
        one_rank = expert_rank(policy.lora.rank, num_active_experts(policy.model.config))
    config = LoraConfig(
        r=one_rank,
        lora_alpha=served_alpha(policy.lora),  # type: ignore[arg-type]  # a float works too
        rank_pattern=dict.fromkeys(whole, policy.lora.rank) if experts else {},
        fan_in_fan_out=policy.model.config.model_type == "gpt2",  # Conv1D: weights are [I, O]
        use_rslora=policy.lora.variant == "rslora",
        use_dora=policy.lora.variant == "dora",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=_base_reference(policy),
        revision=policy.base_revision,
        inference_mode=True,
    )
    # Given to LoraConfig it would be a set, whose order in the file is another in each process.
    config.target_modules = sorted({*suffixes, *experts})
    return config


def _base_reference(policy: Policy) -> str:
    """The base for PEFT: its hub id, or the absolute path of a local model."""
    name = policy.base_name
    is_local = Path(name).expanduser().exists() or any(e.name == name for e in list_models())
    return str(policy.model_dir.absolute()) if is_local else name
