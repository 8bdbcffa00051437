"""The supervised loop: a batch, one optimizer step on the log loss, the test loss along the way.

Tests come at geometrically spaced steps (1, 2, 4, ...), for learning curves over log steps.
Metrics: `sft/loss` (nats per completion token of the step's batch, before the step) and `test/nll`
with its 95 % interval.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora import distributed
from rl_lora.adapters.files import save_adapter, version_in
from rl_lora.batches import pack_samples
from rl_lora.build import make_learner, open_folder, open_model
from rl_lora.config.sft import SftConfig
from rl_lora.launchers import interruption
from rl_lora.models.resolve import check_rows
from rl_lora.report.terminal import Display
from rl_lora.runs.checkpoint import (
    clean,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from rl_lora.runs.inputs import base_inputs, sequence_inputs
from rl_lora.runs.log import METRICS_FILE, RunLog, stored, unstored
from rl_lora.runs.metrics import PhaseTimer, memory_metrics, speed_metrics
from rl_lora.runs.processes import check_same_inputs
from rl_lora.runs.record import with_absolute_paths, write_record
from rl_lora.runs.start import Start
from rl_lora.sft.data import SftSets, load_sft, step_indices
from rl_lora.sft.held_out_loss import mean_with_interval, sequence_nll
from rl_lora.storage import jsonl
from rl_lora.storage.directories import atomic_directory

if TYPE_CHECKING:
    from rl_lora.learner import Learner
    from rl_lora.policy import Policy


@dataclass(frozen=True)
class SftOutcome:
    """The result of a supervised run."""

    folder: Path
    before: float  # test loss of the base, nats per token
    after: float


@dataclass(frozen=True)
class _Job:
    config: SftConfig
    learner: Learner
    sets: SftSets
    inputs: dict[str, Any]  # hashes of base and data, for the checkpoints
    log: RunLog
    display: Display
    timer: PhaseTimer


@dataclass
class _State:
    step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # the step's, if its line is to come


def curve_steps(num_steps: int, num_tests: int, every: int = 0) -> list[int]:
    """Steps after which the test loss is measured: num_tests at equal ratios up to the last step,
    and every `every`-th (0: none)."""
    if num_steps == 0:
        return []
    ratio = num_steps ** (1 / num_tests)
    steps = {max(1, round(ratio**power)) for power in range(1, num_tests + 1)} | {num_steps}
    if every:
        steps |= set(range(every, num_steps + 1, every))
    return sorted(steps)


def fine_tune(
    config: SftConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    accept_changed_data: bool = False,
) -> SftOutcome:
    """Runs a supervised job to its end and leaves everything in its run folder; the arguments are
    those of `rl_lora.train.train`.

    Raises:
        UserError: bad input, an older run in the folder, another process using it, or a full disk.
        FloatingPointError: the gradient is not finite.
        Interrupted: by a signal; steps that are done are in a checkpoint.
    """
    config = with_absolute_paths(config)
    folder = config.run.folder
    with (
        interruption.handled(),
        distributed.joined(config.model.device, config.run.process_timeout_s),
        open_folder(config, resume=resume, quiet=quiet) as (display, start),
    ):
        is_done = distributed.from_main(
            lambda: start.log_step == config.run.num_steps == version_in(folder / "adapter"),
            "the start",
        )
        if is_done:
            outcome = _outcome(folder)
            display.note(f"{folder} is complete: {config.run.num_steps} steps done")
        else:
            outcome = _run(start.keep_dtype(config), start, display, accept_changed_data)
        display.note(
            f"test loss {outcome.before:.4f} before, {outcome.after:.4f} after (nats per token); "
            f"everything is in {folder}"
        )
    return outcome


def _run(
    config: SftConfig, start: Start, display: Display, accept_changed_data: bool
) -> SftOutcome:
    folder = config.run.folder
    with RunLog(
        folder,
        config.run.loggers,
        resume_step=start.log_step,
        config=config.model_dump(mode="json"),
    ) as log:
        policy, sets = _prepare(config, display)
        data = {"train": sequence_inputs(sets.train), "eval": sequence_inputs(sets.test)}
        inputs: dict[str, Any] = {"base": base_inputs(policy), "data": data}
        check_same_inputs(inputs)
        if not accept_changed_data:
            start.check_inputs(inputs, folder)
        learner = make_learner(
            policy, config.optim, num_steps=config.run.num_steps, on_note=display.note
        )
        job = _Job(config, learner, sets, inputs, log, display, PhaseTimer())
        if distributed.is_main():
            write_record(config, policy, inputs)
        state = _State()
        if start.checkpoint is not None:
            state = _restore(job, start.checkpoint)
            display.note(f"resumed from {start.checkpoint}")
        if distributed.is_main():
            clean(folder, start.state.get("step", -1), config.run.keep_last)
        if start.checkpoint is None:
            log.write(0, _test(job))
            _save(job, state)
        _loop(job, state)
        policy.check_base(inputs["base"]["fingerprint"])
        _publish(policy, folder, config)
    return _outcome(folder)


def _prepare(config: SftConfig, display: Display) -> tuple[Policy, SftSets]:
    from rl_lora.policy import open_policy

    model_dir, tokenizer, context = open_model(config.model, display.note)
    sets = load_sft(config.data, tokenizer, context, config.run.seed)
    for note in sets.notes:
        display.note(note)
    samples = (row.sample() for row in (*sets.train, *sets.test))
    check_rows((s.prompt_ids + s.completion_ids for s in samples), tokenizer, model_dir)
    policy = open_policy(
        model_dir,
        config.model,
        config.lora,
        seed=config.run.seed,
        checkpoint_activations=config.optim.checkpoint_activations,
    )
    return policy, sets


def _restore(job: _Job, checkpoint: Path) -> _State:
    saved = load_checkpoint(checkpoint, job.learner)
    state = _State(saved["step"])
    if not job.log.has_line(state.step):
        state.metrics = unstored(saved.get("metrics", {}))
    return state


def _save(job: _Job, state: _State) -> None:
    more = {"inputs": job.inputs, "metrics": stored(state.metrics)}
    save_checkpoint(state.step, job.learner, job.config, **more)


def _loop(job: _Job, state: _State) -> None:
    config, run, timer = job.config, job.config.run, job.timer
    tests = set(curve_steps(run.num_steps, config.sft.num_tests, run.eval_every))
    job.display.stage("fine-tuning", run.num_steps, state.step)
    timer.take()

    def save_now() -> None:
        if not has_checkpoint(run.folder, state.step):
            _save(job, state)

    with interruption.steps(save_now):
        if state.metrics:  # a signal has ended the run in this step's test
            _complete_step(job, state, tests)
        while state.step < run.num_steps:
            distributed.agree_to_stop("the start of a step")
            step, num_rows = state.step + 1, len(job.sets.train)
            with timer.phase("learn"):
                batch = step_indices(step, config.sft.batch_size, num_rows, run.seed)
                metrics = _step(job, batch)
            state.step, state.metrics = step, metrics | timer.take()
            _complete_step(job, state, tests)
        distributed.agree_to_stop("the end of the steps")


def _complete_step(job: _Job, state: _State, tests: set[int]) -> None:
    """What follows an optimizer step: a test if one is due, the step's line, a checkpoint."""
    run, metrics = job.config.run, state.metrics
    if state.step in tests:
        with job.timer.phase("eval"), interruption.abandonable():
            metrics |= _test(job)
    job.timer.add_to(metrics)
    metrics |= memory_metrics()
    job.log.write(state.step, metrics | speed_metrics(metrics))
    job.display.step(state.step, metrics)
    state.metrics = {}
    if state.step % run.checkpoint_every == 0 or state.step == run.num_steps:
        _save(job, state)


