"""Whether a job fits into memory, and the change with which it would: found by planning again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from transformers import PretrainedConfig

from rl_lora.config import RunConfig, parse_as
from rl_lora.config.overrides import apply_overrides
from rl_lora.config.sft import SftConfig
from rl_lora.models.device import pick_dtype
from rl_lora.models.shapes import kv_bytes_per_token
from rl_lora.planning.cards import CARDS, Card
from rl_lora.planning.memory import (
    ASLEEP,
    CONTEXT,
    LOADED,
    PHASES,
    MemoryItem,
    bytes_text,
    fitting_microbatch,
    largest_microbatch,
    learner_memory,
    longest_sequence,
    memory_plan,
    microbatch_tokens,
    peak,
    plan_device,
    sequences_at_once,
    shards,
)

_MICROBATCH, _SEQUENCES = "optim.microbatch_tokens", "sampling.max_num_seqs"
_MICROBATCH_STEP = 256  # suggested microbatches are a multiple of it
# Settings that take memory and change no result, with what they are changed to, in the order in
# which they are tried; None: the largest value that fits.
_SETTINGS = {
    "sampling.memory_fraction": "none",
    _MICROBATCH: None,
    _SEQUENCES: None,
    "optim.checkpoint_activations": "true",
    "model.shard": "true",
    "sampling.max_staleness": "0",
}


@dataclass(frozen=True, slots=True)
class Job:
    """What is planned: a job on num_ranks GPUs of num_bytes each, or on a CPU.

    Example: Job(config, model_config, num_base=8030261248, num_trainable=2621440,
    num_bytes=84825604096, num_ranks=8)
    """

    config: RunConfig | SftConfig
    model_config: PretrainedConfig
    num_base: int  # parameters
    num_trainable: int
    num_bytes: int  # of memory that one process has
    num_ranks: int = 1

    def parts(self) -> list[MemoryItem]:
        """The memory plan of one rank, with microbatches as large as a run makes them."""
        if not self.chooses_microbatch:
            return self._parts(self.config)
        parts = [part for part in self._parts(self.config) if "learning" in part.phases]
        loaded = (*LOADED, CONTEXT, ASLEEP)
        free = self.num_bytes - sum(part.num_bytes for part in parts if part.part in loaded)
        to_come = [part for part in parts if part.part not in loaded]
        fitting = fitting_microbatch(to_come, self.microbatch_tokens, free)
        optim = self.config.optim.model_copy(update={"microbatch_tokens": fitting})
        return self._parts(self.config.model_copy(update={"optim": optim}))

    @property
    def chooses_microbatch(self) -> bool:
        """Whether a run lowers the size of microbatches to what fits. An engine on the same GPU
        that samples meanwhile leaves memory for the usual size."""
        config = self.config
        if config.optim.microbatch_tokens or plan_device(config.model.device) == "cpu":
            return False
        if not isinstance(config, RunConfig) or config.resources.is_remote:
            return True
        return not config.sampling.max_staleness

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of the largest microbatch if all of them fit."""
        return microbatch_tokens(self.config, self.model_config)

    def largest_microbatch(self) -> int:
        """Tokens of the largest microbatch that fits; 0 if none does."""
        parts = self._parts(self.config)
        return largest_microbatch(parts, self.microbatch_tokens, self.num_bytes)

    def _parts(self, config: RunConfig | SftConfig) -> list[MemoryItem]:
        sizes = self.model_config, self.num_base, self.num_trainable
        if isinstance(config, RunConfig):
            return memory_plan(config, *sizes, self.num_bytes, self.num_ranks)
        tokens = microbatch_tokens(config, self.model_config)
        return learner_memory(config, *sizes, tokens, self.num_ranks)


@dataclass(frozen=True, slots=True)
class Change:
    """A change with which a job fits.

    Example: Change(overrides=("model.shard=true",), num_ranks=8, card=None)
    """

    overrides: tuple[str, ...]
    num_ranks: int
    card: Card | None = None  # another one than the job's


