"""Converts adapters of any rank, alpha or layers to one policy's shape, to share an engine.

An adapter of rank r becomes one of rank R > r by zeros in the new rows of A and columns of B; its
alpha / r is multiplied into B, layer by layer, since PEFT's patterns can give each layer its own
rank and alpha. Layers without an adapter get zeros. W' is the same in exact arithmetic.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rl_lora.adapters.files import check_base, fingerprint, is_lora_dir, load_tensors, write_adapter
from rl_lora.adapters.peft_files import (
    ADAPTER_FILE,
    COPY_SUFFIX,
    check_extras,
    layer_name,
    layer_scalings,
    lora_settings,
)
from rl_lora.errors import UserError
from rl_lora.models.shapes import HEAD_NAMES
from rl_lora.nn.lora import BASE_PREFIX
from rl_lora.nn.variants import scaling_of, served_alpha
from rl_lora.types import Adapter

if TYPE_CHECKING:
    from rl_lora.policy import Policy


def common_settings(adapter_dirs: list[Path]) -> dict[str, Any]:
    """lora.* keys of a policy that can hold all these adapters; empty without LoRA adapters.

    Raises:
        UserError: an unsupported adapter, or one of several is DoRA.
    """
    found = [path for path in adapter_dirs if is_lora_dir(path)]
    if not found:
        return {}
    settings = [lora_settings(path) for path in found]
    # Layers with an adapter are found by the names of A and B.
    names_N = [load_tensors(path).keys() for path in found]
    for path, names in zip(found, names_N, strict=True):
        check_extras((name for name in names if not name.endswith(COPY_SUFFIX)), path)
    largest = max(settings, key=lambda one: one["rank"])
    if len(found) > 1 and any(one["variant"] == "dora" for one in settings):
        raise UserError(
            f"{' and '.join(map(str, found))}: a DoRA adapter cannot share an engine with another "
            "one; evaluate them one by one, then use `rl-lora compare`"
        )
    kinds = {_layers(names) for names in names_N}
    has_head = any(_is_of_head(name) for names in names_N for name in names)
    layers = kinds.pop() if len(kinds) == 1 else "all"
    return {**largest, "layers": layers, "lm_head": has_head}


def fitted(path: Path, policy: Policy, scratch: Path) -> Path:
    """The adapter's directory if it fits the policy, else a converted copy's at `scratch`.

    Raises:
        UserError: the adapter has tensors or shapes that do not fit into the policy.
    """
    if policy.lora.mode == "full" or not is_lora_dir(path):
        return path
    check_base(path, policy)  # a copy's manifest names the policy's
    own_tensors = policy.published_tensors()
    own = {name: tensor.shape for name, tensor in own_tensors.items()}
    tensors = load_tensors(path)
    is_whole = (path / ADAPTER_FILE).is_file() and len(tensors) == len(own)
    tensors = _without_copies(tensors, policy)
    check_extras(tensors, path)
    settings = lora_settings(path)
    scales = _scales(path, tensors, policy, own)
    fits = {name: tensor.shape for name, tensor in tensors.items()} == own
    fits = fits and all(getattr(policy.lora, key) == value for key, value in settings.items())
    if fits and is_whole and all(s == 1 for s in scales.values()):
        return path
    if strange := sorted(tensors.keys() - own.keys()):
        raise UserError(f"adapter {path} is of another base model: it has {strange[0]}")
    wide = {
        name: _widened(name, tensors.get(name), shape, scales.get(name, 1.0), path)
        for name, shape in own.items()
        if "magnitude" not in name
    }
    # Layers without DoRA keep the base's row norms, which a fresh policy has.
    wide |= {n: tensors.get(n, t.cpu()) for n, t in own_tensors.items() if "magnitude" in n}
    adapter = Adapter(
        version=0,
        name=f"{path.name}-fitted",
        path=scratch,
        fingerprint=fingerprint(wide),
        rank=policy.lora.rank,
    )
    scratch.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(adapter, wide, policy)
    return scratch


def _without_copies(tensors: dict[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    """Removes the base's weights that PEFT saves with an adapter on lm_head or the embedding."""
    parameters = policy.model.named_parameters(remove_duplicate=False)
    base = {name.replace(BASE_PREFIX, "."): parameter for name, parameter in parameters}

    def is_copy(name: str, tensor: Tensor) -> bool:
        own = base.get(f"{layer_name(name).removesuffix(COPY_SUFFIX)}.weight")
        return own is not None and torch.equal(own.cpu(), tensor.to(own.dtype))

    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (name.endswith(COPY_SUFFIX) and is_copy(name, tensor))
    }


def _scales(
    path: Path, tensors: dict[str, Tensor], policy: Policy, own: dict[str, torch.Size]
) -> dict[str, float]:
    """Factors for each B that turn the policy's scaling of the layer into the adapter's."""
    scaling = layer_scalings(path)
    scales = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".lora_")
        shape = own.get(name)
        if kind == "B.weight" and shape is not None:
            of_policy = scaling_of(policy.lora.variant, served_alpha(policy.lora), shape[1])
            scales[name] = scaling(layer_name(stem), tensor.shape[1]) / of_policy
    return scales


def _widened(
    name: str, tensor: Tensor | None, shape: torch.Size, scale: float, path: Path
) -> Tensor:
    out = torch.zeros(shape)
    if tensor is None:
        return out
    rank_axis = 1 if "lora_B" in name else 0  # A is [R, d_in], B is [d_out, R]
    is_inside = tensor.shape[rank_axis] <= shape[rank_axis]
    if tensor.shape[1 - rank_axis] != shape[1 - rank_axis] or not is_inside:
        raise UserError(
            f"adapter {path} is of another base model: {name} is {list(tensor.shape)}, and "
            f"this one needs {list(shape)} or a lower rank"
        )
    rows, columns = tensor.shape
    out[:rows, :columns] = tensor.float() * scale
    return out


def _is_of_head(name: str) -> bool:
    return any(part in HEAD_NAMES for part in name.split("."))


def _layers(names: Any) -> str:
    """The value of lora.layers for an adapter with these tensor names."""
    inner = [name for name in names if not _is_of_head(name)]
    has_attention = any("attn" in name or "attention" in name for name in inner)
    words = ("mlp", "feed_forward", "ffn", "moe", "experts")
    has_mlp = any(word in name for name in inner for word in words)
    if has_attention and not has_mlp:
        return "attention"
    return "mlp" if has_mlp and not has_attention else "all"
