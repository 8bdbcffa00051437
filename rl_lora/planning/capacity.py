"""How much a policy can store compared with how much there is to learn, in bits.

'LoRA Without Regret', section on capacity: weights store about 2 bits per parameter (Allen-Zhu and
Li 2024, arXiv 2404.05405); supervised training offers about 1 bit per token of its data set,
however many epochs; policy gradients offer at most about 1 bit per episode (its advantage), and
every episode is new. Orders of magnitude, not thresholds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

BITS_PER_PARAMETER = 2.0
BITS_PER_TOKEN = 1.0  # of supervised data
BITS_PER_EPISODE = 1.0  # of reinforcement learning, at most


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one job offers and what its policy can store.

    Example, rank 1 of Llama-3.1-8B on 10,000 problems x 32 samples: Capacity(unit="episodes",
    num_units=320000, num_parameters=2621440)
    """

    unit: Literal["tokens", "episodes"]  # supervised, or reinforcement learning
    num_units: int
    num_parameters: int  # trainable
    num_fixed: int = 0  # those among them independent of the rank (DoRA's magnitudes)

    @property
    def held_bits(self) -> float:
        """What the trainable parameters can store."""
        return BITS_PER_PARAMETER * self.num_parameters

    @property
    def offered_bits(self) -> float:
        """What the job has to teach: an estimate for tokens, an upper bound for episodes."""
        each = BITS_PER_TOKEN if self.unit == "tokens" else BITS_PER_EPISODE
        return each * self.num_units

    @property
    def is_too_small(self) -> bool:
        """Whether the parameters hold less than is offered."""
        return self.held_bits < self.offered_bits


def rank_that_holds(capacity: Capacity, rank: int, multiple_of: int = 1) -> int:
    """The lowest rank that can store what is offered.

    All parameters but the fixed ones are proportional to the rank.

    Args:
        capacity: at `rank`.
        rank: the adapter's.
        multiple_of: active experts of a mixture, which share a rank.
    """
    fixed_bits = BITS_PER_PARAMETER * capacity.num_fixed
    share = (capacity.offered_bits - fixed_bits) / (capacity.held_bits - fixed_bits)
    least = math.ceil(rank * share)
    return multiple_of * math.ceil(least / multiple_of)


def capacity_line(capacity: Capacity) -> str:
    """`holds about 5.24 M bits; offered at most 320 k bits (320,000 episodes): 16.4 times less`."""
    ratio = capacity.offered_bits / capacity.held_bits if capacity.held_bits else math.inf
    share = f"{1 / ratio:.3g} times less" if 0 < ratio <= 1 else f"{ratio:.3g} times more"
    share = "nothing" if ratio == 0 else share
    bound = "about" if capacity.unit == "tokens" else "at most"
    return (
        f"holds about {bits_text(capacity.held_bits)}; offered {bound} "
        f"{bits_text(capacity.offered_bits)} ({capacity.num_units:,} {capacity.unit}): {share}"
    )


def capacity_warning(capacity: Capacity, rank: int | None, multiple_of: int = 1) -> str | None:
    """One line if the policy is too small for its job, else None; rank None: all weights."""
    if not capacity.is_too_small:
        return None
    who = "all weights together hold" if rank is None else f"rank {rank} holds"
    text = (
        f"{who} about {bits_text(capacity.held_bits)}, less than the "
        f"{bits_text(capacity.offered_bits)} that {capacity.num_units:,} {capacity.unit} may "
        "carry"
    )
    if rank is None:
        return text
    least = rank_that_holds(capacity, rank, multiple_of)
    return (
        f"{text}: learning may be slower than with full fine-tuning; lora.rank={least} or more "
        "would hold them"
    )


def bits_text(bits: float) -> str:
    """5.2 M bits."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if bits >= size:
            return f"{bits / size:.3g} {unit} bits"
    return f"{bits:.3g} bits"
