"""PEFT's adapters as they lie on disk: what a directory's settings ask for, what its tensors are.

Nothing is taken for served that is not known to be: a setting that changes what the layers compute,
or a tensor that is no A or B, is refused by its name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from rl_lora.errors import UserError
from rl_lora.nn.variants import scaling_of

ADAPTER_FILE = "adapter_model.safetensors"

MANIFEST_FILE = "rl_lora.json"

PEFT_PREFIX = "base_model.model."  # of its tensor names

COPY_SUFFIX = ".base_layer.weight"  # of a base's weight that PEFT saves beside the adapter on it
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
    rank = peft_rank(raw, read_manifest(path))
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


def read_manifest(path: Path) -> dict[str, Any]:
    """What we write beside an adapter of ours; empty for one of another tool's."""
    file = path / MANIFEST_FILE
    if not file.is_file():
        return {}
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return manifest


def layer_scalings(path: Path) -> Callable[[str, int], float]:
    """What PEFT multiplies B A by in an adapter's directory: a function of (layer, its rank)."""
    raw = peft_settings(path)
    settings = lora_settings(path)
    pattern: dict[str, Any] = raw.get("alpha_pattern") or {}

    def scaling(layer: str, rank: int) -> float:
        alpha = float(pattern.get(get_pattern_key(list(pattern), layer), settings["alpha"]))
        return scaling_of(settings["variant"], alpha, rank)

    return scaling


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


def layer_name(stem: str) -> str:
    """The layer that an adapter's tensors of this stem go with."""
    return stem.removeprefix(PEFT_PREFIX)
