"""How long a step takes on a GPU: an estimate from the card's figures and the model's shape.

Work takes as long as its products at the rate that large ones reach, or as its bytes at the
memory's bandwidth, whichever is longer, and no phase overlaps another. `roofline.Assumptions` says
what is assumed. A whole step has not been measured on a GPU yet, nor has a job on several GPUs.
tests/planning/test_published.py compares the estimates with published figures.

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
from rl_lora.config.dynamic import round_size
from rl_lora.models.shapes import kv_bytes_per_token
from rl_lora.planning.cards import Card
from rl_lora.planning.counts import ParameterCounts
from rl_lora.planning.links import all_reduce_s, gather_s
from rl_lora.planning.memory import default_tokens, shards
from rl_lora.planning.roofline import (
    GPU,
    Assumptions,
    Shape,
    learner_token_s,
    shape_of,
    weights_read,
)
from rl_lora.samplers.vllm.settings import GPU_NUM_SEQS

_GRADIENT_BYTES = 4
_EULER = 0.577  # the longest of n exponential lengths is about (log n + this) times the mean
_POINTS = 200  # of the integral over a batch that dies out


@dataclass(frozen=True, slots=True)
class DecodeTime:
    """Seconds in which each sequence of a batch gets one token."""

    launches_s: float
    bytes_s: float  # weights and KV cache are read
    products_s: float
    host_s: float  # the engine's work for each sequence

    @property
    def total_s(self) -> float:
        """Bytes are read while products are computed, and the host prepares the next step."""
        return self.launches_s + max(self.bytes_s, self.products_s, self.host_s)


@dataclass(frozen=True, slots=True)
class SampleTime:
    """Seconds of sampling, by what they are spent on. They add up.

    Example: SampleTime(prefill_s=1.0, launches_s=12.0, bandwidth_s=80.5, products_s=0.0,
    host_s=0.0, tail_s=32.0)
    """

    prefill_s: float
    # Decoding while at least half of the engine's sequences run.
    launches_s: float
    bandwidth_s: float
    products_s: float
    host_s: float
    tail_s: float  # decoding while fewer run: the long tail

    @property
    def total_s(self) -> float:
        """Of all parts."""
        decode_s = self.launches_s + self.bandwidth_s + self.products_s + self.host_s
        return self.prefill_s + decode_s + self.tail_s


@dataclass(frozen=True, slots=True)
class StepTime:
    """Estimated seconds of one step, and what they were computed for.

    Example: StepTime(sampling=SampleTime(...), learn_s=390.0, switch_s=0.8, hand_over_s=0.05,
    mean_tokens=3008.0, num_at_once=240, learner_tokens_s=8100.0, learner_mfu=0.33, longest_s=51.0,
    all_reduce_s=0.0, all_reduce_bytes=0)
    """

    sampling: SampleTime
    learn_s: float
    switch_s: float  # the engine falls asleep and wakes
    hand_over_s: float  # the new version's way from the learner to the engine
    mean_tokens: float  # of a completion
    num_at_once: int  # sequences decoded together by one engine
    learner_tokens_s: float  # completion tokens a second of learning, on all GPUs together
    learner_mfu: float  # share of the peak, counting needed products only
    longest_s: float  # sampling with any number of GPUs: the longest completion by itself
    all_reduce_s: float  # the gradients of all ranks are added up
    all_reduce_bytes: int  # of one rank's gradients

    @property
    def sample_s(self) -> float:
        """Of sampling."""
        return self.sampling.total_s

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, which follow one another."""
        parts = self.sampling
        return {
            "prefill": parts.prefill_s,
            "decoding, launches": parts.launches_s,
            "decoding, bound by bandwidth": parts.bandwidth_s,
            "decoding, bound by compute": parts.products_s,
            "decoding, bound by the host": parts.host_s,
            "long tail": parts.tail_s,
            "learning": self.learn_s,
            "all-reduce": self.all_reduce_s,
            "hand-over": self.hand_over_s,
            "sleep and wake": self.switch_s,
        }

    @property
    def total_s(self) -> float:
        """Of the whole step, one phase after the other."""
        return sum(self.phases.values())

    @property
    def bottleneck(self) -> str:
        """The longest phase."""
        return max(self.phases, key=lambda name: self.phases[name])


