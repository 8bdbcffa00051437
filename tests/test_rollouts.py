"""Scoring while sampling: order, overlap, and errors of either side."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from rewards import Score, load_reward
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.rollouts import Scoring, sample_and_score, sample_groups, score_groups, scoring_thread
from rl_lora.sampler import Groups, OnGroup
from rl_lora.types import Completion, Prompt, SampleParams
from tests.helpers.fakes import FakeReward, FakeSampler, make_completion, make_prompt

PROMPTS = [make_prompt(f"sum/{n}", reference=str(n)) for n in range(5)]
PARAMS = SampleParams(num_samples=3, max_tokens=64, temperature=1.0, seed=1)
WAIT_S = 20.0  # for what comes at once, or never


def text(prompt: Prompt, index: int) -> str:
    """Right for samples 0 and 1; of prompt 4 the symbolic tier has to say so."""
    if prompt.reference == "4" and index == 1:
        return r"\boxed{\int_0^4 1\,dx}"
    return rf"\boxed{{{prompt.reference if index < 2 else 'x'}}}"


def test_groups_in_any_order_come_out_in_the_prompts_order() -> None:
    told: list[tuple[int, list[str]]] = []
    groups = Groups(2, 2, lambda index, found_G: told.append((index, [c.text for c in found_G])))
    for number in (3, 0, 2, 1):
        groups.add(number, make_completion(str(number)))
    assert told == [(1, ["2", "3"]), (0, ["0", "1"])]
    assert [[c.text for c in group] for group in groups.all()] == [["0", "1"], ["2", "3"]]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_scores_are_those_of_scoring_afterwards(num_workers: int) -> None:
    sampler = FakeSampler(text)
    with (
        load_reward("math", format_weight=0.1, num_workers=num_workers) as reward,
        scoring_thread() as thread,
    ):
        later = score_groups(PROMPTS, sample_groups(sampler, PROMPTS, PARAMS, version=-1), reward)
        scoring = sample_and_score(sampler, Scoring(PROMPTS, reward, thread), PARAMS, version=-1)
        assert scoring.groups() == later
    assert [group.prompt for group in later] == PROMPTS
    assert later[3].rewards_G == [1.1, 1.1, 0.1]
    assert scoring.seconds > 0


class SlowSampler(FakeSampler):
    """Finishes its groups one by one, each after the one before has been scored."""

    def __init__(self, was_scored: threading.Semaphore) -> None:
        super().__init__(text)
        self.was_scored = was_scored
        self.num_given = 0

    def sample(
        self, prompts: Sequence[Prompt], params: SampleParams, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        groups = super().sample(prompts, params)
        assert on_group is not None
        for index, group in enumerate(groups):
            self.num_given += 1
            on_group(index, group)
            assert self.was_scored.acquire(timeout=WAIT_S)
        return groups


class TellingReward(FakeReward):
    """Says after each call that it is over, and may raise at the n-th."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.was_scored = threading.Semaphore(0)
        self.threads: set[str] = set()
        self.num_calls, self.fails_at = 0, fails_at

    def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]:
        self.threads.add(threading.current_thread().name)
        self.num_calls += 1
        try:
            if self.num_calls == self.fails_at:
                raise ZeroDivisionError("in the reward")
            return super().score_batch(completions, references)
        finally:
            self.was_scored.release()


def test_a_group_is_scored_while_the_sampler_continues() -> None:
    reward = TellingReward()
    sampler = SlowSampler(reward.was_scored)
    with scoring_thread() as thread:
        scoring = sample_and_score(sampler, Scoring(PROMPTS, reward, thread), PARAMS, version=-1)
        assert reward.num_calls == len(PROMPTS)  # each before the next was sampled
        assert [group.prompt for group in scoring.groups()] == PROMPTS
    assert reward.threads == {"scoring_0"}


@pytest.mark.parametrize("fails_at", [1, 5])
def test_an_error_of_the_reward_is_raised(fails_at: int) -> None:
    reward = TellingReward(fails_at)
    sampler = SlowSampler(reward.was_scored)
    with scoring_thread() as thread, pytest.raises(ZeroDivisionError, match="in the reward"):
        sample_and_score(sampler, Scoring(PROMPTS, reward, thread), PARAMS, version=-1).groups()


def test_an_error_of_the_reward_ends_the_sampling_at_the_next_group() -> None:
    with scoring_thread() as thread:
        scoring = Scoring(PROMPTS, TellingReward(fails_at=1), thread)
        scoring.add(0, [make_completion("0")])
        thread.submit(int).result()  # the job before it is over, too
        with pytest.raises(ZeroDivisionError, match="in the reward"):
            scoring.add(1, [make_completion("1")])


def test_an_error_at_the_last_group_is_raised_where_the_groups_are_asked_for() -> None:
    class Infinite(FakeReward):
        def score_batch(self, completions: Sequence[str], references: Sequence[str]) -> list[Score]:
            time.sleep(0.05)  # the sampler is done by then
            return [Score(float("inf"), True, "ok", None, False) for _ in completions]

    with scoring_thread() as thread:
        sampler = FakeSampler(text)
        scoring = sample_and_score(
            sampler, Scoring(PROMPTS[:1], Infinite(), thread), PARAMS, version=-1
        )
        with pytest.raises(UserError, match="must return a finite number"):
            scoring.groups()


def test_an_error_of_the_sampler_leaves_nothing_to_score() -> None:
    reward = FakeReward()
    with scoring_thread() as thread:
        busy = threading.Event()
        thread.submit(busy.wait, WAIT_S)
        scoring = Scoring(PROMPTS, reward, thread)
        scoring.add(0, [make_completion("0")])
        threading.Timer(0.05, busy.set).start()
        scoring.cancel()
        assert reward.num_scored == 0
        with pytest.raises(StaleAdapterError, match=r"adapter version \[-1\], and version 3"):
            sample_and_score(FakeSampler(text), Scoring(PROMPTS, reward, thread), PARAMS, version=3)
