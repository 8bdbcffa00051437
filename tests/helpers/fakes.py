"""Small stand-ins for the sampler and the reward, and makers of records."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Self

from rewards import Score
from rl_lora.config import DataSection
from rl_lora.data.row_formats import DataRow
from rl_lora.prompts import _Renderer
from rl_lora.sampler import OnGroup
from rl_lora.types import Adapter, Completion, Prompt, Rollout, RolloutGroup, SampleParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Script = Callable[[Prompt, int], str] | Mapping[str, Sequence[str]]


def make_prompt(
    prompt_id: str = "sum/0",
    reference: str = "7",
    source: str = "sum",
    question: str = "What is 4 + 3?",
    token_ids: tuple[int, ...] = (1, 5, 6),
) -> Prompt:
    """A prompt of three tokens."""
    return Prompt(prompt_id, source, question, reference, token_ids)


def make_completion(
    text: str = "7",
    num_tokens: int | None = None,
    is_truncated: bool = False,
    adapter_version: int = 0,
) -> Completion:
    """A completion of `num_tokens` tokens; without a number, one token a character and an end."""
    num_tokens = len(text) + 1 if num_tokens is None else num_tokens
    return Completion(
        token_ids=tuple(range(10, 10 + num_tokens)),
        text=text,
        sampler_logprobs_T=(-0.5,) * num_tokens,
        is_truncated=is_truncated,
        adapter_version=adapter_version,
    )


def make_rollout(
    reward: float,
    text: str = "7",
    num_tokens: int | None = None,
    is_truncated: bool = False,
    correct: bool | None = None,
    status: str = "ok",
    has_format: bool = False,
    adapter_version: int = 0,
) -> Rollout:
    """A rollout; correct from a reward of 1 on, unless `correct` says otherwise."""
    correct = reward >= 1.0 if correct is None else correct
    score = Score(reward, correct, status, text or None, has_format)  # type: ignore[arg-type]
    return Rollout(make_completion(text, num_tokens, is_truncated, adapter_version), score)


def make_group(
    rewards_G: Sequence[float],
    prompt_id: str = "sum/0",
    source: str = "sum",
    lengths_G: Sequence[int] | None = None,
) -> RolloutGroup:
    """A group with these rewards (correct from 1 on) and completion lengths (default: 4 tokens)."""
    lengths_G = [4] * len(rewards_G) if lengths_G is None else lengths_G
    rollouts = [make_rollout(r, num_tokens=t) for r, t in zip(rewards_G, lengths_G, strict=True)]
    return RolloutGroup(make_prompt(prompt_id, source=source), tuple(rollouts))


class FakeSampler:
    """Gives scripted completions; a sampler by protocol.

    `script` is a function of (prompt, sample index), or a map from prompt_id to texts that are
    taken in turn, over again where they run out. A text over `max_tokens` characters is cut.
    Every call is kept in `calls`.
    """

    def __init__(self, script: Script, adapter_version: int = -1) -> None:
        self._script = script
        self.adapter_version = adapter_version
        self.calls: list[tuple[list[Prompt], SampleParams]] = []
        self.is_closed = False
        self.num_releases = 0

    def set_adapter(self, adapter: Adapter | None) -> None:
        self.adapter_version = -1 if adapter is None else adapter.version

    def sample(
        self,
        prompts: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        self.calls.append((list(prompts), params))
        groups = [
            [self._complete(prompt, index, params) for index in range(params.num_samples)]
            for prompt in prompts
        ]
        if on_group is not None:
            for index in reversed(range(len(groups))):  # any order will do
                on_group(index, groups[index])
        return groups

    def _complete(self, prompt: Prompt, index: int, params: SampleParams) -> Completion:
        if callable(self._script):
            text = self._script(prompt, index)
        else:
            texts = self._script[prompt.prompt_id]
            text = texts[index % len(texts)]
        is_truncated = len(text) + 1 > params.max_tokens
        num_tokens = min(len(text) + 1, params.max_tokens)
        return make_completion(
            text[: params.max_tokens], num_tokens, is_truncated, self.adapter_version
        )

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[-0.5] * (len(token_ids) - 1) for token_ids in token_ids_N]

    def release_memory(self) -> None:
        self.num_releases += 1

    def close(self) -> None:
        self.is_closed = True


class FakeReward:
    r"""1 where the \boxed{} content, or the whole text, is the reference; a reward by protocol."""

    def __init__(self, format_weight: float = 0.0) -> None:
        self.format_weight = format_weight
        self.num_scored = 0

    def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]:
        self.num_scored += len(completions)
        return [self._score(c, r) for c, r in zip(completions, references, strict=True)]

    def _score(self, completion: str, reference: str) -> Score:
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", completion)
        answer = boxed[-1] if boxed else completion.strip()
        if not answer:
            return Score(0.0, False, "no_answer", None, False)
        correct = answer == reference
        reward = float(correct) + self.format_weight * bool(boxed)
        return Score(reward, correct, "ok", answer, bool(boxed))

    def close(self) -> None:
        """Nothing is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def render_text(question: str, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt of a question as text."""
    return _Renderer(data, tokenizer).text(DataRow(question, None), "the prompt")