def misfits(job: Job) -> list[str]:
    """What does not fit, a line each; nothing if the job fits."""
    parts = job.parts()
    lines = [
        f"{phase} takes {bytes_text(total)} of {bytes_text(job.num_bytes)}"
        for phase in PHASES
        if (total := peak(parts, phase)) > job.num_bytes
    ]
    config = job.config
    if isinstance(config, RunConfig) and config.sampling.backend == "vllm":
        device = plan_device(config.model.device)
        if config.resources.is_remote and device == "cuda":
            return lines  # the engines have other GPUs
        dtype = pick_dtype(config.model.dtype, torch.device(device))
        length = longest_sequence(config)
        one = kv_bytes_per_token(job.model_config, dtype) * (length + 1)
        if _size(parts, "KV cache") < one:
            lines.append(
                f"the KV cache has no room for one sequence of {length:,} tokens "
                f"({bytes_text(one)})"
            )
    return lines


def what_fits(job: Job) -> Change | None:
    """The smallest change with which a job fits: in settings, else in the number of GPUs, else in
    the card; None if there is none."""
    for candidate, card in _with_other_gpus(job):
        if (overrides := _overrides(candidate)) is not None:
            return Change(overrides, candidate.num_ranks, card)
    return None


def _with_other_gpus(job: Job) -> Iterator[tuple[Job, Card | None]]:
    """The job itself, on more GPUs and on larger ones, with the card if it is another."""
    yield job, None
    if not isinstance(job.config, RunConfig) or plan_device(job.config.model.device) == "cpu":
        return
    number = 2 * job.num_ranks
    while number <= job.config.sampling.num_prompts:
        yield replace(job, num_ranks=number), None
        number *= 2
    for card in sorted(CARDS.values(), key=lambda one: one.num_bytes):
        if card.num_bytes > job.num_bytes:
            yield replace(job, num_bytes=card.num_bytes), card


def changed(job: Job, overrides: tuple[str, ...]) -> Job:
    """The job with `section.key=value ...`, as on the command line."""
    root = type(job.config)
    raw = apply_overrides(job.config.model_dump(), overrides, root)
    return replace(job, config=parse_as(root, raw))


def _overrides(job: Job) -> tuple[str, ...] | None:
    """The fewest overrides with which the job fits on its GPUs; None if none do."""
    applicable = [key for key in _SETTINGS if _can_save(job, key)]
    for number in range(len(applicable) + 1):
        for keys in combinations(applicable, number):
            if (overrides := _completed(job, keys)) is not None:
                return overrides
    return None


def _can_save(job: Job, key: str) -> bool:
    """Whether a change of the setting could save this job memory."""
    config = job.config
    if key == "optim.checkpoint_activations":
        return not config.optim.checkpoint_activations
    if key == _MICROBATCH:
        return not job.chooses_microbatch
    if not isinstance(config, RunConfig):
        return False
    return {
        "sampling.memory_fraction": config.sampling.memory_fraction is not None,
        _SEQUENCES: config.sampling.backend == "torch",
        "model.shard": job.num_ranks > 1 and shards(config, job.num_ranks) == 1,
        "sampling.max_staleness": config.sampling.max_staleness > 0,
    }[key]


def _completed(job: Job, keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """The settings with their values, if the job fits with them."""
    overrides = tuple(f"{key}={_SETTINGS[key]}" for key in keys if _SETTINGS[key] is not None)
    job = changed(job, overrides)
    for key in keys:
        if _SETTINGS[key] is None:
            if (value := _largest(job, key)) is None:
                return None
            overrides += (f"{key}={value}",)
            job = changed(job, overrides[-1:])
    return None if misfits(job) else overrides


def _largest(job: Job, key: str) -> int | None:
    """The largest value of a setting with which its phase fits, below the present one."""
    config = job.config
    if key == _MICROBATCH:
        fitting = job.largest_microbatch()
        fitting -= fitting % _MICROBATCH_STEP
        return fitting if longest_sequence(config) <= fitting < job.microbatch_tokens else None
    assert isinstance(config, RunConfig)
    parts = job.parts()
    number, group = sequences_at_once(config, job.num_ranks), config.sampling.num_samples
    cache = _size(parts, "KV cache")
    room = job.num_bytes - (peak(parts, "sampling") - cache)
    fitting = room * number // cache
    fitting -= fitting % group  # the torch sampler decodes whole groups
    return fitting if group <= fitting < number else None


def _size(parts: list[MemoryItem], name: str) -> int:
    return sum(part.num_bytes for part in parts if part.part == name)
