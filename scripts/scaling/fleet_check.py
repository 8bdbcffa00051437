"""Predicted and measured steps of a small job with 1 and 2 samplers in Ray actors on this CPU.

The job with one sampler gives the rates: seconds of a decoding step, with its share of what Ray
takes to send a group, and of all that is not sampling. From them the simulation predicts the other
jobs, with the recorded lengths, and so does the plan's estimate, which knows their mean only. A
sampler decodes one group at a time, with one thread. There are as many cores as samplers: with
staleness they also do the learner's work, which bounds a step from below.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq

from rl_lora.config import load_config
from rl_lora.config.shipped import find_config
from rl_lora.models.shapes import build_on_meta, known_config
from rl_lora.planning.counts import parameter_counts
from rl_lora.planning.speed import StepWork, step_work
from rl_lora.planning.split import split_time
from scaling.cpu_check import ALLOWED, CARD, UNIT
from scaling.simulation import Design, simulate

NUM_STEPS, NUM_FIRST = 14, 2  # the first ones are not measured
FLEETS = ((1, 0), (2, 0), (2, 1))  # (samplers, bound on staleness); the first gives the rates


@dataclass(frozen=True)
class Rates:
    """Of the job with one sampler.

    Example: Rates(token_s=0.0016, other_s=0.18, lengths=[[[15, 9], [20, 11]], ...])
    """

    token_s: float  # one decoding step of a group, with its share of the prompt and of Ray's work
    other_s: float  # of a step: all but sampling
    lengths: list[list[list[int]]]  # [step][prompt][sample], tokens


@dataclass(frozen=True)
class Row:
    """A job with samplers elsewhere.

    Example: Row(num_samplers=2, max_staleness=0, step_s=0.77, simulated_s=0.75, estimated_s=0.7,
    idle=0.27, simulated_idle=0.25)
    """

    num_samplers: int
    max_staleness: int
    step_s: float  # median
    simulated_s: float
    estimated_s: float
    idle: float  # share of the samplers' time without anything to sample; median
    simulated_idle: float

    @property
    def is_predicted(self) -> bool:
        """Whether the step is simulated within ALLOWED, and the idle share within that, too."""
        is_near = abs(self.simulated_s / self.step_s - 1) <= ALLOWED
        return is_near and abs(self.simulated_idle - self.idle) <= ALLOWED


def check(folder: Path) -> int:
    """Runs the jobs, prints and writes a table; 1 if a prediction is off by over ALLOWED."""
    with tempfile.TemporaryDirectory(prefix="jobs-", dir=folder) as scratch:
        runs = Path(scratch)
        jobs = [measured(runs, *fleet) for fleet in FLEETS]
        found = rates(jobs[0])
        rows = [
            row(found, *fleet, read_metrics(run)) for fleet, run in zip(FLEETS, jobs, strict=True)
        ]
    Console(width=120).print(table(rows))
    result = {"token_s": found.token_s, "other_s": found.other_s, "rows": [*map(asdict, rows)]}
    (folder / "fleet.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    off = [(one.num_samplers, one.max_staleness) for one in rows if not one.is_predicted]
    print(f"off by over {ALLOWED:.0%}: {off}" if off else f"all within {ALLOWED:.0%}")
    return 1 if off else 0


def measured(folder: Path, num_samplers: int, max_staleness: int) -> Path:
    """Runs a job on as many cores as it has samplers; returns its folder."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_samplers:
        raise SystemExit(f"{num_samplers} samplers need as many cores; there are {len(cores)}")
    name = f"samplers-{num_samplers}-staleness-{max_staleness}"
    settings = [
        f"resources.samplers={num_samplers}",
        'resources.ray_address="local"',
        "sampling.max_num_seqs=8",
        f"sampling.max_staleness={max_staleness}",
        "data.held_out=8",
        f"run.num_steps={NUM_STEPS}",
        f"run.output_dir={folder}",
        f"run.name={name}",
        "run.transcripts_per_step=1000000",
    ]
    os.sched_setaffinity(0, cores[:num_samplers])
    try:
        subprocess.run(
            [sys.executable, "-m", "rl_lora", "train", "smoke", *settings],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
        )
    finally:
        os.sched_setaffinity(0, cores)
    return folder / name


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The steps that count."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines][NUM_FIRST:]