# limits: what is estimated, where it runs, and what is assumed
def step_time(
    config: RunConfig,
    model_config: PretrainedConfig,
    counts: ParameterCounts,
    cache_bytes: int,
    card: Card,
    num_ranks: int = 1,
    assumed: Assumptions = GPU,
) -> StepTime:
    """A step's estimate.

    Args:
        config: the job.
        model_config: its model's config.json.
        counts: its parameters.
        cache_bytes: of the KV cache of one engine.
        card: each of its GPUs.
        num_ranks: their number.
        assumed: what is not in the arguments above.
    """
    work = step_work(config, model_config, counts, card, num_ranks, assumed)
    at_once = work.num_at_once(cache_bytes)
    learn_s = work.learn_s()
    in_step = config.sampling.num_prompts * config.sampling.num_samples
    passes = 6 if config.lora.mode == "full" else 4  # FLOP a weight and token
    tokens = in_step * work.mean_tokens + config.sampling.num_prompts * work.prompt_tokens
    peak_s = passes * counts.active * tokens / (num_ranks * card.tflops * 1e12)
    return StepTime(
        sampling=work.sampling(at_once),
        learn_s=learn_s,
        switch_s=work.switch_s(),
        hand_over_s=work.hand_over_s(),
        mean_tokens=work.mean_tokens,
        num_at_once=at_once,
        learner_tokens_s=in_step * work.mean_tokens / learn_s,
        learner_mfu=peak_s / learn_s,
        longest_s=work.longest_s(),
        all_reduce_s=work.all_reduce_s(),
        all_reduce_bytes=work.all_reduce_bytes,
    )


# limits: what is estimated, where it runs, and what is assumed
def step_work(
    config: RunConfig,
    model_config: PretrainedConfig,
    counts: ParameterCounts,
    card: Card,
    num_ranks: int = 1,
    assumed: Assumptions = GPU,
) -> StepWork:
    """A step's work. Arguments as for `step_time`."""
    dtype = torch.bfloat16 if assumed.number_bytes == 2 else torch.float32
    kv_bytes = kv_bytes_per_token(model_config, dtype)
    return StepWork(config, shape_of(model_config), counts, kv_bytes, card, num_ranks, assumed)


