"""Steps of one job on 1 to 4,096 GPUs, simulated for several designs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rl_lora.config import load_config
from rl_lora.models.shapes import build_on_meta, known_config
from rl_lora.planning.cards import Card
from rl_lora.planning.counts import parameter_counts
from rl_lora.planning.fit import Job
from rl_lora.planning.links import broadcast_s
from rl_lora.planning.speed import StepWork, step_work
from rl_lora.planning.split import STALENESS, Split, best_split
from scaling.lengths import Lengths, with_mean
from scaling.simulation import Design, simulate

# Of one GPU. 'The Llama 3 Herd of Models' (arXiv 2407.21783): 419 unexpected interruptions in 54
# days on 16,384 H100.
MEAN_S_TO_FAILURE = 54 * 24 * 3600 * 16384 / 419
TODAY = "each samples and learns"


@dataclass(frozen=True)
class Point:
    """One simulated design.

    Example: Point(design="staleness 2", num_gpus=64, num_samplers=43, num_completions=1024,
    estimated_s=39.4, step_s=41.0, sampler_busy=0.98, learner_busy=0.9, max_staleness=2, num_lost=0)
    """

    design: str
    num_gpus: int
    num_samplers: int
    num_completions: int  # of a step
    estimated_s: float  # by rl_lora.planning
    step_s: float
    sampler_busy: float  # share of their time with any sequence
    learner_busy: float
    max_staleness: int  # of any sample that was learned from
    num_lost: int  # groups that were sampled again


@dataclass(frozen=True)
class Scenario:
    """A job on GPUs of one kind, and how long its completions get."""

    work: StepWork
    cache_bytes: int
    spread: float  # sigma of the lengths' logarithms
    seed: int = 0

    def with_prompts(self, num_prompts: int) -> Scenario:
        """The same with another batch."""
        config = self.work.config
        sampling = config.sampling.model_copy(update={"num_prompts": num_prompts})
        changed = config.model_copy(update={"sampling": sampling})
        return replace(self, work=replace(self.work, config=changed))

    def lengths(self) -> Callable[[int, int], list[int]]:
        """The lengths of a group: those whose mean the plan assumes."""
        sampling = self.work.config.sampling
        found: Lengths = with_mean(self.work.mean_tokens, self.spread, sampling.max_tokens)

        def of(batch: int, group: int) -> list[int]:
            drawn = found.draw((self.seed, batch, group), sampling.num_samples)
            return [int(tokens) for tokens in drawn]

        return of


def load_scenario(config_path: Path, card: Card, spread: float) -> Scenario:
    """The job of a configuration, with the KV cache that an engine has on one of 8 GPUs."""
    config = load_config(config_path)
    shape = known_config(config.model.name)
    if shape is None:
        raise ValueError(f"{config.model.name} is not among the models whose shapes are known")
    counts = parameter_counts(build_on_meta(shape), config.lora)
    job = Job(config, shape, counts.base, counts.trainable, card.num_bytes, num_ranks=8)
    cache_bytes = sum(part.num_bytes for part in job.parts() if part.part == "KV cache")
    return Scenario(step_work(config, shape, counts, card), cache_bytes, spread)


def today(scenario: Scenario, num_gpus: int) -> tuple[Design, float]:
    """Each process samples its share of the prompts, then all learn; (design, estimated step)."""
    work = replace(scenario.work, num_ranks=num_gpus)
    learn_s = work.learn_s() + work.all_reduce_s() + work.switch_s()
    estimated_s = work.sampling(work.num_at_once(scenario.cache_bytes)).total_s
    estimated_s += learn_s + work.hand_over_s()
    design = Design(
        num_samplers=num_gpus,
        max_staleness=0,
        learn_s=learn_s,
        hand_over_s=work.hand_over_s(),
        has_shares=True,
        **_sampling(scenario),
    )
    return design, estimated_s


def divided(scenario: Scenario, split: Split) -> Design:
    """Samplers and learners apart."""
    work = scenario.work
    learners = replace(work, num_ranks=split.num_learners)
    return Design(
        num_samplers=split.num_samplers,
        max_staleness=split.max_staleness,
        learn_s=learners.learn_s() + learners.all_reduce_s(),
        hand_over_s=work.hand_over_s() + broadcast_s(work.version_bytes, split.num_samplers),
        **_sampling(scenario),
    )


def _sampling(scenario: Scenario) -> dict[str, Any]:
    """What all designs have in common."""
    work, prompt = scenario.work, scenario.work.prompt_tokens
    sampling = work.config.sampling
    return {
        "num_prompts": sampling.num_prompts,
        "num_samples": sampling.num_samples,
        "num_slots": max(sampling.num_samples, work.num_slots(scenario.cache_bytes)),
        "lengths": scenario.lengths(),
        "decode_s": lambda number, age: work.decode(number, prompt + age).total_s,
        "prefill_s": work.prefill_s(1),
        "seed": scenario.seed,
    }


def points(scenario: Scenario, num_gpus: int) -> Iterator[Point]:
    """All designs on so many GPUs."""
    if num_gpus <= scenario.work.config.sampling.num_prompts:
        design, estimated_s = today(scenario, num_gpus)
        yield point(TODAY, design, estimated_s, num_gpus)
    if num_gpus == 1:
        return
    for bound in STALENESS:
        split = best_split(scenario.work, scenario.cache_bytes, num_gpus, bound)
        name = f"divided, staleness {bound}"
        yield point(name, divided(scenario, split), split.seconds, num_gpus)


def point(name: str, design: Design, estimated_s: float, num_gpus: int, least: int = 4) -> Point:
    """Simulates until the steady state, and measures at least so many steps from there."""
    # What starts together ends together, so that steps come in turns of max_staleness + 1.
    turn = design.max_staleness + 1
    num_first = 1 + turn
    found = simulate(design, num_steps=num_first + turn * math.ceil(least / turn))
    total_s = found.ends[-1]
    return Point(
        design=name,
        num_gpus=num_gpus,
        num_samplers=design.num_samplers,
        num_completions=design.num_prompts * design.num_samples,
        estimated_s=estimated_s,
        step_s=found.step_s(num_first),
        sampler_busy=found.busy_s / (total_s * design.num_samplers),
        learner_busy=found.learning_s / total_s,
        max_staleness=max(found.staleness),
        num_lost=found.num_lost,
    )


def curve(scenario: Scenario, largest: int) -> tuple[list[Point], list[Point]]:
    """(the job's own batch, a batch that grows with the GPUs from the job's own on)."""
    numbers = [2**power for power in range(int(math.log2(largest)) + 1)]
    own = [found for number in numbers for found in points(scenario, number)]
    grown = []
    for number in numbers[::2]:
        num_prompts = max(scenario.work.config.sampling.num_prompts, number)
        grown += list(points(scenario.with_prompts(num_prompts), number))
    return own, grown


def with_failures(
    scenario: Scenario, num_gpus: int, every_s: float, restart_s: float
) -> list[tuple[Point, Point]]:
    """(undisturbed, with a failure of some sampler every so many seconds) by bound on staleness."""
    pairs = []
    for bound in STALENESS:
        split = best_split(scenario.work, scenario.cache_bytes, num_gpus, bound)
        calm = divided(scenario, split)
        failing = replace(calm, mean_s_to_failure=every_s * split.num_samplers, restart_s=restart_s)
        name = f"divided, staleness {bound}"
        undisturbed, disturbed = (
            point(name, one, split.seconds, num_gpus, least=40) for one in (calm, failing)
        )
        pairs.append((undisturbed, disturbed))
    return pairs


def as_rows(found: list[Point]) -> list[dict[str, object]]:
    """For JSON."""
    return [asdict(one) for one in found]
