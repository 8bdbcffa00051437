"""PEFT's adapter format on disk: settings and tensors of a directory.

Only what is known to be supported is accepted: a setting that changes what layers compute, or a
tensor other than A, B and magnitudes, is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from rl_lora.config import ModelSection, parse_as
from rl_lora.errors import UserError
from rl_lora.nn.variants import scaling_of
from rl_lora.storage.jsonl import read_json

ADAPTER_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "rl_lora.json"
PEFT_PREFIX = "base_model.model."  # of its tensor names
COPY_SUFFIX = ".base_layer.weight"  # of a base weight that PEFT saves with the adapter on it
MAGNITUDE_SUFFIX = ".lora_magnitude_vector"

# Initializations that change the base model's weights.
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Keys of adapter_config.json that do not change what a layer computes from its tensors, or that are
# handled here. Any other key with a non-default value is refused by name.
_SERVED_KEYS = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode "
    "r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern "
    "alpha_pattern megatron_core loftq_config eva_config corda_config lora_ga_config use_dora "
    "qalora_group_size runtime_config lora_bias target_parameters ensure_weight_tying".split()
)

# Tensors that an adapter may have besides A, B and magnitudes, by a part of their names.
_EXTRAS = (
    (".lora_B.bias", "a bias of B (lora_bias)"),
    (".lora_embedding_", "LoRA on an embedding"),
    ("", "a whole tensor of the base's (modules_to_save, bias, or an embedding's layer)"),
)


@dataclass(frozen=True, slots=True)
class LowRank:
    """One layer's update, y += scaling * B (A x)."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float


def lora_settings(path: Path) -> dict[str, Any]:
    """rank, alpha and variant of a PEFT directory, as lora.* keys.

    This project saves PiSSA and OLoRA adapters as plain LoRA. PEFT's own belong to a base that PEFT
    has changed and are refused.

    Raises:
        UserError: adapter_config.json is missing, not LoRA's, or uses an unsupported variant.
    """
    raw = peft_settings(path)
    variants = peft_variants(raw)
    if raw.get("peft_type") != "LORA" or len(variants) > 1:
        kind = " with ".join(variants) or raw.get("peft_type")
        raise UserError(f"{path}: only LoRA, rsLoRA and DoRA adapters are supported, not {kind}")
    start = str(raw.get("init_lora_weights"))
    if start.startswith(_CHANGED_BASES):
        raise UserError(
            f"{path}: with init_lora_weights={start!r} the adapter belongs to a base that PEFT has "
            "changed; save it with path_initial_model_for_weight_conversion as a plain adapter"
        )
    if unknown := next((key for key in raw if _is_departure(key, raw[key])), None):
        raise UserError(
            f"{path}: {unknown}={raw[unknown]!r} in adapter_config.json is not supported, as it "
            "changes what the layers compute; merge the adapter with PEFT's merge_and_unload and "
            "give the result as model.name"
        )
    variant = variants[0] if variants else "lora"
    rank = peft_rank(raw, read_manifest(path))
    return {"rank": rank, "alpha": float(raw["lora_alpha"]), "variant": variant}


