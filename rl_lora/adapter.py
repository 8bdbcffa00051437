"""Published versions of the policy on disk: PEFT directories, fingerprinted, written atomically.

An adapter directory holds adapter_config.json and adapter_model.safetensors, as PEFT and vLLM read
them, and rl_lora.json with what they have no place for (version, fingerprint, base). A version of
full fine-tuning holds model.safetensors instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_lora.errors import UserError
from rl_lora.models import list_models
from rl_lora.moe import expert_rank, num_active_experts
from rl_lora.policy import Policy
from rl_lora.types import Adapter
from rl_lora.variants import scaling_of, served_alpha, served_rank
from rl_lora.whole import whole_directory

ADAPTER_FILE = "adapter_model.safetensors"
OLD_ADAPTER_FILE = "adapter_model.bin"  # as PEFT wrote it before safetensors
FULL_FILE = "model.safetensors"
MANIFEST_FILE = "rl_lora.json"
PEFT_PREFIX = "base_model.model."  # of its tensor names
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that write to the base
# Keys of an adapter_config.json that change nothing of what a layer computes from its tensors, or
# that are taken care of here. Any other one with a value of its own is refused by name.
_SERVED_KEYS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern megatron_core loftq_config eva_config corda_config lora_ga_config use_dora "
    "qalora_group_size runtime_config lora_bias target_parameters ensure_weight_tying".split()
)
# Tensors that an adapter may have beside A, B and magnitudes, by a part of their names.
_EXTRAS = (
    (".lora_B.bias", "a bias beside B (lora_bias)"),
    (".lora_embedding_", "LoRA on an embedding"),
    ("", "a whole tensor of the base's (modules_to_save, bias, or an embedding's layer)"),
)


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's term: y += scaling * B (A x); a_RI is [R, I] and b_OR [O, R].

    Example: LowRank(a_RI=..., b_OR=..., scaling=32.0).
    """

    a_RI: Tensor
    b_OR: Tensor
    scaling: float


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes of the tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # NumPy has no bfloat16; for the rest a view of bytes would cost more than the hash.
        has_numpy = tensor.dtype in (torch.float32, torch.float16)
        plain = tensor if has_numpy else tensor.view(-1).view(torch.uint8)
        digest.update(plain.numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def save_adapter(policy: Policy, folder: Path, *, version: int, run_name: str) -> Adapter:
    """Writes the policy's present version to folder/vNNNNNN and returns its handle."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in policy.published_tensors().items()}
    adapter = Adapter(
        version=version,
        name=f"{run_name}-v{version:06d}",
        path=folder / f"v{version:06d}",
        fingerprint=fingerprint(tensors),
        rank=0 if policy.is_full else served_rank(policy.lora),
        is_full=policy.is_full,
    )
    write_adapter(adapter, tensors, policy)
    return adapter


def write_adapter(adapter: Adapter, tensors: dict[str, Tensor], policy: Policy) -> None:
    """The directory of one version; it appears whole or not at all.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    manifest = {
        "version": adapter.version,
        "name": adapter.name,
        "fingerprint": adapter.fingerprint,
        "base_model": policy.base_name,
        "rank": adapter.rank,
        "is_full": adapter.is_full,
        "trained_as": {"variant": policy.lora.variant, "rank": policy.lora.rank},
    }
    try:
        with whole_directory(adapter.path) as scratch:
            if adapter.is_full:
                save_file(tensors, scratch / FULL_FILE, metadata={"format": "pt"})
            else:
                save_file(tensors, scratch / ADAPTER_FILE, metadata={"format": "pt"})
                _peft_config(policy).save_pretrained(str(scratch))
            (scratch / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"adapter {adapter.path} cannot be written ({error}); make room on the disk, then "
            "--resume goes on from the last checkpoint"
        ) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a published version.

    Raises:
        UserError: no such directory, no weights in it, or weights that cannot be read.
    """
    for name in (ADAPTER_FILE, OLD_ADAPTER_FILE, FULL_FILE):
        if (path / name).is_file():
            try:
                if name == OLD_ADAPTER_FILE:  # tensors alone; no code of a pickle's is run
                    old = torch.load(path / name, map_location="cpu", weights_only=True)
                    return {key: tensor.contiguous() for key, tensor in old.items()}
                return load_file(path / name)
            except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"adapter {path / name} cannot be read: {reason}") from error
    raise UserError(f"adapter directory {path} holds neither {ADAPTER_FILE} nor {FULL_FILE}")


def is_lora_dir(path: Path) -> bool:
    """Whether a directory holds an adapter's weights, and not a full version's."""
    return any((path / name).is_file() for name in (ADAPTER_FILE, OLD_ADAPTER_FILE))


def open_adapter(path: Path, policy: Policy, *, name: str | None = None) -> Adapter:
    """The handle of a version on disk, its tensors copied into the policy.

    It may be ours or any PEFT LoRA directory of the same base, rank, alpha and layers.

    Raises:
        UserError: it is of another base model, rank or alpha, or does not match its fingerprint.
    """
    tensors = load_tensors(path)
    is_full = not is_lora_dir(path)
    if is_full != policy.is_full:
        raise UserError(f"{path} is {'a full' if is_full else 'an adapter'} version; set lora.mode")
    if not is_full:
        _check_peft_config(path, policy)
    manifest = _manifest(path)
    found = fingerprint(tensors)
    if manifest.get("fingerprint", found) != found:
        raise UserError(f"adapter {path} was changed after it was written: its fingerprint differs")
    check_base(path, policy)
    policy.load_tensors(tensors)
    version = int(manifest.get("version", 0))
    return Adapter(
        version=version,
        name=name or str(manifest.get("name", path.name)),
        path=path,
        fingerprint=found,
        rank=0 if is_full else served_rank(policy.lora),
        is_full=is_full,
    )


def saved_version(path: Path, expected: str) -> Adapter:
    """The handle of a version that this run has published, the policy left as it is.

    Raises:
        UserError: it is gone, or its tensors have not the fingerprint expected.
    """
    tensors, manifest = load_tensors(path), _manifest(path)
    if fingerprint(tensors) != expected:
        raise UserError(
            f"adapter {path} is not the one that the run has sampled from, and a run with "
            "sampling.overlap cannot go on without it; start anew under another run.name"
        )
    return Adapter(
        version=int(manifest["version"]),
        name=str(manifest["name"]),
        path=path,
        fingerprint=expected,
        rank=int(manifest["rank"]),
        is_full=bool(manifest["is_full"]),
    )


def check_base(path: Path, policy: Policy) -> None:
    """Raises UserError where the version's manifest names another base model than the policy's."""
    base = str(_manifest(path).get("base_model", policy.base_name))
    if base != policy.base_name and not is_directory(base, policy.model_dir):
        raise UserError(f"adapter {path} belongs to base model {base!r}, not {policy.base_name!r}")


def is_directory(name: str, model_dir: Path) -> bool:
    """Whether a base model's name is a path of this directory."""
    return Path(name).is_dir() and Path(name).samefile(model_dir)


def remove_old(folder: Path, *, keep: set[int]) -> None:
    """Deletes the published versions in folder but those to keep."""
    for path in folder.glob("v[0-9]*"):
        if int(path.name[1:]) not in keep:
            shutil.rmtree(path)
    for leftover in folder.glob(".v[0-9]*"):  # of a killed process
        shutil.rmtree(leftover)


def factor_pairs(tensors: dict[str, Tensor], source: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the name of their layer ('model.layers.0.self_attn.q_proj'), out of an adapter's
    tensors under PEFT's names; DoRA's magnitudes are left out.

    Args:
        source: the adapter's directory, for the complaints.

    Raises:
        UserError: A without B or of another rank, or a tensor that is none of these.
    """
    check_extras(tensors, source)
    pairs = {}
    for name, lora_A in tensors.items():
        stem, _, kind = name.rpartition(".lora_")
        if kind != "A.weight":
            continue
        lora_B = tensors.get(f"{stem}.lora_B.weight")
        if lora_B is None:
            raise UserError(f"adapter {source} has {name} but no B beside it")
        if lora_A.shape[0] != lora_B.shape[1]:
            raise UserError(f"adapter {source}: A and B of {stem} are of different ranks")
        pairs[layer_name(stem)] = (lora_A, lora_B)
    num_magnitudes = sum(name.endswith(MAGNITUDE_SUFFIX) for name in tensors)
    if 2 * len(pairs) + num_magnitudes != len(tensors):
        raise UserError(f"adapter {source} has a B without A")
    return pairs


def is_extra(name: str) -> bool:
    """Whether a tensor of an adapter's is neither A, B nor a magnitude of a linear layer."""
    return not name.endswith((".lora_A.weight", ".lora_B.weight", MAGNITUDE_SUFFIX))


def check_extras(names: Iterable[str], source: Path) -> None:
    """Raises UserError where an adapter has more than A, B and magnitudes, naming the kind."""
    for name in sorted(filter(is_extra, names)):
        kind = next(words for part, words in _EXTRAS if part in name)
        raise UserError(
            f"adapter {source} has {kind}: {layer_name(name)}; that is not served, but "
            f"`rl-lora export {source} --merged DIR` writes a model of it, for model.name=DIR"
        )


def low_rank_terms(tensors: dict[str, Tensor], source: Path) -> dict[str, LowRank]:
    """Terms by the name of their layer, each with the scaling that PEFT gives it: by the tensor's
    own rank and, where there is a pattern, the layer's own alpha.

    Raises:
        UserError: as `factor_pairs` and `lora_settings`.
    """
    pairs = factor_pairs(tensors, source)
    scaling = layer_scalings(source)
    return {
        layer: LowRank(a_RI, b_OR, scaling(layer, a_RI.shape[0]))
        for layer, (a_RI, b_OR) in pairs.items()
    }


def layer_scalings(path: Path) -> Callable[[str, int], float]:
    """What PEFT multiplies B A by in an adapter's directory: a function of (layer, its rank)."""
    raw = peft_settings(path)
    settings = lora_settings(path)
    pattern = raw.get("alpha_pattern") or {}

    def scaling(layer: str, rank: int) -> float:
        alpha = float(pattern.get(get_pattern_key(pattern, layer), settings["alpha"]))
        return scaling_of(settings["variant"], alpha, rank)

    return scaling


def layer_name(stem: str) -> str:
    """The layer that an adapter's tensors of this stem go with."""
    return stem.removeprefix(PEFT_PREFIX)


def lora_settings(path: Path) -> dict[str, Any]:
    """rank, alpha and variant of a PEFT directory, as lora.* keys.

    Ours of PiSSA and OLoRA are plain LoRA on disk. Those of PEFT that name such a start belong to a
    base that PEFT has changed, and are refused.

    Raises:
        UserError: adapter_config.json is missing, is no LoRA, or uses a variant not served here.
    """
    raw = peft_settings(path)
    variants = peft_variants(raw)
    if raw.get("peft_type") != "LORA" or len(variants) > 1:
        kind = " with ".join(variants) or raw.get("peft_type")
        raise UserError(f"{path}: LoRA, rsLoRA and DoRA adapters are served, not {kind}")
    start = str(raw.get("init_lora_weights"))
    if start.startswith(_CHANGED_BASES):
        raise UserError(
            f"{path}: init_lora_weights={start!r} is of a base that PEFT has changed; save it with "
            "path_initial_model_for_weight_conversion, which makes a plain adapter of it"
        )
    if unknown := next((key for key in raw if _is_departure(key, raw[key])), None):
        raise UserError(
            f"{path}: {unknown}={raw[unknown]!r} of its adapter_config.json is not served: it "
            "changes what the layers compute"
        )
    variant = variants[0] if variants else "lora"
    rank = peft_rank(raw, _manifest(path))
    return {"rank": rank, "alpha": float(raw["lora_alpha"]), "variant": variant}


def peft_settings(path: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError where it is missing or no JSON object."""
    file = path / "adapter_config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is no adapter directory: it has no adapter_config.json") from error
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} is not a JSON object")
    return raw


@cache
def _peft_defaults() -> dict[str, Any]:
    config = LoraConfig()
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _is_departure(key: str, value: Any) -> bool:
    """Whether a setting asks for something that is not served. A key that this PEFT does not know
    counts if it is switched on or has contents; a number or a word may be an unused default."""
    if key in _SERVED_KEYS or not value:
        return False
    known = _peft_defaults()
    return value != known[key] if key in known else value is True or isinstance(value, dict | list)


def peft_variants(raw: dict[str, Any]) -> list[str]:
    """lora.variant of an adapter_config.json: none for plain LoRA; two are not served here."""
    return [name for name in ("dora", "rslora") if raw.get(f"use_{name}")]


def peft_rank(raw: dict[str, Any], manifest: dict[str, Any]) -> int:
    """The whole rank of an adapter_config.json and, where there is one, our manifest beside it.

    Of a mixture r is one expert's, and the layers that have the whole rank are in the pattern.
    """
    whole = manifest.get("rank") or max([raw["r"], *(raw.get("rank_pattern") or {}).values()])
    return int(whole)


def is_peft_loadable(path: Path) -> bool:
    """Whether PEFT (0.21) loads a directory right.

    It takes target names that experts have (gate_proj, ...) for experts alone, so that dense layers
    of those names beside them get no adapter, with a warning at most.
    """
    if not (path / ADAPTER_FILE).is_file():
        return True  # of another tool, in PEFT's older format
    with safe_open(path / ADAPTER_FILE, framework="pt") as opened:
        owners = [name.partition(".lora_")[0].split(".") for name in opened.keys()]  # noqa: SIM118
    experts = {parts[-1] for parts in owners if "experts" in parts}
    return not any(parts[-1] in experts for parts in owners if "experts" not in parts)


def version_in(path: Path) -> int | None:
    """The version that a directory holds; None: it is not there, or none of ours."""
    version = _manifest(path).get("version")
    return None if version is None else int(version)


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    if not file.is_file():
        return {}
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return manifest


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
                f"adapter {path} has layers of several alphas (alpha_pattern), {layer} first; "
                "`rl-lora eval` and `rl-lora export` take it"
            )


def _peft_config(policy: Policy) -> LoraConfig:
    """What PEFT and vLLM are told; a mixture's experts have r, its other layers rank_pattern.

    PEFT gives an expert's gate and up, which it fuses, twice r: it must be the experts' r.
    """
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in policy.target_names})
    experts = policy.expert_names
    one_rank = served_rank(policy.lora)
    # Two parts of a name: a shared expert's `gate_proj` alone would be every expert's.
    whole = sorted({".".join(name.split(".")[-2:]) for name in policy.target_names})
    if experts:
        one_rank = expert_rank(policy.lora.rank, num_active_experts(policy.model.config))
    return LoraConfig(
        r=one_rank,
        lora_alpha=served_alpha(policy.lora),  # type: ignore[arg-type]  # a float serves as well
        target_modules=sorted({*suffixes, *experts}),
        rank_pattern=dict.fromkeys(whole, policy.lora.rank) if experts else {},
        use_rslora=policy.lora.variant == "rslora",
        use_dora=policy.lora.variant == "dora",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=_base_reference(policy),
        revision=policy.base_revision,
        inference_mode=True,
    )


def _base_reference(policy: Policy) -> str:
    """Where PEFT finds the base: its hub id, else its directory as an absolute path."""
    name = policy.base_name
    is_local = Path(name).expanduser().exists() or any(e.name == name for e in list_models())
    return str(policy.model_dir.absolute()) if is_local else name
