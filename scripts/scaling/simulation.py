"""Samplers, a learner, bounded staleness, long tails and failures: a discrete-event simulation.

The learner takes batches in order. The groups of batch b wait until version b - max_staleness has
reached the samplers; then each goes to the sampler with the fewest sequences, if it has room. An
engine decodes one token for all its sequences at a time, and takes longer the more it has. When a
batch is complete and the learner is free, it is learned from, which makes version b + 1. A sampler
that fails loses its unfinished groups, which are sampled again elsewhere, with the same lengths, as
their seeds are the same.

Time passes only in events: a sequence ends, a batch is learned from, a version arrives, a sampler
fails or is back.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import simpy

_EPSILON = 1e-9  # tokens


@dataclass(frozen=True)
class Design:
    """What is simulated. Seconds, unless another unit is named."""

    num_samplers: int
    num_prompts: int  # of a batch; each is a group
    num_samples: int  # of a group
    max_staleness: int
    num_slots: int  # sequences that one engine decodes together
    learn_s: float  # of a batch, from its start until its gradient step is done
    lengths: Callable[[int, int], list[int]]  # (batch, group) -> tokens of its completions
    decode_s: Callable[[int, float], float]  # (sequences, mean age in tokens) -> of a token
    prefill_s: float = 0.0  # of a group's prompt; nothing is decoded meanwhile
    hand_over_s: float = 0.0  # from the end of learning until all samplers have the version
    has_shares: bool = False  # group g belongs to sampler g modulo their number
    mean_s_to_failure: float = math.inf  # of one sampler
    restart_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_slots < self.num_samples:
            raise ValueError("an engine needs room for a whole group")


@dataclass
class Group:
    """One prompt's samples. Example: Group(batch=3, index=17, lengths=[210, 3400], version=2)."""

    batch: int
    index: int
    lengths: list[int]
    version: int = -1  # with which it is sampled
    num_left: int = 0  # sequences that still run


@dataclass
class Result:
    """What happened. Example: Result(ends=[12.0, 20.5], staleness=[0, 1], ...)."""

    ends: list[float] = field(default_factory=list)  # of each batch's learning
    staleness: list[int] = field(default_factory=list)  # of each group, when learned from
    learning_s: float = 0.0
    # Summed over samplers: time with any sequence, and time weighted with their number.
    busy_s: float = 0.0
    sequences_s: float = 0.0
    num_ended: int = 0  # sequences, whether or not their group was lost afterwards
    num_failures: int = 0
    num_lost: int = 0  # groups, which were sampled again

    def step_s(self, num_first: int = 0) -> float:
        """Mean seconds of a step after the first ones."""
        first = self.ends[num_first - 1] if num_first else 0.0
        return (self.ends[-1] - first) / (len(self.ends) - num_first)


def simulate(design: Design, num_steps: int) -> Result:
    """Runs until so many batches were learned from."""
    env = simpy.Environment()
    job = _Job(env, design, num_steps)
    env.run(until=env.process(job.learn()))
    for engine in job.engines:
        engine.advance()
    return job.result


