"""How long a step takes on a GPU: an estimate from the card's figures and the model's shape.

Work takes as long as its products at the rate that large ones reach, or as its bytes at the
memory's bandwidth, whichever is longer, and no phase overlaps another. The constants below say what
is assumed. vLLM with an adapter has not been measured on a GPU yet, nor has a job on several GPUs.

On several GPUs each phase lasts as long as on the GPU with the largest share of it. So the longest
completion bounds sampling from below, on any number of them. What the processes exchange besides
gradients and shares of a sharded model (token ids, log-probs and scores, some MB) takes no time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from rl_lora.config import RunConfig
from rl_lora.models.shapes import attention_widths, kv_bytes_per_token, mlp_width
from rl_lora.planning.cards import Card
from rl_lora.planning.counts import ParameterCounts
from rl_lora.planning.links import all_reduce_s, gather_s
from rl_lora.planning.memory import MICROBATCH_TOKENS, shards
from rl_lora.samplers.vllm.settings import GPU_NUM_SEQS

_BYTES = 2  # of a bfloat16 number
_GRADIENT_BYTES = 4
# Shares of the data sheet's figures. Measured on an H100: 795 of 989 TFLOP/s for large square
# products, 3.0 of 3.35 TB/s. Models' shapes reach less than square ones.
_PRODUCTS = 0.66
_BANDWIDTH = 0.9
_ATTENTION_FORWARD, _ATTENTION_BACKWARD = 0.35, 0.3  # of the peak, for flash attention
_LINK = 0.8
_LEARNER = 0.6  # of its roofline that the learner reaches; 0.75 is the goal
_ENGINE_STEP_S = 1.5e-3  # scheduler, sampler and launches of one decoding step
_LORA_LAYER_S = 24e-6  # 8 small kernels a layer and decoding step
# Lengths are exponential, cut at sampling.max_tokens; uncut, their mean would be this share of it.
_MEAN_SHARE = 0.4
_PROMPT_TOKENS = 256  # a prompt, unless data.max_prompt_tokens is lower
_EULER = 0.577  # the longest of n exponential lengths is about (log n + this) times the mean
_POINTS = 200  # of the integral over a batch that dies out


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


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated seconds of one step, and what they were computed for.

    Example: StepTime(sample_s=540.0, learn_s=390.0, switch_s=0.8, mean_tokens=3008.0,
    num_at_once=240, learner_tokens_s=8100.0, longest_s=51.0, all_reduce_s=0.0, all_reduce_bytes=0)
    """

    sample_s: float
    learn_s: float
    switch_s: float  # the engine falls asleep and wakes
    mean_tokens: float  # of a completion
    num_at_once: int  # sequences decoded together by one engine
    learner_tokens_s: float  # completion tokens a second of learning, on all GPUs together
    longest_s: float  # sampling with any number of GPUs: the longest completion by itself
    all_reduce_s: float  # the gradients of all ranks are added up
    all_reduce_bytes: int  # of one rank's gradients

    @property
    def total_s(self) -> float:
        """Of the whole step, one phase after the other."""
        return self.sample_s + self.learn_s + self.all_reduce_s + self.switch_s


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


