"""Dynamic sampling: groups without signal are replaced by those of further prompts.

DAPO (arXiv 2503.14476, section 3.2) samples until a step has a fixed number of groups that a
gradient comes from. Here a round samples `sampling.oversample` times as many prompts as groups are
missing, and a step has up to `sampling.max_rounds` of them. It learns from the first
`sampling.num_prompts` groups with signal (`penalties.have_signal`), in the order in which their
prompts were drawn; further ones are surplus. Where the rounds do not suffice, it learns from the
fewer groups that there are, and where no group has signal, from the first ones, as without dynamic
sampling: that step is logged and takes no optimizer step.

What is decided depends on the groups only, which all processes have. A step that is interrupted
between two rounds is sampled again from its first: seeds and prompts are functions of the
checkpoint.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from rl_lora.advantages import AdvantageFn
from rl_lora.config import RunConfig
from rl_lora.config.dynamic import is_dynamic
from rl_lora.overlap import Batch, Request, RolloutWorker
from rl_lora.penalties import have_signal
from rl_lora.types import Adapter, RolloutGroup


@dataclass(frozen=True)
class StepRollouts:
    """What one step has sampled.

    Example: StepRollouts(groups_N=[RolloutGroup(...)], own=[0], position={"epoch": 0, ...},
    metrics={"rollouts/rounds": 2.0, "system/sampler_s": 12.5, ...})
    """

    groups_N: list[RolloutGroup]  # all, in the order in which their prompts were drawn
    own: list[int]  # those that this process sampled
    position: dict[str, Any]  # of the prompt stream, after the step's prompts
    metrics: dict[str, float]

    @property
    def learned_N(self) -> list[RolloutGroup]:
        """The groups that the step learns from."""
        return [group for group in self.groups_N if not group.left_out]


class StepSampler:
    """Samples what a run's steps learn from.

    Args:
        config: the job.
        advantage: of the job, with its options bound.
        worker: samples and scores.
        draw: the request of a round: `overlap.make_request` of (step, num_rounds, num_missing).
        phase: counts the seconds of "sample" and "score".
    """

    def __init__(
        self,
        config: RunConfig,
        advantage: AdvantageFn,
        worker: RolloutWorker,
        draw: Callable[[int, int, int], Request],
        phase: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.worker = worker
        self._config, self._advantage, self._draw, self._phase = config, advantage, draw, phase

    def sample(self, step: int, adapter: Adapter, older: Sequence[Adapter] = ()) -> StepRollouts:
        """The scored groups of step `step`; arguments and errors as `RolloutWorker.next_batch`."""
        sampling = self._config.sampling
        batches: list[Batch] = []
        groups_N: list[RolloutGroup] = []
        num_missing = sampling.num_prompts
        while True:
            is_last = len(batches) + 1 == sampling.max_rounds
            with self._phase("sample"):
                if not batches:
                    batch = self.worker.next_batch(adapter, older, is_last=is_last)
                else:
                    request = self._draw(step, len(batches), num_missing)
                    batch = self.worker.sample(request, adapter, is_last=is_last)
            with self._phase("score"):  # of what is not scored yet
                found_N = batch.scoring.groups()
            batches.append(batch)
            groups_N += found_N
            has_signal_N = self._have_signal(groups_N)
            num_missing = sampling.num_prompts - sum(has_signal_N)
            if is_last or num_missing <= 0:
                break
        if not is_last:
            self.worker.release_memory()
        metrics = added_up([one.metrics() for one in batches])
        groups_N = marked(groups_N, has_signal_N, sampling.num_prompts)
        if is_dynamic(sampling):
            metrics |= {"rollouts/rounds": float(len(batches))} | group_metrics(groups_N)
        return StepRollouts(groups_N, own_groups(batches), batch.position, metrics)

    def _have_signal(self, groups_N: Sequence[RolloutGroup]) -> list[bool]:
        if not is_dynamic(self._config.sampling):
            return [True] * len(groups_N)
        return have_signal(self._advantage, self._config, groups_N)


def marked(
    groups_N: Sequence[RolloutGroup], has_signal_N: Sequence[bool], num_prompts: int
) -> list[RolloutGroup]:
    """The groups with `left_out` set, except for the first num_prompts with signal; where none has
    any, except for the first num_prompts."""
    wanted_N = has_signal_N if any(has_signal_N) else [True] * len(groups_N)
    out, num_learned = [], 0
    for group, has_signal, is_wanted in zip(groups_N, has_signal_N, wanted_N, strict=True):
        if is_wanted and num_learned < num_prompts:
            out.append(group)
            num_learned += 1
        else:
            out.append(replace(group, left_out="surplus" if has_signal else "rejected"))
    return out


def group_metrics(groups_N: Sequence[RolloutGroup]) -> dict[str, float]:
    """How many groups were left out, and the mean reward of the others.

    That mean is biased: groups that are always or never solved are missing in it. `reward/mean` and
    all other statistics are over all groups that were sampled.
    """
    counts = Counter(group.left_out for group in groups_N)
    rewards = [r for group in groups_N if not group.left_out for r in group.rewards_G]
    return {
        "rollouts/rejected_groups": float(counts["rejected"]),
        "rollouts/surplus_groups": float(counts["surplus"]),
        "reward/learned_mean": sum(rewards) / len(rewards),
    }


def added_up(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Seconds and counts of a step's rounds."""
    first, *others = metrics
    total = dict(first)
    for one in others:
        for key, value in one.items():
            total[key] = total.get(key, 0.0) + value
    return total


def own_groups(batches: Sequence[Batch]) -> list[int]:
    """Which of all batches' groups, one batch after the other, this process sampled."""
    firsts = itertools.accumulate((len(one.scoring.prompts_N) for one in batches[:-1]), initial=0)
    return [
        first + index
        for first, one in zip(firsts, batches, strict=True)
        for index in one.scoring.own
    ]