def _step(job: _Job, indices: list[int]) -> dict[str, float]:
    samples = [job.sets.train[index].sample() for index in indices]
    (microbatches,) = pack_samples(
        samples,
        microbatch_tokens=job.learner.microbatch_tokens,
        num_ranks=distributed.world_size(),
    )
    num_tokens = sum(batch.num_tokens for batch in microbatches)
    num_padded = sum(batch.token_ids_BT.numel() for batch in microbatches)
    counts = {
        "learn/tokens": float(num_tokens),
        "learn/completion_tokens": float(sum(len(s.completion_ids) for s in samples)),
        "learn/padding_fraction": 1 - num_tokens / num_padded,
    }
    return job.learner.fit(microbatches) | counts


def _test(job: _Job) -> dict[str, float]:
    samples = [sequence.sample() for sequence in job.sets.test]
    learner = job.learner
    return mean_with_interval(*sequence_nll(learner.policy, samples, learner.microbatch_tokens))


def _publish(policy: Policy, folder: Path, config: SftConfig) -> None:
    """Writes RUN/adapter, which has the whole model in full fine-tuning."""
    adapter = save_adapter(
        policy, folder / "adapters", version=config.run.num_steps, run_name=config.run.name
    )
    if not distributed.is_main():
        return
    with atomic_directory(folder / "adapter") as scratch:
        for file in adapter.path.iterdir():  # moved, not copied: a full model is large
            file.rename(scratch / file.name)
    shutil.rmtree(folder / "adapters", ignore_errors=True)


def _outcome(folder: Path) -> SftOutcome:
    return distributed.from_main(lambda: _read_outcome(folder), "the end")


def _read_outcome(folder: Path) -> SftOutcome:
    tests = [r["test/nll"] for r in jsonl.read_lines(folder / METRICS_FILE) if "test/nll" in r]
    first, last = (math.nan if value is None else value for value in (tests[0], tests[-1]))
    return SftOutcome(folder, first, last)
