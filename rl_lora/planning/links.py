"""How long the GPUs of a job take to exchange numbers: an estimate from the card's figures.

With ring algorithms each of n GPUs sends and receives b (n - 1) / n bytes to gather or to
reduce-scatter b bytes, and twice as many to all-reduce them. Within a node of eight they go over
the card's own links, between nodes over InfiniBand of 400 Gbit/s a GPU, which is assumed.
"""

from __future__ import annotations

import math

from rl_lora.planning.cards import Card
from rl_lora.planning.memory import GPUS_PER_NODE

_REACHED = 0.78  # of the links' figures, as NCCL's bus bandwidth: 350 of 450 GB/s, 40 of 50
_NETWORK_GB_S = 50.0
_LATENCY_S = 20e-6  # of a collective, for each doubling of the GPUs


def gather_s(num_bytes: float, num_ranks: int, card: Card) -> float:
    """Seconds of an all-gather to num_bytes on every GPU, or a reduce-scatter from as many."""
    if num_ranks == 1:
        return 0.0
    peer_gb_s = card.peer_gb_s
    if num_ranks > GPUS_PER_NODE:
        peer_gb_s = min(peer_gb_s, _NETWORK_GB_S)
    sent = num_bytes * (num_ranks - 1) / num_ranks
    return sent / (peer_gb_s * 1e9 * _REACHED) + _LATENCY_S * math.log2(num_ranks)


def all_reduce_s(num_bytes: float, num_ranks: int, card: Card) -> float:
    """Seconds of an all-reduce of num_bytes: a reduce-scatter, then an all-gather."""
    return 2 * gather_s(num_bytes, num_ranks, card)


def broadcast_s(num_bytes: float, num_receivers: int) -> float:
    """Seconds until every receiver has num_bytes of one sender, over the network.

    They are passed along in parts, each while the next one is received.
    """
    sent_s = num_bytes / (_NETWORK_GB_S * 1e9 * _REACHED)
    return sent_s + _LATENCY_S * math.log2(num_receivers + 1)
