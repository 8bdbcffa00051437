"""Metrics of one step: rollout statistics, seconds by phase, speed and peak memory.

Keys are grouped by slashes: `reward/`, `groups/`, `cot/`, `score/`, `data/`, `time/`, `speed/`,
`memory/`.
A number that is undefined (the length of correct answers when none is correct) has no key.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rl_lora.data.curriculum import draw_weight
from rl_lora.evaluation.scores import key_part
from rl_lora.types import Completion, Rollout, RolloutGroup


def rollout_metrics(
    groups_N: Sequence[RolloutGroup], position: Mapping[str, Any] | None = None
) -> dict[str, float]:
    """Statistics of one step's N groups; a pure function.

    `groups/*` count groups, `groups/*_rate` are their share of all N: solved_all (every sample
    correct), solved_none, mixed (some correct), tied (all rewards equal, so no gradient).
    `cot/tokens_*` are completion lengths in sampled tokens, end token included; quantiles are
    interpolated linearly. `episode/*` are of episodes of several turns: the mean number of turns,
    the share with more than one, and the mean number of the environment's tokens. `score/STATUS`
    counts rollouts by the verifier's status. Of a reward of several terms, `reward/TERM/*` are the
    term's own values, before its weight.

    Args:
        groups_N: the step's groups.
        position: of the prompt stream after the step's prompts. Where its sources have weights,
            `data/share/SOURCE` is the step's share of prompts, and `data/epochs/SOURCE` the passes
            over the source so far. With a curriculum `data/num_rated` counts the prompts with a
            pass rate, and `data/pass_rate` and `data/draw_weight` are their means.

    Raises:
        ValueError: no group, or a group without rollouts.
    """
    if not groups_N or any(not group.rollouts_G for group in groups_N):
        raise ValueError("rollout_metrics needs at least one group, and one rollout in each")
    rollouts = [rollout for group in groups_N for rollout in group.rollouts_G]
    num_rollouts = len(rollouts)
    rewards_by_source: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups_N:
        rewards_by_source[key_part(group.prompt.source)] += group.rewards_G
    metrics: dict[str, float] = {
        "rollouts/num": num_rollouts,
        "rollouts/prompt_tokens": sum(len(group.prompt.token_ids) for group in groups_N),
        "rollouts/completion_tokens": sum(r.completion.num_sampled for r in rollouts),
        "reward/mean": _mean([rollout.score.reward for rollout in rollouts]),
        "reward/correct_mean": _mean([rollout.score.correct for rollout in rollouts]),
        "reward/format_mean": _mean([rollout.score.has_format for rollout in rollouts]),
        # Mean over groups of the standard deviation within a group, which advantages come from.
        "reward/std_in_group": _mean([float(np.std(group.rewards_G)) for group in groups_N]),
    }
    for source, rewards in sorted(rewards_by_source.items()):
        metrics[f"reward/mean/{source}"] = _mean(rewards)
    metrics |= _term_metrics(groups_N) | _group_metrics(groups_N) | _length_metrics(rollouts)
    metrics |= _episode_metrics([rollout.completion for rollout in rollouts])
    statuses = Counter(rollout.score.status for rollout in rollouts)
    metrics |= {f"score/{key_part(status)}": count for status, count in sorted(statuses.items())}
    return metrics | _data_metrics(groups_N, position or {})


def _term_metrics(groups_N: Sequence[RolloutGroup]) -> dict[str, float]:
    """Of each term of the reward, over the groups that it applies to: its mean, also by source, and
    the mean over groups of its standard deviation within a group."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    stds: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups_N:
        source = key_part(group.prompt.source)
        for term, values_G in group.terms_G().items():
            values[f"reward/{term}/mean"] += values_G
            values[f"reward/{term}/mean/{source}"] += values_G
            stds[f"reward/{term}/std_in_group"].append(float(np.std(values_G)))
    return {key: _mean(found) for key, found in sorted((values | stds).items())}


def _data_metrics(
    groups_N: Sequence[RolloutGroup], position: Mapping[str, Any]
) -> dict[str, float]:
    counts = Counter(group.prompt.source for group in groups_N)
    metrics: dict[str, float] = {}
    for source, state in position.get("sources", {}).items():
        metrics[f"data/share/{key_part(source)}"] = counts[source] / len(groups_N)
        passes = state["epoch"] + state["position"] / state["num_prompts"]
        metrics[f"data/epochs/{key_part(source)}"] = passes
    if (curriculum := position.get("curriculum")) is not None:
        rates = [*curriculum["rates"].values()]
        metrics["data/num_rated"] = len(rates)
        if rates:
            metrics["data/pass_rate"] = _mean(rates)
            metrics["data/draw_weight"] = _mean([draw_weight(rate) for rate in rates])
    return metrics