@dataclass(frozen=True, slots=True)
class StepWork:
    """A step's work, and the GPUs that share it."""

    config: RunConfig
    shape: Shape
    counts: ParameterCounts
    kv_bytes: int  # of a token
    card: Card
    num_ranks: int
    assumed: Assumptions = GPU

    @property
    def prompt_tokens(self) -> int:
        """Of a prompt."""
        return min(self.assumed.prompt_tokens, self.config.data.max_prompt_tokens)

    @property
    def scale(self) -> float:
        """Mean tokens of a completion if none was cut."""
        return self.assumed.mean_share * self.config.sampling.max_tokens

    @property
    def mean_tokens(self) -> float:
        """Mean tokens of a completion."""
        return self.scale * (1 - math.exp(-1 / self.assumed.mean_share))

    @property
    def num_prompts(self) -> int:
        """That the rank with most of them samples in a step's first round."""
        return math.ceil(round_size(self.config.sampling) / self.num_ranks)

    @property
    def is_reduced(self) -> bool:
        """Whether gradients are added up apart from the passes."""
        is_full = self.config.lora.mode == "full"
        return self.num_ranks > 1 and not (is_full and shards(self.config, self.num_ranks) > 1)

    @property
    def all_reduce_bytes(self) -> int:
        """Gradients of one rank."""
        return _GRADIENT_BYTES * self.counts.trainable * self.is_reduced

    def all_reduce_s(self) -> float:
        """Gradients are added up once an update."""
        seconds = all_reduce_s(self.all_reduce_bytes, self.num_ranks, self.card)
        return self.is_reduced * self.config.optim.num_updates * seconds

    @property
    def version_bytes(self) -> int:
        """What an engine gets after each step: a float32 adapter, or all weights."""
        if self.config.lora.mode == "full":
            return self.assumed.number_bytes * self.counts.base
        return 4 * self.counts.trainable

    def hand_over_s(self) -> float:
        """A version goes to the host's memory and from there to the engine."""
        return self.assumed.hand_over_s + self._there_and_back_s(self.version_bytes)

    def switch_s(self) -> float:
        """The engine falls asleep, its weights in the host's memory, and wakes."""
        return self._there_and_back_s(self.assumed.number_bytes * self.counts.base)

    def _there_and_back_s(self, num_bytes: int) -> float:
        """From the card to the host's memory, and from there to a card."""
        return 2 * num_bytes / (self.card.link_gb_s * 1e9 * self.assumed.link)

    def longest_tokens(self, num_sequences: int) -> float:
        """Of the longest among so many completions."""
        longest = self.scale * (math.log(num_sequences) + _EULER)
        return min(self.config.sampling.max_tokens, longest)

    def decode(self, batch: float, context: float) -> DecodeTime:
        """One token for each sequence of a batch."""
        assumed, is_adapted = self.assumed, self.config.lora.mode == "lora"
        weight_bytes = assumed.number_bytes * weights_read(self.shape, self.counts, batch)
        moved = weight_bytes + batch * context * self.kv_bytes
        return DecodeTime(
            assumed.engine_step_s + is_adapted * self.shape.layers * assumed.lora_layer_s,
            moved / assumed.bytes_s(self.card),
            2 * batch * self.counts.active / assumed.rate(self.card),
            batch * assumed.engine_sequence_s,
        )

    def num_at_once(self, cache_bytes: int) -> int:
        """Sequences of the step that one engine decodes together."""
        num = self.num_prompts * self.config.sampling.num_samples
        return max(1, min(num, self.num_slots(cache_bytes)))

    def num_slots(self, cache_bytes: int) -> int:
        """Sequences that one engine can decode together."""
        sampling = self.config.sampling
        # A running sequence has about the mean length, and shares its prompt's blocks with its
        # group.
        tokens = self.mean_tokens + self.prompt_tokens / sampling.num_samples
        fitting = int(cache_bytes / (self.kv_bytes * tokens))
        return max(1, min(sampling.max_num_seqs or GPU_NUM_SEQS, fitting))

    def prefill_s(self, num_prompts: float) -> float:
        """The prompts of an engine; a group's samples share its prompt's."""
        products = 2 * self.counts.active * num_prompts * self.prompt_tokens
        return products / self.assumed.rate(self.card)

    def sampling(self, at_once: int) -> SampleTime:
        """Of the rank with most prompts, whose engine decodes at_once sequences together."""
        sampling, prompt, mean = self.config.sampling, self.prompt_tokens, self.mean_tokens
        num = self.num_prompts * sampling.num_samples
        # (tokens of every sequence, sequences, context): first the queue, at full batch; then
        # nothing is left to start and sequences end one after the other, the longest of all ranks
        # last.
        in_step = round_size(sampling) * sampling.num_samples
        width = self.longest_tokens(min(at_once * self.num_ranks, in_step)) / _POINTS
        ages = [(point + 0.5) * width for point in range(_POINTS)]
        stretches = [((num - at_once) * mean / at_once, float(at_once), prompt + mean)]
        stretches += [
            (width, max(1.0, at_once * math.exp(-age / self.scale)), prompt + age) for age in ages
        ]
        launches_s = bandwidth_s = products_s = host_s = tail_s = 0.0
        for tokens, batch, context in stretches:
            time = self.decode(batch, context)
            if batch < at_once / 2:
                tail_s += tokens * time.total_s
                continue
            launches_s += tokens * time.launches_s
            longest_s = max(time.bytes_s, time.products_s, time.host_s)
            if longest_s == time.bytes_s:
                bandwidth_s += tokens * longest_s
            elif longest_s == time.products_s:
                products_s += tokens * longest_s
            else:
                host_s += tokens * longest_s
        prefill_s = self.prefill_s(self.num_prompts)
        return SampleTime(prefill_s, launches_s, bandwidth_s, products_s, host_s, tail_s)

    def longest_s(self) -> float:
        """The step's longest completion, decoded by itself."""
        sampling = self.config.sampling
        tokens = self.longest_tokens(round_size(sampling) * sampling.num_samples)
        return tokens * self.decode(1, self.prompt_tokens + tokens / 2).total_s

    def learn_s(self) -> float:
        """All ranks have as many tokens, and as many microbatches.

        Of a sharded model, each microbatch gathers the layers forward and backward, while the
        layers before them are computed; full fine-tuning adds up their gradients as well.
        """
        config, num_ranks, card = self.config, self.num_ranks, self.card
        num_completion = (
            config.sampling.num_prompts * config.sampling.num_samples * self.mean_tokens
        )
        num_tokens = num_completion + config.sampling.num_prompts * self.prompt_tokens
        context = self.prompt_tokens + self.mean_tokens
        layers_s, head_s = learner_token_s(config, self.shape, card, context, self.assumed)
        one_gpu_s = (num_tokens * layers_s + num_completion * head_s) / self.assumed.learner
        computed_s = one_gpu_s / num_ranks
        if shards(config, num_ranks) == 1:
            return computed_s
        moved_s = 2 * gather_s(self.assumed.number_bytes * self.counts.base, num_ranks, card)
        if config.lora.mode == "full":
            moved_s += gather_s(_GRADIENT_BYTES * self.counts.base, num_ranks, card)
        limit = config.optim.microbatch_tokens or default_tokens("cuda", self.shape.hidden)
        in_rounds = math.ceil(num_tokens / (num_ranks * max(limit, context)))
        return max(computed_s, max(config.optim.num_updates, in_rounds) * moved_s)
