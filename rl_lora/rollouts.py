"""Prompts x sampler x reward -> groups of scored rollouts; scoring runs while sampling does."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor, wait
from typing import Any, cast

from rewards import FunctionReward, Reward
from rl_lora import distributed
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.launchers import interruption
from rl_lora.launchers.interruption import Interrupted
from rl_lora.sampler import OnGroup, Sampler, is_on_rank_0
from rl_lora.scoring import functions_of, score_best
from rl_lora.types import Completion, Prompt, Rollout, RolloutGroup, SampleParams, Score

_POLL_S = 0.2  # between two looks for a signal

MADE_UP = "The answer is \\boxed{0}."


UserReward = Callable[..., Any]  # fn(completion, reference), or fn(completions, **columns)


# limits: the fields of SampleParams by name
def rollout(
    sampler: Sampler,
    prompts_N: Sequence[Prompt],
    reward: Reward | UserReward,
    *,
    num_samples: int = 8,
    max_tokens: int = 256,
    temperature: float = 1.0,
    stop: tuple[str, ...] = (),
    seed: int = 0,
) -> list[RolloutGroup]:
    """One group of num_samples scored completions per prompt, in the prompts' order.

    Args:
        sampler: with the adapter to sample from set; its memory is released at the end, for the
            learner.
        prompts_N: the problems.
        reward: `rl_lora.load_reward("math")`, or a function of (completion, reference) that
            returns a finite number; other forms of function: see `rewards.FunctionReward`.
        num_samples: completions per prompt.
        max_tokens: cap of a completion.
        temperature: 0 is greedy.
        stop: strings that end a completion.
        seed: the same one gives the same completions.

    Raises:
        UserError: a prompt is too long, or the reward failed.
    """
    params = SampleParams(num_samples, max_tokens, temperature, stop=stop, seed=seed)
    with scoring_thread() as thread:
        if not hasattr(reward, "score_batch"):
            reward = FunctionReward(getattr(reward, "__name__", "reward"), reward)
        scoring = Scoring(
            prompts_N, cast("Reward", reward), thread, is_on_rank_0=is_on_rank_0(sampler)
        )
        groups_N = sample_and_score(sampler, scoring, params, version=None).groups()
    sampler.release_memory()
    return groups_N


def sample_groups(
    sampler: Sampler,
    prompts_N: Sequence[Prompt],
    params: SampleParams,
    *,
    version: int | None,
    on_group: OnGroup | None = None,
) -> list[list[Completion]]:
    """[N][G] completions, all of the adapter version asked for (None: of any).

    Raises:
        StaleAdapterError: a completion came from another version.
    """
    completions_N_G = sampler.sample(prompts_N, params, on_group)
    found = {c.adapter_version for completions_G in completions_N_G for c in completions_G}
    if version is not None and not found <= {version}:
        raise StaleAdapterError(
            f"the sampler answered with adapter version {sorted(found)}, and version {version} was "
            "asked for; the run stops, since its importance ratios would be wrong"
        )
    return completions_N_G


def score_groups(
    prompts_N: Sequence[Prompt],
    completions_N_G: Sequence[Sequence[Completion]],
    reward: Reward,
) -> list[RolloutGroup]:
    """Scores all groups in one call, so that the verifier's workers run in parallel.

    Raises:
        UserError: the reward failed, or returned a number that is not finite.
    """
    pairs = [
        (prompt, completion)
        for prompt, completions_G in zip(prompts_N, completions_N_G, strict=True)
        for completion in completions_G
    ]
    by_reward = [pair for pair in pairs if pair[1].own_score is None]
    found = iter(_scores(by_reward, reward) if by_reward else ())
    scored = [completion.own_score or next(found) for _, completion in pairs]
    for score, (prompt, _) in zip(scored, pairs, strict=True):
        if not math.isfinite(score.reward):
            raise UserError(
                f"the reward returned {score.reward} for an answer to reference "
                f"{prompt.reference!r}; it must return a finite number"
            )
    scores = iter(scored)
    return [
        RolloutGroup(prompt, tuple(Rollout(c, next(scores)) for c in completions_G))
        for prompt, completions_G in zip(prompts_N, completions_N_G, strict=True)
    ]


def _scores(pairs: Sequence[tuple[Prompt, Completion]], reward: Reward) -> list[Score]:
    """The reward's. A user's function gets a row of columns per completion; the data set's own
    columns replace those that every problem has."""
    rows: list[Mapping[str, Any]] = [
        {
            "question": prompt.question,
            "answer": prompt.reference,
            "solution": prompt.solution,
            **prompt.columns,
            "prompts": prompt.columns.get("prompt", prompt.question),
            "completion_ids": list(completion.token_ids),
        }
        for prompt, completion in pairs
    ]
    texts = [completion.text for _, completion in pairs]
    references, sources = zip(*((one.reference, one.source) for one, _ in pairs), strict=True)
    return score_best(reward, texts, references, rows, sources)


def check_reward(reward: Reward, prompts: Sequence[Prompt], token_ids: Sequence[int]) -> None:
    """Tries a user's own functions on MADE_UP, whose ids are given, twice, before any is sampled,
    for a problem of each source.

    Raises:
        UserError: a function fails, or returns something else than a reward.
    """
    if not functions_of(reward):
        return
    firsts = {prompt.source: prompt for prompt in reversed(prompts)}
    completion = Completion(tuple(token_ids), MADE_UP, (0.0,) * len(token_ids), False, 0)
    score_groups([*firsts.values()], [[completion, completion]] * len(firsts), reward)


def scoring_thread() -> ThreadPoolExecutor:
    """The one thread that calls the reward; a context manager."""
    return ThreadPoolExecutor(1, "scoring")


class Scoring:
    """Scores the groups of one batch as they arrive, while others are sampled.

    In a job of several processes each samples and scores `own`, a share of the prompts.

    Args:
        prompts_N: of the whole batch, the same on all ranks.
        reward: scores the completions.
        thread: an executor with one worker: batches that share it are scored one after another.
        is_on_rank_0: rank 0 samples and scores all prompts.
    """

    def __init__(
        self,
        prompts_N: Sequence[Prompt],
        reward: Reward,
        thread: Executor,
        *,
        is_on_rank_0: bool = False,
    ) -> None:
        self.seconds = 0.0  # of work by the thread on this batch
        # Of the sampler's engine since the batch before; after `groups` those of all ranks.
        self.num_restarts = 0
        self.prompts_N, self._reward, self._thread = prompts_N, reward, thread
        self.own = own_share(prompts_N, is_on_rank_0=is_on_rank_0)
        self._waiting: deque[tuple[int, list[Completion]]] = deque()
        self._jobs: list[Future[None]] = []
        self._groups: dict[int, RolloutGroup] = {}
        self._is_stopped = False

    def add(self, index: int, completions_G: list[Completion]) -> None:
        """The completions of prompt `index` of `own`; a sampler's `on_group`.

        Raises:
            Exception: what scoring an earlier group raised, so that sampling ends at once.
            CancelledError: after `stop`.
        """
        self.check_wanted()
        for job in self._jobs:
            if job.done():
                job.result()
        self._waiting.append((self.own[index], completions_G))
        self._jobs.append(self._thread.submit(self._score_waiting))

    def groups(self) -> list[RolloutGroup]:
        """The scored groups of all prompts, in their order, once all ranks are done.

        Raises:
            Exception: what scoring raised.
            OtherProcessError: it failed in another process.
            Interrupted: by a signal.
        """
        for job in self._jobs:
            while interruption.received() is None and not wait([job], timeout=_POLL_S).done:
                pass
        distributed.agree_to_stop("sampling and scoring")
        for job in self._jobs:
            job.result()
        own = {index: self._groups[index].rollouts_G for index in self.own}
        found: dict[int, tuple[Rollout, ...]] = {}
        parts = distributed.gather((own, self.num_restarts), "sampling and scoring")
        self.num_restarts = sum(number for _, number in parts)
        for part, _ in parts:
            found |= part
        return [RolloutGroup(prompt, found[index]) for index, prompt in enumerate(self.prompts_N)]

    def stop(self) -> None:
        """Ends the sampling at the next group, from another thread."""
        self._is_stopped = True

    def check_wanted(self) -> None:
        """Raises CancelledError after `stop`."""
        if self._is_stopped:
            raise CancelledError("the batch is no longer wanted")

    def cancel(self, *, is_waiting: bool = True) -> None:
        """Cancels what is waiting, and returns once the running call of the reward has ended, if
        `is_waiting`."""
        self._waiting.clear()
        if is_waiting:
            wait(self._jobs)

    def _score_waiting(self) -> None:
        """Scores everything that has arrived in one call, so that the workers run in parallel."""
        start = time.perf_counter()
        taken: list[tuple[int, list[Completion]]] = []
        while self._waiting:
            taken.append(self._waiting.popleft())
        if taken:
            prompts = [self.prompts_N[index] for index, _ in taken]
            scored = score_groups(
                prompts, [completions_G for _, completions_G in taken], self._reward
            )
            self._groups |= {index: group for (index, _), group in zip(taken, scored, strict=True)}
        self.seconds += time.perf_counter() - start


def own_share(prompts_N: Sequence[Prompt], *, is_on_rank_0: bool = False) -> list[int]:
    """Indices of the prompts that this process samples: the ranks get equally many, and long ones
    are dealt out evenly. A prompt that occurs twice stays with one rank, which counts its
    occurrences for the seeds."""
    if distributed.world_size() == 1 or is_on_rank_0:
        return list(range(len(prompts_N))) if distributed.is_main() else []
    places: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts_N):
        places.setdefault(prompt.prompt_id, []).append(index)
    together = list(places.values())
    # A completion's length is not known yet: far above the prompts' differences, the same for all.
    longest = sum(len(prompt.token_ids) for prompt in prompts_N)
    costs = [sum(longest + len(prompts_N[i].token_ids) for i in one) for one in together]
    own = distributed.share(costs)[distributed.rank()]
    return sorted(index for number in own for index in together[number])


def sample_and_score(
    sampler: Sampler, scoring: Scoring, params: SampleParams, *, version: int | None
) -> Scoring:
    """Samples this process's groups; each is scored in the other thread once it is complete.

    Raises:
        StaleAdapterError: a completion came from another adapter version than `version`.
        Exception: what sampling or scoring raised, once the other has ended.
        Interrupted: by a signal, in a job of one process.
    """
    try:
        prompts_N = [scoring.prompts_N[index] for index in scoring.own]
        with interruption.abandonable():
            sample_groups(sampler, prompts_N, params, version=version, on_group=scoring.add)
    except Interrupted:
        scoring.cancel(is_waiting=False)  # the checkpoint to be written waits for no reward
        if distributed.world_size() == 1:
            raise  # of several, all will in `groups`
    except BaseException:
        scoring.cancel()
        raise
    return scoring
