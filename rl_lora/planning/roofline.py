"""What a token costs at least: a decoder's products and bytes, and what a machine reaches."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from rl_lora.config import RunConfig
from rl_lora.models.shapes import attention_widths, mlp_width
from rl_lora.planning.cards import Card
from rl_lora.planning.counts import ParameterCounts


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What an estimate takes for granted; another machine than a GPU has others.

    Of the data sheet's figures an H100 was measured to reach 795 of 989 TFLOP/s for large square
    products and 3.0 of 3.35 TB/s. Models' shapes reach less than square ones.
    """

    products: float = 0.66  # share of the data sheet's figure
    bandwidth: float = 0.9
    attention_forward: float = 0.35  # of the peak, for flash attention
    attention_backward: float = 0.3
    link: float = 0.8
    # Of its roofline that the learner reaches. On an H200 it was 0.65 (135M) to 0.91 (8B).
    learner: float = 0.75
    engine_step_s: float = 1.5e-3  # sampler and launches of one decoding step
    # Python that schedules a sequence and reads its token, while the GPU computes the next one.
    # Measured on a server's processor, with 16 to 512 sequences; a slow one took 55e-6.
    engine_sequence_s: float = 25e-6
    lora_layer_s: float = 24e-6  # 8 small kernels a layer and decoding step
    hand_over_s: float = 0.05  # of one version, without its bytes; 0.042 measured on a CPU
    # Lengths are exponential, cut at sampling.max_tokens; uncut, their mean is this share of it.
    mean_share: float = 0.4
    prompt_tokens: int = 256  # a prompt, unless data.max_prompt_tokens is lower
    number_bytes: int = 2  # bfloat16

    def rate(self, card: Card) -> float:
        """Products a second."""
        return card.tflops * 1e12 * self.products

    def bytes_s(self, card: Card) -> float:
        """Bytes of the card's memory a second."""
        return card.terabytes_s * 1e12 * self.bandwidth


GPU = Assumptions()


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder's sizes.

    Example, Qwen3-8B: Shape(hidden=4096, query=4096, key=1024, mlp=12288, layers=36,
    vocabulary=151936)
    """

    hidden: int
    query: int  # all query heads together
    key: int  # all key heads together
    mlp: int  # of one expert, in a mixture
    layers: int
    vocabulary: int
    num_active: int = 1  # experts per token
    num_experts: int = 1

    @property
    def layer_weights(self) -> int:
        """Weights of one layer that a token is multiplied with."""
        return sum(count * i * o for i, o, count in self.linears())

    def linears(self) -> list[tuple[int, int, int]]:
        """(inputs, outputs, how often a token passes one) of a layer's linear layers."""
        d, q, kv, f, k = self.hidden, self.query, self.key, self.mlp, self.num_active
        return [(d, q, 1), (d, kv, 2), (q, d, 1), (d, f, 2 * k), (f, d, k)]


def shape_of(config: PretrainedConfig) -> Shape:
    """The sizes in a model's config.json."""
    text = config.get_text_config()
    query, key = attention_widths(text)
    num_active = getattr(text, "num_experts_per_tok", None) or 1
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    return Shape(
        hidden=text.hidden_size,
        query=query,
        key=key,
        mlp=mlp_width(text),
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        num_active=num_active,
        num_experts=experts,
    )


def learner_token_s(
    config: RunConfig, shape: Shape, card: Card, context: float, assumed: Assumptions = GPU
) -> tuple[float, float]:
    """The roofline of forward and backward: seconds a token of all layers, and of the output layer.

    Elements that a layer reads and writes for a token, where the compiler joins what is elementwise
    (d hidden, q queries, v keys, m the MLP's width; i inputs and o outputs of a linear layer):

        norms, residuals          forward 8 d         backward 17 d (with sums over branches)
        rotation                  forward 2 q + 2 v   backward 2 q + 2 v
        attention                 forward 2 q + 2 v   backward 6 q + 4 v
        SwiGLU                    forward 3 m         backward 5 m
        adapter of a linear one   forward i + 2 o     backward 3 i + 2 o

    A linear layer itself moves i + o each way, or multiplies, whichever takes longer; backward only
    for its input, unless its weights are trained. The output layer moves its logits 5 times.
    """
    is_full = config.lora.mode == "full"
    d, q, v, m = shape.hidden, shape.query, shape.key, shape.mlp * shape.num_active
    inputs = sum(i * count for i, _, count in shape.linears())
    outputs = sum(o * count for _, o, count in shape.linears())
    element_s, rate = assumed.number_bytes / assumed.bytes_s(card), assumed.rate(card)
    linear_s = max(2 * shape.layer_weights / rate, (inputs + outputs) * element_s)
    forward = 8 * d + 4 * q + 4 * v + 3 * m + (0 if is_full else inputs + 2 * outputs)
    backward = 17 * d + 8 * q + 6 * v + 5 * m + (0 if is_full else 3 * inputs + 2 * outputs)
    peak = card.tflops * 1e12
    forward_s = (
        linear_s + forward * element_s + 4 * q * context / (assumed.attention_forward * peak)
    )
    backward_s = (1 + is_full) * linear_s + backward * element_s
    backward_s += 10 * q * context / (assumed.attention_backward * peak)
    layer_s = (1 + config.optim.checkpoint_activations) * forward_s + backward_s
    head_s = (4 + 2 * is_full) * d * shape.vocabulary / rate
    return shape.layers * layer_s, head_s + 5 * element_s * shape.vocabulary


def weights_read(shape: Shape, counts: ParameterCounts, batch: float) -> float:
    """Weights that one decoding step reads: of a mixture, the experts that any token goes to."""
    if shape.num_experts == 1:
        return counts.base
    idle = 1 - shape.num_active / shape.num_experts  # share of the experts, for one token
    experts = (counts.base - counts.active) / idle
    return counts.base - experts * idle**batch
