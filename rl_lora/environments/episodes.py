"""Takes turns: the policy's are sampled by any sampler, an environment in this process answers.

All samples take their turns together: the first one of a prompt's G samples in one call, each later
one as a prompt that is the conversation so far, with one sample. So an engine can reuse what it has
computed of the turns before (vLLM's prefix cache).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rewards import Reward
from rl_lora import distributed
from rl_lora.environments.bridge import Bridge
from rl_lora.environments.protocol import Environment, Step, Turn
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.rollouts import score_groups
from rl_lora.sampler import Groups, OnGroup, Sampler, is_on_rank_0, switches_while_sampling
from rl_lora.seeds import mix_seed, sample_seeds
from rl_lora.types import Adapter, Completion, Episode, Prompt, SampleParams, Score, SeededParams


class EpisodeSampler:
    """A `Sampler` whose completions are episodes of up to `max_turns` turns.

    `SampleParams.max_tokens` is for an episode's tokens, the observations' included. It is
    truncated where a turn reaches that, or where an observation leaves no room for a turn.

    Args:
        sampler: of one adapter version during a call.
        make_environment: makes one per episode.
        bridge: renders observations.
        max_turns: of the policy.
        reward: the job's, for environments that are graded. It scores their turns in the thread of
            `sample`, and is not called for their episodes again.
    """

    def __init__(
        self,
        sampler: Sampler,
        make_environment: Callable[[], Environment],
        bridge: Bridge,
        *,
        max_turns: int = 4,
        reward: Reward | None = None,
    ) -> None:
        self._sampler, self._make_environment, self._bridge = sampler, make_environment, bridge
        self._max_turns, self._reward = max_turns, reward

    @property
    def num_restarts(self) -> int:
        """Of the sampler's engine."""
        return int(getattr(self._sampler, "num_restarts", 0))

    @property
    def is_on_rank_0(self) -> bool:
        """As the sampler says."""
        return is_on_rank_0(self._sampler)

    @property
    def switches_while_sampling(self) -> bool:
        """As the sampler says."""
        return switches_while_sampling(self._sampler)

    def metrics(self) -> dict[str, float]:
        """The sampler's own."""
        return dict(getattr(self._sampler, "metrics", dict)())

    def set_adapter(self, adapter: Adapter | None) -> None:
        """As the sampler's own."""
        self._sampler.set_adapter(adapter)

    def sample(
        self,
        prompts_N: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """[N][G] episodes; `on_group` gets a group once all its episodes have ended.

        The first turns are those of the sampler without an environment. Of a job's processes all
        make the same number of the sampler's calls, also for no prompts at all.

        Raises:
            UserError: as the sampler's own; or the environment failed.
            StaleAdapterError: an episode's turns came from several adapter versions.
        """
        groups = Groups(len(prompts_N), params.num_samples, on_group)
        running = self._begun(prompts_N, params)
        answers = [one for group in self._sampler.sample(prompts_N, params) for one in group]
        for turn in range(1, self._max_turns + 1):
            is_last = turn == self._max_turns
            scores = self._scores(running, answers)
            for one, answer, score in zip(running, answers, scores, strict=True):
                one.take(answer, score, None if is_last else self._bridge, params.max_tokens)
                if one.is_over:
                    groups.add(one.number, one.completion())
            running = [one for one in running if not one.is_over]
            if is_last or not (running or distributed.world_size() > 1):
                break
            answers = self._next_turns(running, params, turn)
        return groups.all()

    def _begun(self, prompts_N: Sequence[Prompt], params: SampleParams) -> list[_Running]:
        running: list[_Running] = []
        for prompt, seeds_G in zip(prompts_N, sample_seeds(prompts_N, params), strict=True):
            for seed in seeds_G:
                environment = _called(self._make_environment)
                _called(environment.reset, prompt, mix_seed(seed, "environment"))
                running.append(_Running(len(running), prompt, seed, environment))
        return running

    def _scores(
        self, running: Sequence[_Running], answers: Sequence[Completion]
    ) -> Sequence[Score | None]:
        """Of each answer by the job's reward, for environments that are graded."""
        if not running or not running[0].environment.is_graded:
            return [None] * len(running)
        assert self._reward is not None
        prompts = [one.prompt for one in running]
        groups = score_groups(prompts, [[answer] for answer in answers], self._reward)
        return [group.rollouts_G[0].score for group in groups]

    def _next_turns(
        self, running: Sequence[_Running], params: SampleParams, turn: int
    ) -> list[Completion]:
        """One sample of each conversation."""
        seeded = SeededParams.of(
            params,
            tuple((mix_seed(one.seed, "turn", turn),) for one in running),
            num_samples=1,
            max_tokens_N=tuple(params.max_tokens - len(one.token_ids) for one in running),
        )
        prompts = [
            replace(one.prompt, token_ids=(*one.prompt.token_ids, *one.token_ids))
            for one in running
        ]
        return [answer for (answer,) in self._sampler.sample(prompts, seeded)]

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        """As the sampler's own."""
        return self._sampler.token_logprobs(token_ids_N)

    def release_memory(self) -> None:
        """As the sampler's own."""
        self._sampler.release_memory()

    def close(self) -> None:
        """As the sampler's own."""
        self._sampler.close()


@dataclass
class _Running:
    """An episode under way. T: tokens after the prompt."""

    number: int  # of the sample in its batch
    prompt: Prompt
    seed: int
    environment: Environment
    token_ids: list[int] = field(default_factory=list)
    logprobs_T: list[float] = field(default_factory=list)
    is_sampled_T: list[bool] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    score: Score | None = None
    is_truncated: bool = False
    is_over: bool = False
    versions: set[int] = field(default_factory=set)  # of the adapter

    def take(
        self, answer: Completion, score: Score | None, bridge: Bridge | None, max_tokens: int
    ) -> None:
        """Adds a turn and, if another one follows, the environment's observation.

        Raises:
            UserError: the environment failed, or the sampler gave more tokens than were left.
        """
        self._add(answer.token_ids, answer.sampler_logprobs_T, answer.text, is_sampled=True)
        self.versions.add(answer.adapter_version)
        if len(self.token_ids) > max_tokens:
            raise UserError(
                f"the sampler gave {len(self.token_ids)} tokens of an episode of {max_tokens}; "
                "with [environment] the class of sampling.backend must keep to the max_tokens_N of "
                "rl_lora.types.SeededParams"
            )
        step = _called(self.environment.step, Turn(answer.text, score, answer.is_truncated))
        if not isinstance(step, Step):
            raise UserError(
                f"environment.name: step returned {type(step).__name__}; it must return a "
                "rl_lora.environments.protocol.Step"
            )
        self.score = step.score or score
        self.is_truncated = self.is_over = answer.is_truncated
        if step.observation is None or bridge is None or self.is_over:
            self.is_over = True
            return
        last_id = answer.token_ids[-1] if answer.token_ids else None
        ids = bridge.token_ids(step.observation, last_id)
        if len(self.token_ids) + len(ids) >= max_tokens:
            self.is_truncated = self.is_over = True
            return
        self._add(ids, (0.0,) * len(ids), step.observation, is_sampled=False)

    def _add(
        self, ids: Sequence[int], logprobs_T: Sequence[float], text: str, *, is_sampled: bool
    ) -> None:
        self.token_ids += ids
        self.logprobs_T += logprobs_T
        self.is_sampled_T += [is_sampled] * len(ids)
        self.texts.append(text)

    def completion(self) -> Completion:
        """The record of an episode that is over.

        Raises:
            StaleAdapterError: its turns came from several adapter versions.
        """
        if len(self.versions) > 1:
            raise StaleAdapterError(
                f"the sampler changed its adapter during an episode: {sorted(self.versions)}"
            )
        return Completion(
            token_ids=tuple(self.token_ids),
            text=self.texts[-1],
            sampler_logprobs_T=tuple(self.logprobs_T),
            is_truncated=self.is_truncated,
            adapter_version=min(self.versions),
            episode=Episode(tuple(self.texts), tuple(self.is_sampled_T), self.score),
        )


def _called(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of an environment's method. Raises UserError where it fails."""
    try:
        return function(*arguments)
    except Exception as error:  # it may be the user's own
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"environment.name: {getattr(function, '__qualname__', function)} failed: "
            f"{type(error).__name__}: {reason}"
        ) from error
