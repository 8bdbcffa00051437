"""What an optimizer steps on: float32 tensors that stand for a model's trainable parameters.

`FlatParameters`, for adapters: hundreds of small matrices are views of one tensor, and their
gradients views of another, so that an optimizer step, the gradient's norm, a copy to the host and
a sum over several processes are each one or two kernels.

`MasterWeights`, for all weights of a model: a bfloat16 weight has a float32 master. Near 0.05 the
values of bfloat16 are 2e-4 apart, so steps of 1e-5 would change few weights; the optimizer adds
them to the masters, and the weights are rounded from those.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor, nn

from rl_lora import distributed
from rl_lora.nn.sharded import is_shard, local_part

_BUCKET_BYTES = 2**28  # of gradients that are summed by one all-reduce


class Optimized(Protocol):
    """The interface of both, used in this order in each step."""

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """What the optimizer is made of, by name; each tensor's gradient is in its `grad`."""

    def gradients(self, loss: Tensor) -> Sequence[Tensor | None]:
        """Runs the backward pass; returns gradients that `add_gradients` has yet to add."""

    def add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds what `gradients` returned to the `grad` of the tensors."""

    def sum_gradients(self, phase: str) -> dict[str, float]:
        """Replaces each `grad` by its sum over all ranks, which all call it.

        Args:
            phase: as `distributed.add_up`.

        Returns:
            Metrics of the all-reduce; none in one process, and none for shards, whose gradients the
            backward pass has summed.
        """

    def write_back(self) -> None:
        """Brings the model's parameters up to date with the tensors."""


class FlatParameters:
    """Makes the parameters views of `values` [n]: every A, then every B and DoRA's magnitudes.

    Each kind is contiguous, so that LoRA+ can give it a learning rate. Afterwards the parameters
    may only be written to in place.

    Args:
        parameters: by name, float32, all on one device; those of A have "lora_A" in their name.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        of_a = [p for name, p in parameters.items() if "lora_A" in name]
        of_b = [p for name, p in parameters.items() if "lora_A" not in name]
        self._parameters = of_a + of_b
        self._sizes = [p.numel() for p in self._parameters]
        self._num_a = sum(p.numel() for p in of_a)
        self.values = torch.cat([p.detach().flatten() for p in self._parameters])
        for parameter, view in zip(self._parameters, self._views(self.values), strict=True):
            parameter.data = view

    @cached_property
    def gradient(self) -> Tensor:
        """[n], of `values`; every parameter's `grad` is a view of it. Made when first used."""
        gradient = torch.zeros_like(self.values)
        for parameter, view in zip(self._parameters, self._views(gradient), strict=True):
            parameter.grad = view
        return gradient

    @cached_property
    def tensors(self) -> dict[str, nn.Parameter]:
        """The two parts of `values` and `gradient`, "lora_A" and "lora_B"."""
        sizes = [self._num_a, self.values.numel() - self._num_a]
        tensors = {
            name: nn.Parameter(values)
            for name, values in zip(("lora_A", "lora_B"), self.values.split(sizes), strict=True)
        }
        for tensor, part in zip(tensors.values(), self.gradient.split(sizes), strict=True):
            tensor.grad = part
        return tensors

    def gradients(self, loss: Tensor) -> Sequence[Tensor | None]:
        """One for each parameter, so that passes can run at once; None: an unused expert."""
        return torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Adds them to `gradient`."""
        pairs = zip(self.gradient.split(self._sizes), gradients, strict=True)
        # On one axis: a column's strides differ from its view's, which would take a kernel each.
        given = [(part, g.reshape(-1)) for part, g in pairs if g is not None]
        torch._foreach_add_([part for part, _ in given], [g for _, g in given])

    def sum_gradients(self, phase: str) -> dict[str, float]:
        """One all-reduce of `gradient`."""
        return distributed.add_up(self.gradient, phase)

    def write_back(self) -> None:
        """Does nothing: the parameters are the tensors."""

    def on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in the CPU's memory: in one copy those that are views of `values`."""
        host, own = self.values.cpu(), self.values.untyped_storage().data_ptr()
        return {
            name: host.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            if tensor.untyped_storage().data_ptr() == own
            else tensor.detach().cpu()
            for name, tensor in tensors.items()
        }

    def _views(self, flat: Tensor) -> list[Tensor]:
        pairs = zip(flat.split(self._sizes), self._parameters, strict=True)
        return [part.view(p.shape) for part, p in pairs]


