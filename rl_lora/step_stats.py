"""What the forward passes of one step saw, as metrics: ratios, mismatch, entropy, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    kl: Tensor | None = None  # scalar, nats; None: the loss has no KL term
    gradients: Sequence[Tensor | None] = ()  # that the policy's parameters have yet to get


class StepStats:
    """The passes of one step's updates."""

    def __init__(self) -> None:
        self._batches: list[Microbatch] = []
        self._passes: list[PassStats] = []
        self._num_updates = 0
        self._before = slice(0)  # tokens of the first update, whose policy is the sampled version

    def add(self, batch: Microbatch, one: PassStats, *, update: int) -> None:
        """One microbatch's pass, of the step's update 0, 1, ...; updates come in order."""
        self._batches.append(batch)
        self._passes.append(one)
        self._num_updates = update + 1
        if update == 0:
            self._before = slice(self._before.stop + one.logprobs_C.numel())

    def metrics(self) -> dict[str, float]:
        """Over all completion tokens added.

        ratio/* are policy / sampler, whichever ratio the loss bounds; mismatch/* are of the first
        update, mismatch/kl the k3 estimate of KL(sampler || policy) in nats a token, computed in
        float64; loss/* are means over the updates.
        """
        policy_C = torch.cat([one.logprobs_C for one in self._passes]).float().cpu()
        entropy_C = torch.cat([one.entropy_C for one in self._passes]).float().cpu()
        sampler_C = torch.cat([batch.sampler_logprobs_C for batch in self._batches]).float().cpu()
        num_clipped = sum(read_numbers([one.num_clipped for one in self._passes]))
        num_tokens = sum(batch.num_tokens for batch in self._batches)
        num_padded = sum(batch.token_ids_BT.numel() for batch in self._batches)
        before, difference_C = self._before, policy_C - sampler_C
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
        found = zip(_RATIO_QUANTILES, quantiles(ratio_C, _RATIO_QUANTILES), strict=True)
        losses = {"loss/policy": [one.loss for one in self._passes]}
        if kls := [one.kl for one in self._passes if one.kl is not None]:
            losses["loss/kl"] = kls
        return (
            {f"ratio/p{int(level * 100):02d}": value for level, value in found}
            | {name: float(value) for name, value in out.items()}
            | {name: sum(read_numbers(v)) / self._num_updates for name, v in losses.items()}
        )


def read_numbers(scalars: Sequence[Tensor | float]) -> list[float]:
    """Scalars in one copy to the host."""
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