def _group_metrics(groups_N: Sequence[RolloutGroup]) -> dict[str, float]:
    correct_N_G = [[rollout.score.correct for rollout in group.rollouts_G] for group in groups_N]
    counts = {
        "solved_all": sum(all(correct_G) for correct_G in correct_N_G),
        "solved_none": sum(not any(correct_G) for correct_G in correct_N_G),
        "mixed": sum(any(correct_G) and not all(correct_G) for correct_G in correct_N_G),
        "tied": sum(len(set(group.rewards_G)) == 1 for group in groups_N),
    }
    metrics: dict[str, float] = {"groups/num": len(groups_N)}
    for name, count in counts.items():
        metrics[f"groups/{name}"] = count
        metrics[f"groups/{name}_rate"] = count / len(groups_N)
    return metrics


def _length_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    lengths = [rollout.completion.num_sampled for rollout in rollouts]
    p10, p50, p90 = (float(quantile) for quantile in np.quantile(lengths, (0.1, 0.5, 0.9)))
    metrics: dict[str, float] = {
        "cot/tokens_mean": _mean(lengths),
        "cot/tokens_p10": p10,
        "cot/tokens_p50": p50,
        "cot/tokens_p90": p90,
        "cot/tokens_max": max(lengths),
        "cot/truncated_rate": _mean([rollout.completion.is_truncated for rollout in rollouts]),
    }
    for name, wanted in (("correct", True), ("wrong", False)):
        lengths_of = [r.completion.num_sampled for r in rollouts if r.score.correct is wanted]
        if lengths_of:
            metrics[f"cot/tokens_{name}_mean"] = _mean(lengths_of)
    return metrics


def _episode_metrics(completions: Sequence[Completion]) -> dict[str, float]:
    turns = [one.episode.num_turns for one in completions if one.episode is not None]
    if not turns:
        return {}
    return {
        "episode/turns_mean": _mean(turns),
        "episode/several_turns_rate": _mean([num > 1 for num in turns]),
        "episode/observation_tokens": _mean(
            [len(one.token_ids) - one.num_sampled for one in completions]
        ),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class PhaseTimer:
    """Wall-clock seconds by phase, per step and in total.

    Example:
        timer = PhaseTimer()
        with timer.phase("sample"):
            ...
        metrics |= timer.take()  # {"time/sample_s": 1.9, "time/step_s": 2.0}
    """

    def __init__(self) -> None:
        self.total_s: dict[str, float] = {}  # phase -> seconds since the timer was made
        self._step_s: dict[str, float] = {}
        self._step_start = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the block's seconds to `time/NAME_s`, even if it ends with an exception.

        A nested phase counts in both.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self._step_s[name] = self._step_s.get(name, 0.0) + seconds
            self.total_s[name] = self.total_s.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The step's `time/PHASE_s`, and `time/step_s`, which includes the time between phases.

        The next step starts now.
        """
        now = time.perf_counter()
        metrics = {f"time/{name}_s": seconds for name, seconds in self._step_s.items()}
        metrics["time/step_s"] = now - self._step_start
        self._step_s = {}
        self._step_start = now
        return metrics

    def add_to(self, metrics: dict[str, float]) -> None:
        """As `take`, for more of a step whose first part is among the metrics."""
        for key, seconds in self.take().items():
            metrics[key] = metrics.get(key, 0.0) + seconds


def speed_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Tokens per second, from counts and seconds among the metrics.

    `speed/sample_tokens_per_s` counts completion tokens, per second of `system/sampler_s` if given
    (the sampler's own time, whether or not the learner waited for it), else of `time/sample_s`;
    `speed/learn_tokens_per_s` counts `learn/tokens`, the prompt and completion tokens that went
    through the learner.
    """
    sampler_s = "system/sampler_s" if "system/sampler_s" in metrics else "time/sample_s"
    pairs = {
        "speed/sample_tokens_per_s": ("rollouts/completion_tokens", sampler_s),
        "speed/learn_tokens_per_s": ("learn/tokens", "time/learn_s"),
    }
    return {
        key: metrics[tokens] / metrics[seconds]
        for key, (tokens, seconds) in pairs.items()
        if tokens in metrics and metrics.get(seconds, 0.0) > 0
    }


def memory_metrics() -> dict[str, float]:
    """Peak memory so far in MB (10^6 bytes): resident set of this process, torch's on each GPU."""
    # getrusage returns kibibytes on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    metrics = {"memory/peak_resident_mb": peak / 1e6}
    for index in range(torch.cuda.device_count()):
        metrics[f"memory/peak_gpu{index}_mb"] = torch.cuda.max_memory_allocated(index) / 1e6
    return metrics
