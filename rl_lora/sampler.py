"""The protocol of samplers, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rl_lora.errors import UserError
from rl_lora.types import Adapter, Completion, Prompt, SampleParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE_VERSION = -1  # Completion.adapter_version of the base model without adapter
OnGroup = Callable[[int, list[Completion]], None]  # index of the prompt, its G completions
OnProgress = Callable[[int, int, int], None]  # completions done, in all, tokens in those done


class Sampler(Protocol):
    """Samples completions from the base model with the adapter that was set last.

    One with an engine raises EngineError where that is unusable (`samplers.restarts`). One whose
    class says has_own_weights = True may be called from another thread than the main one, but from
    one at a time. One that says switches_while_sampling = True takes `sample` from several threads
    at once and `set_adapter` meanwhile, in another one: each group is wholly of one version, the
    newest where it is sampled, and is never of an older one than was set when its `sample` began.
    """

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Samples from this adapter version from now on; None: from the base model."""

    def sample(
        self,
        prompts_N: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """[N][G] completions, in the prompts' order.

        Seeds and longest completions are those of `sample_seeds` and `max_tokens_of`. Log-probs
        are those of the distribution sampled from: at params.temperature, in nats.
        `on_group` is called once per prompt as soon as its group is complete, in any order, in
        the thread of this call; what it raises ends the sampling and is raised here.
        """

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs in nats at temperature 1 of tokens 1, 2, ... of each sequence given those
        before, under the adapter in use: one fewer than the sequence has tokens."""

    def release_memory(self) -> None:
        """Frees memory that only sampling needs; the next call allocates it again."""

    def close(self) -> None:
        """Frees the engine; a second call does nothing."""


def is_on_rank_0(sampler: Sampler) -> bool:
    """Whether rank 0 samples for all ranks; else each samples its share."""
    return getattr(sampler, "is_on_rank_0", False)


def switches_while_sampling(sampler: Sampler) -> bool:
    """Whether the sampler's version may change between the groups of a batch."""
    return getattr(sampler, "switches_while_sampling", False)


def max_tokens_of(prompts_N: Sequence[Prompt], params: SampleParams) -> list[int]:
    """[N]: longest completion of each prompt; those of `types.SeededParams` are given."""
    return list(getattr(params, "max_tokens_N", ())) or [params.max_tokens] * len(prompts_N)


def check_lengths(prompts_N: Sequence[Prompt], params: SampleParams, max_model_len: int) -> None:
    """Raises UserError if a prompt with its longest completion exceeds max_model_len."""
    for prompt, max_tokens in zip(prompts_N, max_tokens_of(prompts_N, params), strict=True):
        if len(prompt.token_ids) + max_tokens > max_model_len:
            raise UserError(
                f"prompt {prompt.prompt_id!r} has {len(prompt.token_ids)} tokens, and with "
                f"sampling.max_tokens={max_tokens} exceeds the context of {max_model_len}; lower "
                "sampling.max_tokens or data.max_prompt_tokens"
            )


class Groups:
    """Gathers the completions of one call, which finish in any order, in groups."""

    def __init__(self, num_prompts: int, num_samples: int, on_group: OnGroup | None) -> None:
        self._found_N: list[dict[int, Completion]] = [{} for _ in range(num_prompts)]
        self._num_samples, self._on_group = num_samples, on_group

    def add(self, number: int, completion: Completion) -> None:
        """Completion `number` of 0, 1, ... N * G - 1, counted prompt by prompt."""
        index, sample = divmod(number, self._num_samples)
        self._found_N[index][sample] = completion
        if self._on_group is not None and len(self._found_N[index]) == self._num_samples:
            self._on_group(index, self._group(index))

    def all(self) -> list[list[Completion]]:
        """[N][G], once every completion was added."""
        return [self._group(index) for index in range(len(self._found_N))]

    def _group(self, index: int) -> list[Completion]:
        return [self._found_N[index][sample] for sample in range(self._num_samples)]


@dataclass(frozen=True, slots=True)
class Stops:
    """`SampleParams.stop` as samplers look for them.

    Example: Stops(token_ids=(2,), texts=("\n\n",), in_special=False) of ("<|end|>", "\n\n")
    """

    token_ids: tuple[int, ...]  # of stops that are one special token
    texts: tuple[str, ...]  # searched for in the text
    in_special: bool  # in text with the special tokens; completions' text has none

    @classmethod
    def of(cls, stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Stops:
        """A stop that is a special token is found by its id: it is not in a completion's text."""
        if not stop:
            return cls((), (), False)
        special = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        texts = tuple(text for text in stop if text not in special)
        ids = tuple(special[text] for text in stop if text in special)
        return cls(ids, texts, any(word in text for text in texts for word in special))
