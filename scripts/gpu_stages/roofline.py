"""The learner's roofline: the tokens per second that a card's matmul and memory speeds allow.

The times of matmuls, of the bytes that everything else moves, of attention and of lm_head are added
up, as they run one after the other. Small models are bound by memory, so that a share of this bound
says more than a share of the matmul peak (MFU).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Elements that one token's forward and backward pass reads and writes in a layer besides weights,
# per unit of hidden size, query width, key width and MLP width, with elementwise operations fused:
# both norms with their residual sums, each product's input and output, its low-rank term, rotary
# embedding, two attention calls with their merge, SwiGLU, and the gradient of each.
_HIDDEN, _QUERY, _KEY, _MLP = 65, 36, 26, 29
_HEAD_PASSES = 6  # over the logits
# What kernels reach of the measured matmul peak, on an H100: products of these sizes, and
# FlashAttention forward and backward.
_MATMUL, _ATTENTION, _ATTENTION_BACKWARD, _LOW_RANK = 0.82, 0.44, 0.38, 0.2


@dataclass(frozen=True, slots=True)
class Card:
    """What a device reaches.

    Example, an H100 in bfloat16: Card(matmul_flops=795e12, bytes_per_s=3.0e12)
    """

    matmul_flops: float  # FLOP/s of a large square product
    bytes_per_s: float  # read and written by a large copy


@dataclass(frozen=True, slots=True)
class Work:
    """What a token of a step needs.

    Example: Work(keys=1000, scored=0.8, rank=1, itemsize=2)
    """

    keys: float  # attended to, on average
    scored: float = 1.0  # share of the tokens that pass lm_head: the completions'
    rank: int = 1
    itemsize: int = 2  # bytes of an element


def widths(config: Any) -> tuple[int, int, int, int]:
    """Hidden size, and the widths of all query heads, of all key heads and of the MLP."""
    return (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
        config.intermediate_size,
    )


def layer_weights(config: Any) -> int:
    """Weights of a layer's linear layers (gated MLP)."""
    hidden, query, key, mlp = widths(config)
    return 2 * hidden * (query + key) + 3 * hidden * mlp


def needed_flops_per_token(config: Any, work: Work) -> float:
    """4 per weight (the base's weights get no gradient), 12 per query dimension and key; lm_head
    for scored tokens; neither recomputation nor low-rank terms."""
    _, query, _, _ = widths(config)
    layers = config.num_hidden_layers * (4 * layer_weights(config) + 12 * query * work.keys)
    return float(layers + 4 * work.scored * config.hidden_size * config.vocab_size)


def seconds_per_token(config: Any, card: Card, work: Work) -> float:
    """The bound, as the time of one token's forward and backward pass."""
    hidden, query, key, mlp = widths(config)
    low_rank = 6 * work.rank * (8 * hidden + 2 * query + 2 * key + 3 * mlp)
    moved = _HIDDEN * hidden + _QUERY * query + _KEY * key + _MLP * mlp
    one_matmul = 2 * query * work.keys  # of attention
    layer = (
        4 * layer_weights(config) / (_MATMUL * card.matmul_flops)
        + low_rank / (_LOW_RANK * card.matmul_flops)
        + moved * work.itemsize / card.bytes_per_s
        + 2 * one_matmul / (_ATTENTION * card.matmul_flops)
        + 5 * one_matmul / (_ATTENTION_BACKWARD * card.matmul_flops)
    )
    head = 4 * hidden * config.vocab_size / (_MATMUL * card.matmul_flops)
    head += _HEAD_PASSES * config.vocab_size * work.itemsize / card.bytes_per_s
    return float(config.num_hidden_layers * layer + work.scored * head)