def step_time(
    config: RunConfig,
    model_config: PretrainedConfig,
    counts: ParameterCounts,
    cache_bytes: int,
    card: Card,
    num_ranks: int = 1,
) -> StepTime:
    """A step's estimate.

    Args:
        config: the job.
        model_config: its model's config.json.
        counts: its parameters.
        cache_bytes: of the KV cache of one engine.
        card: each of its GPUs.
        num_ranks: their number.
    """
    kv_bytes = kv_bytes_per_token(model_config, torch.bfloat16)
    work = _Work(config, shape_of(model_config), counts, kv_bytes, card, num_ranks)
    at_once = work.num_at_once(cache_bytes)
    learn_s = work.learn_s()
    is_full = config.lora.mode == "full"
    is_reduced = num_ranks > 1 and not (is_full and shards(config, num_ranks) > 1)
    reduced = _GRADIENT_BYTES * counts.trainable * is_reduced
    in_step = config.sampling.num_prompts * config.sampling.num_samples
    return StepTime(
        sample_s=work.sample_s(at_once),
        learn_s=learn_s,
        switch_s=2 * counts.base * _BYTES / (card.link_gb_s * 1e9 * _LINK),
        mean_tokens=work.mean_tokens,
        num_at_once=at_once,
        learner_tokens_s=in_step * work.mean_tokens / learn_s,
        longest_s=work.longest_s(),
        all_reduce_s=is_reduced * config.optim.num_updates * all_reduce_s(reduced, num_ranks, card),
        all_reduce_bytes=reduced,
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """A step's work, and the GPUs that share it."""

    config: RunConfig
    shape: Shape
    counts: ParameterCounts
    kv_bytes: int  # of a token
    card: Card
    num_ranks: int

    @property
    def prompt_tokens(self) -> int:
        return min(_PROMPT_TOKENS, self.config.data.max_prompt_tokens)

    @property
    def scale(self) -> float:
        """Mean tokens of a completion if none was cut."""
        return _MEAN_SHARE * self.config.sampling.max_tokens

    @property
    def mean_tokens(self) -> float:
        return self.scale * (1 - math.exp(-1 / _MEAN_SHARE))

    @property
    def num_prompts(self) -> int:
        """Of the rank with most of them."""
        return math.ceil(self.config.sampling.num_prompts / self.num_ranks)

    def longest_tokens(self, num_sequences: int) -> float:
        longest = self.scale * (math.log(num_sequences) + _EULER)
        return min(self.config.sampling.max_tokens, longest)

    def decode_s(self, batch: float, context: float) -> float:
        """One token for each sequence of a batch."""
        is_adapted = self.config.lora.mode == "lora"
        launches_s = _ENGINE_STEP_S + is_adapted * self.shape.layers * _LORA_LAYER_S
        moved = _weight_bytes(self.shape, self.counts, batch) + batch * context * self.kv_bytes
        products_s = 2 * batch * self.counts.active / _rate(self.card)
        return launches_s + max(moved / _bandwidth(self.card), products_s)

    def num_at_once(self, cache_bytes: int) -> int:
        """Sequences that one engine decodes together."""
        sampling = self.config.sampling
        # A running sequence has about the mean length, and shares its prompt's blocks with its
        # group.
        tokens = self.mean_tokens + self.prompt_tokens / sampling.num_samples
        fitting = int(cache_bytes / (self.kv_bytes * tokens))
        num = self.num_prompts * sampling.num_samples
        return max(1, min(num, sampling.max_num_seqs or GPU_NUM_SEQS, fitting))

    def sample_s(self, at_once: int) -> float:
        sampling, prompt, mean = self.config.sampling, self.prompt_tokens, self.mean_tokens
        num = self.num_prompts * sampling.num_samples
        prefill_s = 2 * self.counts.active * self.num_prompts * prompt / _rate(self.card)
        queued_s = (num - at_once) * mean / at_once * self.decode_s(at_once, prompt + mean)
        # Nothing is left to start: sequences end one after the other, the longest of all ranks
        # last.
        in_step = sampling.num_prompts * sampling.num_samples
        width = self.longest_tokens(min(at_once * self.num_ranks, in_step)) / _POINTS
        ages = [(point + 0.5) * width for point in range(_POINTS)]
        last_s = sum(
            width * self.decode_s(max(1.0, at_once * math.exp(-age / self.scale)), prompt + age)
            for age in ages
        )
        return prefill_s + queued_s + last_s

    def longest_s(self) -> float:
        """The step's longest completion, decoded by itself."""
        sampling = self.config.sampling
        tokens = self.longest_tokens(sampling.num_prompts * sampling.num_samples)
        return tokens * self.decode_s(1, self.prompt_tokens + tokens / 2)

    def learn_s(self) -> float:
        """Of the rank with most microbatches.

        Of a sharded model, each microbatch gathers the layers forward and backward, while the
        layers before them are computed; full fine-tuning adds up their gradients as well.
        """
        config, num_ranks = self.config, self.num_ranks
        num_completion = (
            config.sampling.num_prompts * config.sampling.num_samples * self.mean_tokens
        )
        num_tokens = num_completion + config.sampling.num_prompts * self.prompt_tokens
        context = self.prompt_tokens + self.mean_tokens
        layers_s, head_s = learner_token_s(config, self.shape, self.card, context)
        one_gpu_s = (num_tokens * layers_s + num_completion * head_s) / _LEARNER
        limit = config.optim.microbatch_tokens or MICROBATCH_TOKENS["cuda"]
        least = num_ranks * config.optim.num_updates  # so that every rank has one of each update
        num_microbatches = max(least, math.ceil(num_tokens / max(limit, context)))
        largest = math.ceil(num_microbatches / num_ranks)
        computed_s = one_gpu_s * largest / num_microbatches
        if shards(config, num_ranks) == 1:
            return computed_s
        moved_s = 2 * gather_s(_BYTES * self.counts.base, num_ranks, self.card)
        if config.lora.mode == "full":
            moved_s += gather_s(_GRADIENT_BYTES * self.counts.base, num_ranks, self.card)
        return max(computed_s, largest * moved_s)


def learner_token_s(
    config: RunConfig, shape: Shape, card: Card, context: float
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
    element_s, bandwidth, rate = _BYTES / _bandwidth(card), _bandwidth(card), _rate(card)
    linear_s = max(2 * shape.layer_weights / rate, (inputs + outputs) * element_s)
    forward = 8 * d + 4 * q + 4 * v + 3 * m + (0 if is_full else inputs + 2 * outputs)
    backward = 17 * d + 8 * q + 6 * v + 5 * m + (0 if is_full else 3 * inputs + 2 * outputs)
    peak = card.tflops * 1e12
    forward_s = linear_s + forward * element_s + 4 * q * context / (_ATTENTION_FORWARD * peak)
    backward_s = (1 + is_full) * linear_s + backward * element_s
    backward_s += 10 * q * context / (_ATTENTION_BACKWARD * peak)
    layer_s = (1 + config.optim.checkpoint_activations) * forward_s + backward_s
    head_s = (4 + 2 * is_full) * d * shape.vocabulary / rate
    return shape.layers * layer_s, head_s + 5 * _BYTES * shape.vocabulary / bandwidth


def _weight_bytes(shape: Shape, counts: ParameterCounts, batch: float) -> float:
    """Weights that one decoding step reads: of a mixture, the experts that any token goes to."""
    if shape.num_experts == 1:
        return counts.base * _BYTES
    idle = 1 - shape.num_active / shape.num_experts  # share of the experts, for one token
    expert_bytes = (counts.base - counts.active) * _BYTES / idle
    return counts.base * _BYTES - expert_bytes * idle**batch


def _rate(card: Card) -> float:
    return card.tflops * 1e12 * _PRODUCTS


def _bandwidth(card: Card) -> float:
    return card.terabytes_s * 1e12 * _BANDWIDTH
