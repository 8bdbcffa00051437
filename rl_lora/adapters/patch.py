"""What merging an adapter does to the base model's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from rl_lora.adapters.files import is_directory, is_lora_dir, load_tensors
from rl_lora.adapters.peft_files import (
    MAGNITUDE_SUFFIX,
    LowRank,
    is_extra,
    layer_name,
    layer_scalings,
    lora_settings,
    low_rank_terms,
    named_base,
    peft_settings,
)
from rl_lora.errors import UserError
from rl_lora.models.shapes import build_on_meta, has_own_head
from rl_lora.nn.experts import split_experts
from rl_lora.nn.variants import merged_dora


@dataclass(frozen=True, slots=True)
class Patch:
    """Changes to the base's tensors, by their names in the base's files."""

    lora: dict[str, LowRank]
    magnitudes: dict[str, Tensor]  # DoRA's row norms, [d_out]
    replaced: dict[str, Tensor]  # new tensors, of full fine-tuning or PEFT's modules_to_save
    added: dict[str, Tensor]  # addends to biases, of lora_bias
    embedding: str  # the input embedding's weight
    head: str  # lm_head's weight
    is_tied: bool  # in the base, lm_head is the input embedding
    unties: bool  # in the merged model, it no longer is
    transposed: frozenset[str] = frozenset()  # weights that are [d_in, d_out] (GPT-2's Conv1D)

    @property
    def names(self) -> set[str]:
        """Names of the tensors that change."""
        return set(self.lora) | set(self.replaced) | set(self.added)

    def merged(self, name: str, base: Tensor) -> Tensor:
        """The merged weight in float32, the replacement, or the unchanged base tensor."""
        weight = self.replaced.get(name, base)
        if name in self.added:
            weight = weight.float() + self.added[name]
        if name not in self.lora:
            return weight
        term = self.lora[name]
        a_RI, b_OR = term.a_RI.float(), term.b_OR.float()
        weight_OI = weight.T if name in self.transposed else weight
        if name in self.magnitudes:
            magnitude_O = self.magnitudes[name]
            merged_OI = merged_dora(weight_OI, magnitude_O, a_RI, b_OR, term.scaling)
        else:
            merged_OI = torch.addmm(weight_OI.float(), b_OR, a_RI, alpha=term.scaling)
        return merged_OI.T if name in self.transposed else merged_OI


def load_patch(model_dir: Path, adapter_dir: Path, base_name: str | None) -> Patch:
    """The patch of an adapter. Raises UserError if its layers are not those of the base."""
    named = named_base(adapter_dir)
    is_other = base_name is not None and named not in (None, base_name)
    if is_other and not is_directory(str(named), model_dir):
        raise UserError(
            f"adapter {adapter_dir} belongs to base model {named!r}, not {base_name!r}; if they "
            "are the same model, give the base as a directory"
        )
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    model: Any = build_on_meta(config)
    embedding, head = (
        next(f"{n}.weight" for n, m in model.named_modules() if m is module)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    is_tied = head in model.all_tied_weights_keys and not has_own_head(model_dir, config)
    tensors = load_tensors(adapter_dir)
    unties = False
    lora: dict[str, LowRank] = {}
    magnitudes: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    replaced = tensors
    if is_lora_dir(adapter_dir):
        low_rank = {name: tensor for name, tensor in tensors.items() if not is_extra(name)}
        lora = {f"{n}.weight": term for n, term in low_rank_terms(low_rank, adapter_dir).items()}
        magnitudes = {
            f"{layer_name(stem)}.weight": tensor
            for name, tensor in low_rank.items()
            if (stem := name.removesuffix(MAGNITUDE_SUFFIX)) != name
        }
        replaced, added, on_tables = _extras(tensors, adapter_dir)
        lora |= on_tables
        is_dora = lora_settings(adapter_dir)["variant"] == "dora"
        if magnitudes.keys() != (lora.keys() if is_dora else set()):
            raise UserError(
                f"adapter {adapter_dir} is damaged: DoRA needs a magnitude for each layer"
            )
        changed = lora.keys() | replaced.keys()
        unties = is_tied and (head in changed or embedding in changed)
        if unties and peft_settings(adapter_dir).get("ensure_weight_tying"):
            raise UserError(
                f"adapter {adapter_dir} has ensure_weight_tying on lm_head or the embedding, which "
                "is not merged here; use PEFT's merge_and_unload"
            )
    layout = split_experts(model, model.state_dict())
    transposed = frozenset(
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    )
    found: dict[str, tuple[int, ...]] = {
        name: (term.b_OR.shape[0], term.a_RI.shape[1])[:: -1 if name in transposed else 1]
        for name, term in lora.items()
    }
    found |= {name: tuple(tensor.shape) for name, tensor in (replaced | added).items()}
    for name, shape in found.items():
        if name not in layout:
            raise UserError(mismatch(f"the base has no {name}", adapter_dir, model_dir))
        if layout[name].shape != shape:
            what = f"{name} is {list(layout[name].shape)} in the base, {list(shape)} in the adapter"
            raise UserError(mismatch(what, adapter_dir, model_dir))
    return Patch(lora, magnitudes, replaced, added, embedding, head, is_tied, unties, transposed)


def _extras(
    tensors: dict[str, Tensor], adapter_dir: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, LowRank]]:
    """(whole tensors, addends to biases, terms on embeddings) by the weights' names."""
    scaling = layer_scalings(adapter_dir)
    whole: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    terms: dict[str, LowRank] = {}
    for name in filter(is_extra, tensors):
        stem, mark, kind = name.rpartition(".lora_")
        layer = layer_name(stem)
        if not mark:
            whole[layer_name(name).replace(".base_layer.", ".")] = tensors[name]
        elif kind == "B.bias":
            rank = tensors[f"{stem}.lora_A.weight"].shape[0]
            added[f"{layer}.bias"] = tensors[name].float() * scaling(layer, rank)
        elif kind == "embedding_A":  # [R, V] with B [D, R]: (B A)^T is added to the table [V, D]
            a_RV, b_DR = tensors[name], tensors[f"{stem}.lora_embedding_B"]
            terms[f"{layer}.weight"] = LowRank(b_DR.T, a_RV.T, scaling(layer, a_RV.shape[0]))
        elif kind != "embedding_B":
            raise UserError(
                f"adapter {adapter_dir}: tensors such as {name} are not merged here; use PEFT's "
                "merge_and_unload"
            )
    return whole, added, terms


def mismatch(what: str, adapter_dir: Path, model_dir: Path) -> str:
    """The error message for an adapter and model that do not match."""
    named = named_base(adapter_dir)
    of = f" (of base model {named!r})" if named else ""
    return f"adapter {adapter_dir}{of} does not fit model {model_dir}: {what}"
