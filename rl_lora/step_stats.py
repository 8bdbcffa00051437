"""What the forward passes of one step saw, as metrics: ratios, mismatch, entropy, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rl_lora.losses import k3
from rl_lora.types import Microbatch

_RATIO_QUANTILES = (0.01, 0.5, 0.99)


class StepStats:
    """Completion tokens' log-probs and entropies, collected on the CPU."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._num_clipped = 0
        self._num_tokens = 0
        self._num_padded = 0

    def add(
        self, batch: Microbatch, policy_logprobs_C: Tensor, entropy_C: Tensor, num_clipped: int = 0
    ) -> None:
        """One microbatch's log-probs and entropies, in nats."""
        row = (policy_logprobs_C.detach(), batch.sampler_logprobs_C, entropy_C.detach())
        self._rows.append(tuple(t.float().cpu() for t in row))  # type: ignore[arg-type]
        self._num_clipped += num_clipped
        self._num_tokens += batch.num_tokens
        self._num_padded += batch.token_ids_BT.numel()

    def metrics(self) -> dict[str, float]:
        """Over all completion tokens added.

        ratio/* are policy / sampler, whichever ratio the loss bounds; mismatch/kl is the k3
        estimate of KL(sampler || policy) in nats a token, computed in float64.
        """
        policy_C, sampler_C, entropy_C = (torch.cat(t) for t in zip(*self._rows, strict=True))
        difference_C = policy_C - sampler_C
        ratio_C = difference_C.exp()
        out = {
            "ratio/mean": ratio_C.mean(),
            "ratio/max": ratio_C.max(),
            "mismatch/kl": k3(policy_C.double() - sampler_C.double()).mean(),
            "mismatch/abs_mean": difference_C.abs().mean(),
            "mismatch/abs_max": difference_C.abs().max(),
            "entropy/mean": entropy_C.mean(),
            "clip/fraction": torch.tensor(self._num_clipped / policy_C.numel()),
            "learn/completion_tokens": torch.tensor(policy_C.numel()),
            "learn/tokens": torch.tensor(self._num_tokens),
            "learn/padding_fraction": torch.tensor(1 - self._num_tokens / self._num_padded),
        }
        found = zip(_RATIO_QUANTILES, quantiles(ratio_C, _RATIO_QUANTILES), strict=True)
        return {f"ratio/p{int(level * 100):02d}": value for level, value in found} | {
            name: float(value) for name, value in out.items()
        }


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
