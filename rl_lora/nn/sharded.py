"""Weights of which every rank holds a share: FSDP2, a unit per decoder layer.

Outside of passes a parameter is a DTensor, cut along its first axis. A forward pass gathers one
layer after another and frees it again, and so does the backward pass, which leaves each rank its
share of the *sum* of all ranks' gradients. So every pass is collective: all ranks run equally many,
in the same order.

With an adapter the base is sharded as it is, and the adapter stays whole on every rank. Without
one, all weights are in training: the shares are kept, and gradients summed, in float32, and each
layer is gathered in the model's dtype.

`fully_shard` is called here and not by accelerate's `prepare`, which

- gathers the final norm and lm_head when these modules are called, where our log-probs read
  `lm_head.weight` itself; called for one chunk of tokens after another, lm_head would sum its
  gradient once per chunk, and ranks differ in their number of chunks;
- leaves out whole modules only, and a LoRA layer has its base inside;
- where it makes weights float32, does so with all of the model before it is sharded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from rl_lora import distributed
from rl_lora.config import LoraSection, ModelSection
from rl_lora.errors import UserError
from rl_lora.launchers.environment import is_launched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


def is_to_be_sharded(model: ModelSection, lora: LoraSection) -> bool:
    """What model.shard says; none: for all weights of several processes.

    Without a process group, the only process has all of the weights anyway.
    """
    if not (is_launched() and torch.distributed.is_initialized()):
        return False
    if model.shard is None:
        return lora.mode == "full" and distributed.world_size() > 1
    return model.shard


# --- a tensor -------------------------------------------------------------------------------------


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor stands for one that is divided among the ranks (a DTensor)."""
    return hasattr(tensor, "device_mesh")  # which needs no import of torch.distributed.tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, not copied; any other tensor as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank, which all call it; any other as it is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """A view of what is this rank's of a whole tensor, if it is cut as `like` is."""
    if not is_shard(like):
        return whole
    mesh = like.device_mesh  # type: ignore[attr-defined]
    num_rows = -(-whole.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * num_rows, whole.shape[0])
    return whole[start : start + local_part(like).shape[0]]


def sharded(whole: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor that every rank has, cut as `like` is, on its device."""
    part = own_part(whole, like).to(local_part(like).device, copy=True)
    if not is_shard(like):
        return part
    from torch.distributed.tensor import DTensor

    assert whole.shape == like.shape
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered_on_main(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors in the host memory of rank 0, gathered one by one; on other ranks none.

    All ranks call it.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = gathered(tensor)
        if distributed.is_main():
            found[name] = whole.cpu()
    return found


# --- a model --------------------------------------------------------------------------------------


def shard_model(
    model: PreTrainedModel, device: torch.device, adapter: Collection[nn.Parameter] = ()
) -> None:
    """Moves a model to the device, where each rank keeps its share of all but the adapter.

    Args:
        model: the same on all ranks, on the CPU.
        device: of this process.
        adapter: parameters in training that stay whole on every rank.

    Raises:
        UserError: weights in training differ in dtype.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    from rl_lora.nn.compiled import decoder_layers

    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    kept = set(adapter)
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    trained = {p for p in model.parameters() if p.requires_grad} - kept
    mixed = MixedPrecisionPolicy(cast_forward_inputs=False)
    if trained:
        mixed = MixedPrecisionPolicy(model.dtype, torch.float32, cast_forward_inputs=False)
        _check_dtypes(model)
    for unit in (*(layer for _, layer in decoder_layers(model)), model):
        for parameter in unit.parameters():
            if not is_shard(parameter) and parameter not in kept:
                wide = parameter.data.float() if parameter in trained else parameter.data
                parameter.data = wide.contiguous()  # GPT-2's are transposed views
        # By default the root stays gathered after a pass, and would miss what is loaded next.
        shards = fully_shard(
            unit, mesh=mesh, reshard_after_forward=True, mp_policy=mixed, ignored_params=kept
        )
        shards.set_gradient_divide_factor(1.0)
        shards.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply
    model.run_inside = lambda function, *args: function(model, *args)  # type: ignore[assignment]
    register_fsdp_forward_method(model, "run_inside")


def _check_dtypes(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dtype != model.dtype:
            raise UserError(
                f"model.shard: {name} is {parameter.dtype} in a model of {model.dtype}, and FSDP "
                "trains weights of one dtype; set model.dtype='float32'"
            )


def run_inside(model: PreTrainedModel, function: Callable[..., T], *args: Any) -> T:
    """function(model, *args), in which weights outside of the decoder layers can be read.

    FSDP gathers those only for the model's own forward pass, which gives logits.
    """
    inside = getattr(model, "run_inside", None)
    if inside is None:
        return function(model, *args)
    found: T = inside(function, *args)
    return found


@contextlib.contextmanager
def whole_weights(model: PreTrainedModel) -> Iterator[None]:
    """Every rank holds all weights of a sharded model inside; see `Policy.whole_weights`."""
    from torch.distributed.fsdp import FSDPModule

    units = [unit for unit in model.modules() if isinstance(unit, FSDPModule)]
    run_inside(model, lambda _: None)  # FSDP takes what runs first for the root
    try:
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
