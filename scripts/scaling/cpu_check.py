"""Estimated and measured steps on this CPU: three measured rates, then steps of other sizes.

The same estimate that `rl-lora train --dry-run` prints for GPUs, with this machine's own rates in
place of a data sheet's: seconds of a decoding step, products a second, and the learner's share of
its bound. They are measured at the two sizes CALIBRATION. All completions have the same length.

Seconds are those of the processor, with one thread for operators, so that other work on the machine
disturbs little.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from benchmarks.our_arms import bench_prompts, made_up_groups, packed
from benchmarks.workload import Size, config
from rich.console import Console
from rich.table import Table

from rl_lora.build import make_learner
from rl_lora.models.shapes import build_on_meta
from rl_lora.planning.cards import Card
from rl_lora.planning.counts import parameter_counts
from rl_lora.planning.roofline import Assumptions
from rl_lora.planning.speed import StepTime, step_time
from rl_lora.policy import Policy, open_policy
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.types import Prompt, SampleParams

ALLOWED = 0.25  # difference of estimate and measurement
CARD = Card("this CPU", 1, tflops=1, terabytes_s=1, link_gb_s=1e12)  # rates are in Assumptions
UNIT = Assumptions(  # before anything is measured
    products=1.0,
    bandwidth=1e9,
    attention_forward=1.0,
    attention_backward=1.0,
    learner=1.0,
    engine_step_s=0.0,
    engine_sequence_s=0.0,
    lora_layer_s=0.0,
    hand_over_s=0.0,
    mean_share=1e6,
    prompt_tokens=1,
    number_bytes=4,
)


@dataclass(frozen=True)
class Equal(Size):
    """A size whose completions all have max_tokens."""

    def lengths(self) -> list[int]:
        """Completion lengths, tokens, prompt by prompt."""
        return [self.max_tokens] * (self.num_prompts * self.num_samples)


CALIBRATION = (Equal(1, 8, 8), Equal(4, 8, 8))
OTHERS = (Equal(2, 8, 16), Equal(4, 4, 24), Equal(1, 16, 12), Equal(6, 4, 6))


@dataclass(frozen=True)
class Measured:
    """Processor seconds. Example: Measured(size=Equal(1, 8, 16), sample_s=1.9, learn_s=2.1)."""

    size: Equal
    sample_s: float
    learn_s: float


def check(folder: Path) -> int:
    """Measures, prints and writes a table; 1 if an estimate is off by over ALLOWED."""
    torch.set_num_threads(1)
    largest = Equal(max(size.num_prompts for size in (*CALIBRATION, *OTHERS)), 16, 24)
    prompts, tokenizer, model_dir = bench_prompts(largest)
    settings = config(largest)
    policy = open_policy(model_dir, settings.model, settings.lora, seed=0)
    sampler = TorchSampler(policy, tokenizer=tokenizer, end_token_ids=[])  # to the limit
    learner = make_learner(policy, settings.optim, num_steps=1000)

    def measured(size: Equal) -> Measured:
        chosen = list(prompts[: size.num_prompts])
        params = SampleParams(size.num_samples, size.max_tokens, temperature=1.0)
        batches = packed(made_up_groups(chosen, size), learner.microbatch_tokens)
        return Measured(
            size,
            processor_s(lambda: sampler.sample(chosen, params)),
            processor_s(lambda: learner.update(batches)),
        )

    measured(CALIBRATION[0])  # warms up
    base = [measured(size) for size in CALIBRATION]
    assumed = calibrated(policy, prompts, base)
    rows = [(one, estimate(policy, one.size, assumed)) for one in (*base, *map(measured, OTHERS))]
    Console(width=120).print(table(rows))
    found = {"assumed": asdict(assumed), "rows": [(asdict(m), asdict(e)) for m, e in rows]}
    (folder / "cpu.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    off = [one.size for one, found in rows if abs(ratio(one, found) - 1) > ALLOWED]
    print(f"off by over {ALLOWED:.0%}: {off}" if off else f"all within {ALLOWED:.0%}")
    return 1 if off else 0


def processor_s(work: Callable[[], object]) -> float:
    """Seconds of all threads."""
    gc.collect()
    start = time.process_time()
    work()
    return time.process_time() - start


def estimate(policy: Policy, size: Equal, assumed: Assumptions) -> StepTime:
    """A step of this size. A huge mean share cuts all completions at the limit."""
    model_config = policy.model.config
    counts = parameter_counts(build_on_meta(model_config), policy.lora)
    return step_time(config(size), model_config, counts, 2**50, CARD, 1, assumed)


def calibrated(policy: Policy, prompts: list[Prompt], base: list[Measured]) -> Assumptions:
    """The rates with which the estimates of two sizes are what was measured.

    Sampling takes (steps) x (seconds of a step) + (products) / (products a second), linear in what
    is unknown. Bytes take no time: small batches read the weights within a step's seconds.
    """
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts) / len(prompts)
    unit = replace(UNIT, prompt_tokens=round(num_tokens))
    small, large = base
    work_small, work_large = (estimate(policy, one.size, unit).sample_s for one in base)
    steps = small.size.max_tokens  # the same in both
    rate = (work_large - work_small) / (large.sample_s - small.sample_s)
    step_s = (small.sample_s - work_small / rate) / steps
    known = replace(
        unit,
        products=rate,
        attention_forward=rate,
        attention_backward=rate,
        engine_step_s=max(0.0, step_s),
    )
    bound_s = estimate(policy, large.size, known).learn_s
    return replace(known, learner=bound_s / large.learn_s)


def ratio(measured: Measured, found: StepTime) -> float:
    """Estimate / measurement of a step."""
    return found.total_s / (measured.sample_s + measured.learn_s)


def table(rows: list[tuple[Measured, StepTime]]) -> Table:
    """A row for each size; those of CALIBRATION first."""
    columns = ("prompts x samples x tokens", "sampling", "estimated", "learning", "estimated")
    found = Table(*columns, "step", "estimated", "ratio", title="Processor seconds")
    for one, time_of in rows:
        size = one.size
        found.add_row(
            f"{size.num_prompts} x {size.num_samples} x {size.max_tokens}"
            + (" (calibration)" if size in CALIBRATION else ""),
            f"{one.sample_s:.2f}",
            f"{time_of.sample_s:.2f}",
            f"{one.learn_s:.2f}",
            f"{time_of.learn_s:.2f}",
            f"{one.sample_s + one.learn_s:.2f}",
            f"{time_of.total_s:.2f}",
            f"{ratio(one, time_of):.2f}",
        )
    return found
