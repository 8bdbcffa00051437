"""An exact and quick hash of weights, to prove that they were not written to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over names, shapes and integer checksums of float tensors, in the given order.

    The checksums run on the tensors' device in wrap-around int64, so they are exact and quick.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(repr(_checksum(tensor.detach())).encode())
    return digest.hexdigest()


def _checksum(tensor: Tensor) -> tuple[int, int]:
    """Plain and position-weighted sums of the tensor's words, in wrap-around int64."""
    words = (
        tensor.contiguous()
        .view(-1)
        .view(torch.int16 if tensor.element_size() == 2 else torch.int32)
    )
    plain = weighted = 0
    for start in range(0, words.numel(), 2**22):
        part = words[start : start + 2**22].to(torch.int64)
        index = torch.arange(start + 1, start + 1 + part.numel(), device=part.device)
        plain += int(part.sum())
        weighted += int((part * index).sum())
    return plain, weighted