class _Job:
    def __init__(self, env: simpy.Environment, design: Design, num_steps: int) -> None:
        self.env, self.design, self.num_steps = env, design, num_steps
        num_batches = num_steps + design.max_staleness + 1  # samplers run ahead to the end
        self.result = Result()
        self.engines = [_Engine(self, index) for index in range(design.num_samplers)]
        self.version = 0
        self.num_offered = 0  # batches
        self.num_done = [0] * num_batches  # groups of each batch
        self.versions: list[list[int]] = [[] for _ in range(num_batches)]
        self.is_complete = [env.event() for _ in range(num_batches)]
        self.waiting: deque[Group] = deque()
        # (sequences, number that breaks ties, sampler); only the newest entry of a sampler counts.
        self.loads: list[tuple[int, int, int]] = []
        self.tickets = itertools.count()
        self.newest = [-1] * design.num_samplers
        for engine in self.engines:
            self.note_load(engine)
            if math.isfinite(design.mean_s_to_failure):
                env.process(self.fail(engine))

    def learn(self) -> Generator[simpy.Event, Any, None]:
        """The learner."""
        self.offer()
        for batch in range(self.num_steps):
            yield self.is_complete[batch]
            self.result.staleness += [batch - version for version in self.versions[batch]]
            yield self.env.timeout(self.design.learn_s)
            self.result.learning_s += self.design.learn_s
            self.result.ends.append(self.env.now)
            self.env.process(self.hand_over(batch + 1))

    def hand_over(self, version: int) -> Generator[simpy.Event, Any, None]:
        """A version's way to the samplers."""
        yield self.env.timeout(self.design.hand_over_s)
        self.version = version
        self.offer()

    def offer(self) -> None:
        """The batches that the bound on staleness allows now."""
        design = self.design
        last = self.version + design.max_staleness + 1
        for batch in range(self.num_offered, last):
            for index in range(design.num_prompts):
                self.waiting.append(Group(batch, index, design.lengths(batch, index)))
        self.num_offered = last
        self.dispatch()

    def dispatch(self) -> None:
        """Gives waiting groups to the samplers that have room."""
        if self.design.has_shares:
            for _ in range(len(self.waiting)):
                group = self.waiting.popleft()
                engine = self.engines[group.index % len(self.engines)]
                if engine.has_room():
                    engine.start(group)
                else:
                    self.waiting.append(group)
            return
        while self.waiting and (chosen := self.least_loaded()) is not None:
            chosen.start(self.waiting.popleft())

    def note_load(self, engine: _Engine) -> None:
        """A sampler's number of sequences has changed."""
        ticket = next(self.tickets)
        self.newest[engine.index] = ticket
        heapq.heappush(self.loads, (len(engine.running), ticket, engine.index))

    def least_loaded(self) -> _Engine | None:
        """The sampler with the fewest sequences; None if it has no room."""
        while self.loads:
            _, ticket, index = self.loads[0]
            engine = self.engines[index]
            if self.newest[index] == ticket and engine.is_up:
                return engine if engine.has_room() else None
            heapq.heappop(self.loads)
        return None

    def ended(self, group: Group) -> None:
        """All sequences of a group have ended."""
        self.versions[group.batch].append(group.version)
        self.num_done[group.batch] += 1
        if self.num_done[group.batch] == self.design.num_prompts:
            self.is_complete[group.batch].succeed()

    def fail(self, engine: _Engine) -> Generator[simpy.Event, Any, None]:
        """A sampler fails now and then, and is started again."""
        rng = random.Random(f"{self.design.seed} {engine.index}")
        while True:
            yield self.env.timeout(rng.expovariate(1 / self.design.mean_s_to_failure))
            lost = engine.stop()
            self.result.num_failures += 1
            self.result.num_lost += len(lost)
            self.waiting.extendleft(sorted(lost, key=lambda g: (g.batch, g.index), reverse=True))
            self.dispatch()
            yield self.env.timeout(self.design.restart_s)
            engine.is_up = True
            self.note_load(engine)
            self.dispatch()


class _Engine:
    """A sampler. `clock` counts the tokens that a sequence has got which runs all the time."""

    def __init__(self, job: _Job, index: int) -> None:
        self.job, self.index, self.is_up = job, index, True
        self.running: list[tuple[float, int, Group, float]] = []  # (end, number, group, start)
        self.numbers = itertools.count()
        self.clock = self.starts = 0.0  # starts: sum over what runs
        self.updated = self.ready = 0.0  # seconds; nothing is decoded before `ready`
        self.token_s = 0.0
        self.timer = 0  # the newest; older ones do nothing

    def has_room(self) -> bool:
        """Whether a group more may start."""
        design = self.job.design
        return self.is_up and len(self.running) + design.num_samples <= design.num_slots

    def start(self, group: Group) -> None:
        """Samples a group with the present version."""
        self.advance()
        design, now = self.job.design, self.job.env.now
        group.version, group.num_left = self.job.version, len(group.lengths)
        for length in group.lengths:
            entry = (self.clock + length, next(self.numbers), group, self.clock)
            heapq.heappush(self.running, entry)
        self.starts += self.clock * len(group.lengths)
        self.ready = max(now, self.ready) + design.prefill_s
        self.job.note_load(self)
        self.set_timer()

    def stop(self) -> list[Group]:
        """Fails; returns the groups that are lost."""
        self.advance()
        lost = {id(group): group for _, _, group, _ in self.running}
        self.running, self.starts, self.is_up = [], 0.0, False
        self.timer += 1
        return list(lost.values())

    def advance(self) -> None:
        """Decodes up to now."""
        now, result = self.job.env.now, self.job.result
        if self.running:
            result.busy_s += now - self.updated
            result.sequences_s += (now - self.updated) * len(self.running)
            begin = max(self.updated, self.ready)
            if now > begin:
                self.clock += (now - begin) / self.token_s
        self.updated = now

    def set_timer(self) -> None:
        """Comes back when the next sequence ends."""
        self.timer += 1
        if not self.running:
            return
        number, env = len(self.running), self.job.env
        age = self.clock - self.starts / number
        self.token_s = self.job.design.decode_s(number, age)
        left = max(0.0, self.running[0][0] - self.clock)
        event = env.timeout(max(0.0, self.ready - env.now) + left * self.token_s, self.timer)
        event.callbacks.append(self.on_timer)

    def on_timer(self, event: Any) -> None:
        """Sequences end."""
        if event.value != self.timer:
            return
        self.advance()
        # Rounding may leave the clock a hair before the end.
        self.clock = max(self.clock, self.running[0][0])
        while self.running and self.running[0][0] <= self.clock + _EPSILON:
            _, _, group, start = heapq.heappop(self.running)
            self.starts -= start
            self.job.result.num_ended += 1
            group.num_left -= 1
            if group.num_left == 0:
                self.job.ended(group)
        self.job.note_load(self)
        self.set_timer()
        self.job.dispatch()