class MasterWeights:
    """Float32 masters of weights in another dtype; a float32 weight is its own.

    Gradients, too, are added up in float32: a backward pass hands each to the master as soon as it
    is complete, and frees it.

    Args:
        weights: in training, by name.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.tensors: dict[str, nn.Parameter] = {}
        self._rounded: list[tuple[nn.Parameter, nn.Parameter]] = []  # weights and their masters
        for name, weight in weights.items():
            self.tensors[name] = weight
            if weight.dtype != torch.float32:
                master = self.tensors[name] = nn.Parameter(weight.detach().float())
                weight.register_post_accumulate_grad_hook(partial(_hand_over, master))
                self._rounded.append((weight, master))

    def gradients(self, loss: Tensor) -> Sequence[Tensor | None]:
        """None are left to add: all of them at once would take the memory of the weights."""
        loss.backward()
        return ()

    def add_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Does nothing: the backward pass has added them."""

    @torch.no_grad()
    def sum_gradients(self, phase: str) -> dict[str, float]:
        """An all-reduce for each bucket of gradients; nothing for shards."""
        tensors = list(self.tensors.values())
        if distributed.world_size() == 1 or is_shard(tensors[0]):
            return {}
        metrics: defaultdict[str, float] = defaultdict(float)
        for gradients in _buckets(_gradients_of_any_rank(tensors, phase)):
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            for name, value in distributed.add_up(flat, phase).items():
                metrics[name] += value
            parts = flat.split([gradient.numel() for gradient in gradients])
            for gradient, part in zip(gradients, parts, strict=True):
                gradient.copy_(part.view_as(gradient))
        return dict(metrics)

    @torch.no_grad()
    def write_back(self) -> None:
        """Rounds the weights from their masters."""
        for weight, master in self._rounded:
            weight.copy_(master)


def _hand_over(master: nn.Parameter, weight: Tensor) -> None:
    """Moves a weight's gradient to its master."""
    assert weight.grad is not None
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad += weight.grad
    weight.grad = None


def _gradients_of_any_rank(tensors: Sequence[Tensor], phase: str) -> Iterator[Tensor]:
    """The gradients that some rank has; zeros on ranks where no pass has used the tensor."""
    found = distributed.gather([tensor.grad is not None for tensor in tensors], phase)
    for tensor, is_used in zip(tensors, map(any, zip(*found, strict=True)), strict=True):
        if is_used:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            yield tensor.grad


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of consecutive gradients, each of at most `_BUCKET_BYTES` or a single tensor."""
    bucket: list[Tensor] = []
    num_bytes = 0
    for gradient in gradients:
        if bucket and num_bytes + gradient.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(gradient)
        num_bytes += gradient.nbytes
    if bucket:
        yield bucket


def l2_norm(tensors: Iterable[Tensor]) -> float:
    """Norm of all elements together; of shards, those of all ranks, which all call it.

    Added up in float64: on a CPU float32 loses 4e-5 of it over 2 million elements, and 3e-3 over 40
    million.
    """
    given = list(tensors)
    norms = [torch.linalg.vector_norm(local_part(t), dtype=torch.float64) for t in given]
    norm = torch.stack(norms).norm()
    if not is_shard(given[0]):
        return float(norm)
    square = norm.square()
    distributed.add_up(square, "the norm of sharded tensors")
    return float(square.sqrt())