def rates(run: Path) -> Rates:
    """Of a run with one sampler and all of its transcripts."""
    rows = [json.loads(line) for line in (run / "transcripts.jsonl").open(encoding="utf-8")]
    lengths = [
        [
            [one["tokens"] for one in of_prompt]
            for _, of_prompt in itertools.groupby(of_step, lambda one: one["prompt_id"])
        ]
        for _, of_step in itertools.groupby(rows, lambda one: one["step"])
    ]
    metrics = read_metrics(run)
    decoded = [sum(map(max, step)) for step in lengths[NUM_FIRST:]]  # steps of the engine
    sampled = zip(metrics, decoded, strict=True)
    return Rates(
        token_s=statistics.median(one["system/sampler_s"] / steps for one, steps in sampled),
        other_s=statistics.median(one["time/step_s"] - one["time/sample_s"] for one in metrics),
        lengths=lengths,
    )


def row(
    found: Rates, num_samplers: int, max_staleness: int, metrics: Sequence[dict[str, float]]
) -> Row:
    """What was predicted and measured."""
    steps, num_samples = found.lengths, len(found.lengths[0][0])
    design = Design(
        num_samplers=num_samplers,
        num_prompts=len(steps[0]),
        num_samples=num_samples,
        max_staleness=max_staleness,
        num_slots=num_samples,
        learn_s=found.other_s,
        lengths=lambda batch, group: steps[batch % len(steps)][group],
        decode_s=lambda number, age: found.token_s,
    )
    simulated = simulate(design, NUM_STEPS)
    least_s = cores_s(found, num_samplers) if max_staleness else 0.0
    busy = simulated.busy_s / (simulated.ends[-1] * num_samplers)
    return Row(
        num_samplers,
        max_staleness,
        step_s=statistics.median(one["time/step_s"] for one in metrics),
        simulated_s=max(simulated.step_s(NUM_FIRST), least_s),
        estimated_s=max(estimated_s(found, num_samplers, max_staleness), least_s),
        idle=statistics.median(one["fleet/idle_share"] for one in metrics),
        simulated_idle=max(0.0, 1 - busy),
    )


def cores_s(found: Rates, num_cores: int) -> float:
    """All work of a step, divided by the cores."""
    steps = statistics.mean(sum(map(max, step)) for step in found.lengths)
    return (steps * found.token_s + found.other_s) / num_cores


def estimated_s(found: Rates, num_samplers: int, max_staleness: int) -> float:
    """The plan's estimate from the same rates and the lengths' mean."""
    work = plan_work(found)
    return split_time(work, 2**50, num_samplers, 1, max_staleness).seconds


def plan_work(found: Rates) -> StepWork:
    """A step of the job as the plan sees it, with the rates in place of a data sheet's."""
    config = load_config(find_config(Path("smoke")), ["sampling.max_num_seqs=8"])
    shape = known_config(config.model.name)
    assert shape is not None
    share = _mean_share(found, config.sampling.max_tokens)
    assumed = replace(UNIT, products=1e9, engine_step_s=found.token_s, mean_share=share)
    work = step_work(config, shape, parameter_counts(build_on_meta(shape), config.lora), CARD)
    work = replace(work, assumed=assumed)
    return replace(work, assumed=replace(assumed, learner=work.learn_s() / found.other_s))


def _mean_share(found: Rates, limit: int) -> float:
    """Of the limit, the exponential distribution's mean that is cut to the recorded one."""
    tokens = [length for step in found.lengths for group in step for length in group]
    mean = statistics.mean(tokens) / limit
    return float(brentq(lambda share: share * (1 - math.exp(-1 / share)) - mean, mean, 1e3))


def table(rows: Sequence[Row]) -> Table:
    """A row for each job."""
    found = Table("samplers", "staleness", "step", "simulated", "ratio", "estimated", "ratio")
    found.add_column("samplers idle")
    found.add_column("simulated")
    for one in rows:
        found.add_row(
            f"{one.num_samplers}",
            f"{one.max_staleness}",
            f"{one.step_s:.2f} s",
            f"{one.simulated_s:.2f} s",
            f"{one.simulated_s / one.step_s:.2f}",
            f"{one.estimated_s:.2f} s",
            f"{one.estimated_s / one.step_s:.2f}",
            f"{one.idle:.0%}",
            f"{one.simulated_idle:.0%}",
        )
    return found