def peft_settings(path: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError if it is missing or not a JSON object."""
    file = path / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{path} is not an adapter directory: it has no adapter_config.json")
    return read_json(file)


@cache
def _peft_defaults() -> dict[str, Any]:
    config = LoraConfig()
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _is_departure(key: str, value: Any) -> bool:
    """Whether a setting asks for something unsupported.

    A key that this version of PEFT does not know counts if it is true or a non-empty list or dict;
    a number or string may be an unused default.
    """
    if key in _SERVED_KEYS or not value:
        return False
    known = _peft_defaults()
    return value != known[key] if key in known else value is True or isinstance(value, dict | list)


def peft_variants(raw: dict[str, Any]) -> list[str]:
    """The variants in an adapter_config.json: empty for plain LoRA; two are unsupported."""
    return [name for name in ("dora", "rslora") if raw.get(f"use_{name}")]


def peft_rank(raw: dict[str, Any], manifest: dict[str, Any]) -> int:
    """The rank of an adapter, from the manifest if there is one, else adapter_config.json.

    In a mixture, r is one expert's rank, and rank_pattern has the full rank of other layers.
    """
    whole = manifest.get("rank") or max([raw["r"], *(raw.get("rank_pattern") or {}).values()])
    return int(whole)


def is_peft_loadable(path: Path) -> bool:
    """Whether PEFT (0.21) loads a directory correctly.

    It applies target names that experts have (gate_proj, ...) only to experts, so dense layers of
    those names get no adapter, with at most a warning.
    """
    if not (path / ADAPTER_FILE).is_file():
        return True  # another tool's, in PEFT's older format
    with safe_open(path / ADAPTER_FILE, framework="pt") as opened:
        owners = [name.partition(".lora_")[0].split(".") for name in opened.keys()]  # noqa: SIM118
    experts = {parts[-1] for parts in owners if "experts" in parts}
    return not any(parts[-1] in experts for parts in owners if "experts" not in parts)


def read_manifest(path: Path) -> dict[str, Any]:
    """rl_lora.json in an adapter directory; empty for adapters of other tools."""
    file = path / MANIFEST_FILE
    return read_json(file) if file.is_file() else {}


def named_base(adapter_dir: Path) -> str | None:
    """The base model's name in the manifest, else in adapter_config.json; None if in neither."""
    name = read_manifest(adapter_dir).get("base_model")
    if not name and (adapter_dir / "adapter_config.json").is_file():
        name = peft_settings(adapter_dir).get("base_model_name_or_path")
    return str(name) if name else None


def trained_on(adapter_dir: Path) -> ModelSection:
    """The adapter's base as it was in training; quantize is None if it was not quantized, or for
    adapters of other tools.

    Raises:
        UserError: the manifest has no such quantization.
    """
    trained = read_manifest(adapter_dir).get("trained_as", {})
    given = {key: trained[key] for key in ("quantize", "dtype") if key in trained}
    return parse_as(ModelSection, given)


def layer_scalings(path: Path) -> Callable[[str, int], float]:
    """PEFT's scaling of B A in an adapter directory, as a function of (layer, its rank)."""
    raw = peft_settings(path)
    settings = lora_settings(path)
    pattern: dict[str, Any] = raw.get("alpha_pattern") or {}

    def scaling(layer: str, rank: int) -> float:
        alpha = float(pattern.get(get_pattern_key(list(pattern), layer), settings["alpha"]))
        return scaling_of(settings["variant"], alpha, rank)

    return scaling


def low_rank_terms(tensors: dict[str, Tensor], source: Path) -> dict[str, LowRank]:
    """Each layer's update with PEFT's scaling, from the tensor's rank and the layer's alpha.

    Raises:
        UserError: as `factor_pairs` and `lora_settings`.
    """
    pairs = factor_pairs(tensors, source)
    scaling = layer_scalings(source)
    return {
        layer: LowRank(a_RI, b_OR, scaling(layer, a_RI.shape[0]))
        for layer, (a_RI, b_OR) in pairs.items()
    }


def factor_pairs(tensors: dict[str, Tensor], source: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by layer ('model.layers.0.self_attn.q_proj'); DoRA's magnitudes are skipped.

    Args:
        tensors: an adapter's, under PEFT's names.
        source: the adapter's directory, for error messages.

    Raises:
        UserError: A without B, A and B of different ranks, or other tensors.
    """
    check_extras(tensors, source)
    pairs = {}
    for name, lora_A in tensors.items():
        stem, _, kind = name.rpartition(".lora_")
        if kind != "A.weight":
            continue
        lora_B = tensors.get(f"{stem}.lora_B.weight")
        if lora_B is None:
            raise UserError(f"adapter {source} is damaged: {name} has no B")
        if lora_A.shape[0] != lora_B.shape[1]:
            raise UserError(f"adapter {source} is damaged: A and B of {stem} have different ranks")
        pairs[layer_name(stem)] = (lora_A, lora_B)
    num_magnitudes = sum(name.endswith(MAGNITUDE_SUFFIX) for name in tensors)
    if 2 * len(pairs) + num_magnitudes != len(tensors):
        raise UserError(f"adapter {source} is damaged: it has a B without A")
    return pairs


def is_extra(name: str) -> bool:
    """Whether a tensor is neither A, B nor a magnitude of a linear layer."""
    return not name.endswith((".lora_A.weight", ".lora_B.weight", MAGNITUDE_SUFFIX))


def check_extras(names: Iterable[str], source: Path) -> None:
    """Raises UserError for tensors besides A, B and magnitudes, naming their kind."""
    for name in sorted(filter(is_extra, names)):
        kind = next(words for part, words in _EXTRAS if part in name)
        raise UserError(
            f"adapter {source} has {kind}: {layer_name(name)}, which is not supported here; merge "
            f"it with `rl-lora export {source} --merged DIR` and set model.name=DIR"
        )


def layer_name(stem: str) -> str:
    """The layer of an adapter's tensors with this stem."""
    return stem.removeprefix(PEFT_PREFIX)
