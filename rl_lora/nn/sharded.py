"""Weights of which every rank holds a share (FSDP2)."""

from __future__ import annotations

from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor stands for one that is divided among the ranks (a DTensor)."""
    return hasattr(tensor, "device_mesh")  # which needs no import of torch.distributed.tensor


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, not copied; any other tensor as it is."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]
