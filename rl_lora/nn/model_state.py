"""All weights of a model under their names in its files, sharded or not.

There a mixture's experts have a matrix each, and a tied lm_head is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_lora import distributed
from rl_lora.errors import UserError
from rl_lora.nn.experts import split_experts
from rl_lora.nn.sharded import gathered, is_shard, local_part, own_part


def file_tensors(model: PreTrainedModel, instead: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict's tensors, or those given instead of them: views."""
    state = {name: instead.get(name, t).detach() for name, t in _untied(model).items()}
    assert instead.keys() <= state.keys(), "a weight in training would not be saved"
    return split_experts(model, state)


def gathered_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Of a sharded model: all of them in the host memory of rank 0, gathered one by one; on other
    ranks, which all call it, none.

    Args:
        model: with all weights in training.
        dtype: of the weights.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in _untied(model).items():
        whole = gathered(tensor)
        if distributed.is_main():
            found[name] = whole.to("cpu", dtype if is_shard(tensor) else tensor.dtype)
    return split_experts(model, found)


@torch.no_grad()
def load_into_shards(model: PreTrainedModel, tensors: Mapping[str, Tensor], base_name: str) -> None:
    """Each rank copies its part of the tensors, which all ranks have. Raises as `check_shapes`."""
    state = _untied(model)
    shapes = {name: torch.empty(t.shape, device="meta") for name, t in state.items()}
    check_shapes(split_experts(model, shapes), tensors, base_name)
    for name, tensor in state.items():
        parts = split_experts(model, {name: shapes[name]})
        if len(parts) == 1:
            whole = tensors[next(iter(parts))]
        else:
            whole = torch.empty(tensor.shape, dtype=tensors[next(iter(parts))].dtype)
            for part, view in split_experts(model, {name: whole}).items():
                view.copy_(tensors[part])
        local_part(tensor).copy_(own_part(whole, tensor))


def check_shapes(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], base_name: str) -> None:
    """Raises UserError where a name or shape differs from a policy's own."""
    for name in sorted(own.keys() ^ tensors.keys()):
        where = "lacks" if name in own else "has an extra tensor"
        raise UserError(f"adapter of another base model or shape: it {where} {name}")
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"adapter of another base model or rank: {name} is "
                f"{list(tensors[name].shape)}, {base_name} needs {list(tensor.shape)}"
            )


def _untied(model: PreTrainedModel) -> dict[str, Tensor]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
