"""What the forward passes of one step saw, as metrics: ratios, mismatch, entropy, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rl_lora import distributed
from rl_lora.losses import k3
from rl_lora.types import Microbatch

_RATIO_QUANTILES = (0.01, 0.5, 0.99)


@dataclass
class PassStats:
    """What one forward and backward pass leaves behind.

    Its tensors stay on the device until the step's last pass has been launched: to read a number
    makes the host wait for the device, and then the device for the host.
    """

    loss: Tensor  # scalar
    logprobs_C: Tensor  # nats, without gradient
    entropy_C: Tensor  # nats
    num_clipped: Tensor | int = 0
    num_masked: Tensor | None = None  # None: there is no mask
    kl: Tensor | None = None  # scalar, nats; None: the loss has no KL term
    gradients: Sequence[Tensor | None] = ()  # that the policy's parameters have yet to get


@dataclass
class _Passes:
    """What one process's passes saw. Letters: C completion tokens, the first update's first."""

    policy_C: np.ndarray  # float32, nats
    sampler_C: np.ndarray  # float32, nats
    entropy_C: np.ndarray  # float32, nats
    num_before: int  # tokens of the first update, whose policy is the sampled version
    counts: tuple[float, float, float]  # clipped tokens, tokens, tokens with padding
    losses: dict[str, float]  # by metric, summed over passes
    num_masked: float | None  # tokens that the mask drops; None: there is no mask


class StepStats:
    """The passes of one step's updates; in a job of several processes each adds its own."""

    def __init__(self) -> None:
        self._batches: list[Microbatch] = []
        self._passes: list[PassStats] = []
        self._num_before = 0

    def add(self, batch: Microbatch, one: PassStats, *, update: int) -> None:
        """One microbatch's pass, of the step's update 0, 1, ...; updates come in order."""
        self._batches.append(batch)
        self._passes.append(one)
        if update == 0:
            self._num_before += one.logprobs_C.numel()

    def metrics(self, num_updates: int = 1) -> dict[str, float]:
        """Over all completion tokens added, on all ranks.

        ratio/* are policy / sampler, whichever ratio the loss bounds; mismatch/* are of the first
        update, mismatch/kl the k3 estimate of KL(sampler || policy) in nats a token, computed in
        float64; loss/* are means over the updates.
        """
        seen = distributed.gather(self._own(), "learning")
        policy_C, sampler_C, entropy_C = (
            _joined(seen, name) for name in ("policy_C", "sampler_C", "entropy_C")
        )
        num_clipped, num_tokens, num_padded = (
            sum(numbers) for numbers in zip(*(one.counts for one in seen), strict=True)
        )
        before = slice(sum(one.num_before for one in seen))
        difference_C = policy_C - sampler_C
        ratio_C = difference_C.exp()
        out = {
            "ratio/mean": ratio_C.mean(),
            "ratio/max": ratio_C.max(),
            "mismatch/kl": k3(policy_C[before].double() - sampler_C[before].double()).mean(),
            "mismatch/abs_mean": difference_C[before].abs().mean(),
            "mismatch/abs_max": difference_C[before].abs().max(),
            "entropy/mean": entropy_C.mean(),
            "clip/fraction": torch.tensor(num_clipped / policy_C.numel()),
            "learn/completion_tokens": torch.tensor(policy_C.numel()),
            "learn/tokens": torch.tensor(num_tokens),
            "learn/padding_fraction": torch.tensor(1 - num_tokens / num_padded),
        }
        if masked := [one.num_masked for one in seen if one.num_masked is not None]:
            out["mask/fraction"] = torch.tensor(sum(masked) / policy_C.numel())
        found = zip(_RATIO_QUANTILES, quantiles(ratio_C, _RATIO_QUANTILES), strict=True)
        losses = {
            name: sum(one.losses[name] for one in seen if name in one.losses) / num_updates
            for name in sorted({name for one in seen for name in one.losses}, reverse=True)
        }
        return (
            {f"ratio/p{int(level * 100):02d}": value for level, value in found}
            | {name: float(value) for name, value in out.items()}
            | losses
        )

    def _own(self) -> _Passes:
        """This process's passes, copied to the host."""
        arrays = {
            "policy_C": [one.logprobs_C for one in self._passes],
            "sampler_C": [batch.sampler_logprobs_C for batch in self._batches],
            "entropy_C": [one.entropy_C for one in self._passes],
        }
        losses = {"loss/policy": [one.loss for one in self._passes]}
        if kls := [one.kl for one in self._passes if one.kl is not None]:
            losses["loss/kl"] = kls
        masked = [one.num_masked for one in self._passes if one.num_masked is not None]
        counts = (
            sum(read_numbers([one.num_clipped for one in self._passes])),
            sum(batch.num_tokens for batch in self._batches),
            sum(batch.token_ids_BT.numel() for batch in self._batches),
        )
        return _Passes(
            **{name: _on_host(parts) for name, parts in arrays.items()},
            num_before=self._num_before,
            counts=counts,
            losses={name: sum(read_numbers(values)) for name, values in losses.items()},
            num_masked=sum(read_numbers(masked)) if masked else None,
        )


def _on_host(parts: Sequence[Tensor]) -> np.ndarray:
    """[C]: the tensors one after the other, as float32 in the CPU's memory."""
    joined = torch.cat(list(parts)).float().cpu() if parts else torch.zeros(0)
    return joined.numpy()


def _joined(seen: Sequence[_Passes], name: str) -> Tensor:
    """[C] of all ranks: the tokens of their first updates, then all others."""
    first = [getattr(one, name)[: one.num_before] for one in seen]
    rest = [getattr(one, name)[one.num_before :] for one in seen]
    return torch.from_numpy(np.concatenate(first + rest))


def read_numbers(scalars: Sequence[Tensor | float]) -> list[float]:
    """Scalars in one copy to the host."""
    if not scalars:
        return []
    return torch.stack([torch.as_tensor(one, dtype=torch.float64) for one in scalars]).tolist()


def quantiles(values: Tensor, levels: Sequence[float]) -> list[float]:
    """Quantiles of a float tensor on the CPU, linearly interpolated in float64.

    As `torch.quantile`, which takes at most 2^24 elements.
    """
    ranks = [level * (values.numel() - 1) for level in levels]
    places = sorted({place for rank in ranks for place in (math.floor(rank), math.ceil(rank))})
    ordered = torch.from_numpy(np.partition(values.numpy().ravel(), places)).double()
    below, above = (ordered[[int(f(rank)) for rank in ranks]] for f in (math.floor, math.ceil))
    fractions = [rank - math.floor(rank) for rank in ranks]
    return below.lerp(above, below.new_tensor(fractions)).tolist()
