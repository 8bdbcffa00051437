"""The loop: prompts, rollouts, rewards, advantages, one optimizer step, a new adapter version."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rl_lora import distributed
from rl_lora.batches import pack
from rl_lora.build import RunContext, make_evaluation, make_learner, open_folder, open_run
from rl_lora.config import RunConfig
from rl_lora.config.checks import unbounded_staleness
from rl_lora.data.stream import PromptStream
from rl_lora.evaluation.best import drop_best_after, is_best_step, update_best
from rl_lora.evaluation.evaluate import Evaluation, evaluate, remove_results_after, set_aside
from rl_lora.evaluation.scores import EvalResult
from rl_lora.export.push import Pushes
from rl_lora.launchers import interruption
from rl_lora.overlap import RolloutWorker, make_request, requests
from rl_lora.penalties import loss_terms, step_advantages
from rl_lora.prompts import PromptSets
from rl_lora.report.outcome import Outcome, evaluation_name, finished, result_of, summary
from rl_lora.report.run_figures import draw_figures
from rl_lora.report.terminal import Display
from rl_lora.runs.checkpoint import clean
from rl_lora.runs.inputs import base_inputs, prompt_inputs
from rl_lora.runs.log import RunLog
from rl_lora.runs.machine import MachineMeter
from rl_lora.runs.metrics import PhaseTimer, memory_metrics, rollout_metrics, speed_metrics
from rl_lora.runs.nonfinite import NonfiniteSteps
from rl_lora.runs.processes import check_same_inputs
from rl_lora.runs.record import with_absolute_paths, write_record
from rl_lora.runs.start import Start
from rl_lora.samplers import cpu_memory
from rl_lora.samplers.dynamic import StepSampler
from rl_lora.samplers.liveness import (
    VersionCheck,
    check_at_start,
    check_step,
    check_version,
    described,
    drop_stale,
)
from rl_lora.sft.warm_start import has_solutions, warm_start
from rl_lora.state import State, publish, restore, save, save_once, saved_at_limit, with_handover
from rl_lora.storage.directories import atomic_directory
from rl_lora.types import RolloutGroup

if TYPE_CHECKING:
    from rl_lora.learner import Learner
    from rl_lora.policy import Policy


@dataclass(frozen=True)
class Parts:
    """The objects that a run's steps work with, the same from start to end."""

    job: RunContext
    learner: Learner
    rounds: StepSampler
    evaluation: Evaluation
    display: Display
    log: RunLog
    timer: PhaseTimer
    nonfinite: NonfiniteSteps
    inputs: dict[str, Any]  # hashes of base model and data, for the record and checkpoints
    pushes: Pushes


def loop(parts: Parts, state: State) -> None:
    """Step k learns from samples of version k - 1, or older (`sampling.max_staleness`), and
    publishes version k.

    Raises:
        Interrupted: by a signal; what is done is in a checkpoint.
    """
    config, worker, timer = parts.job.config.run, parts.rounds.worker, parts.timer
    parts.display.stage("training", config.num_steps, state.step)
    check = VersionCheck(parts.job.policy, parts.job.config.sampling.temperature)
    timer.take()
    save_now = partial(save_once, parts.job, parts.learner, state, parts.inputs)
    with MachineMeter() as meter, worker, interruption.steps(save_now):
        if state.metrics:  # a signal has ended the run in this step's evaluation
            complete_step(parts, state, meter)
        while state.step < config.num_steps:
            assert state.adapter is not None
            found = parts.rounds.sample(state.step + 1, state.adapter, state.older)
            with timer.phase("learn"):
                check.check(found.groups_N, state.step, found.own)
                stats = learn(parts.job, parts.learner, found.learned_N, state.step)
            state.advance(found.groups_N, found.position)
            with timer.phase("publish"):
                worker.offer(publish(parts.job, state))
            state.metrics = rollout_metrics(found.groups_N, state.position) | stats
            state.metrics |= found.metrics | timer.take()
            parts.log.transcripts(state.step, found.groups_N)
            parts.nonfinite.keep(state.step, state.metrics, found.learned_N)
            complete_step(parts, state, meter)
        distributed.agree_to_stop("the end of the steps")


def complete_step(parts: Parts, state: State, meter: MachineMeter) -> None:
    """What follows a version's publication: its evaluation, the step's line, a checkpoint."""
    config, metrics = parts.job.config.run, state.metrics
    if has_evaluation := is_due(config.eval_every, state.step):
        metrics |= evaluate_policy(parts, state).metrics()
    parts.timer.add_to(metrics)
    metrics |= memory_metrics() | meter.take()
    metrics |= speed_metrics(metrics)
    parts.log.write(state.step, metrics)
    parts.display.step(state.step, metrics)
    state.metrics = {}
    parts.nonfinite.check(metrics)
    is_last = state.step == config.num_steps
    # RUN/best must not come from a step that a resumed run repeats.
    is_best = has_evaluation and is_best_step(config.folder, state.step)
    if is_last or is_best or is_due(config.checkpoint_every, state.step):
        save(parts.job, parts.learner, state, parts.inputs)
    if has_evaluation:
        update_best(config.folder, state.step, parts.display.note)
    parts.pushes.step(state.adapter)


def learn(
    job: RunContext, learner: Learner, groups_N: list[RolloutGroup], version: int
) -> dict[str, float]:
    """Advantages, microbatches and the optimizer step of policy version `version`; checks that the
    sampler was right.

    Raises:
        StaleAdapterError: the rollouts are not from the version that they should be from.
        KlLimitError: the policy is too far from the base (algorithm.max_kl_to_base).
    """
    config, policy, algorithm = job.config, job.policy, job.config.algorithm
    groups_N, staleness = drop_stale(groups_N, version, config.sampling.max_staleness)
    advantages_N_G, penalties = step_advantages(job.algorithm.advantage, config, learner, groups_N)
    terms, entropy = loss_terms(config, job.algorithm.terms, groups_N)
    cap = config.sampling.max_tokens
    updates = pack(
        groups_N,
        advantages_N_G,
        denominator=cap if algorithm.denominator == "max_tokens" else algorithm.denominator,
        microbatch_tokens=learner.microbatch_tokens,
        num_ranks=distributed.world_size(),
        num_updates=config.optim.num_updates,
        share_prompts=config.optim.share_prompts and policy.can_share_prompts,
        keep_zero_advantage=algorithm.kl == "loss" or terms["entropy_weight"] > 0,
        skip_truncated=algorithm.mask_truncated,
    )
    metrics = learner.update(updates, job.algorithm.loss, **terms)
    cpu_memory.trim()
    # The worker has checked the sampler of older ones. There is nothing to compare where every
    # completion is empty, or the policy itself gives no numbers.
    is_newest = not staleness["rollouts/staleness_max"]
    if is_newest and "mismatch/kl" in metrics and not metrics["learn/nonfinite_updates"]:
        check_step(metrics, policy.dtype, config.sampling.max_kl)
    return metrics | penalties | staleness | entropy


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    accept_changed_data: bool = False,
) -> Outcome:
    """Runs a training job to its end and writes everything to its run folder.

    Each process of a job that a launcher has started as several calls it with the same arguments.

    Args:
        config: the job.
        resume: continue from the newest checkpoint if there is one; a complete run is only
            reported.
        quiet: print only warnings and the summary.
        accept_changed_data: resume although the base model or the data have changed.

    Raises:
        UserError: bad input, an older run in the folder, another process that uses the folder, or
            a full disk.
        RunStoppedError: the sampler does not use the learner's weights or fails, or the policy is
            too far from the base.
        OtherProcessError: another process of the job failed, died or hangs.
        Interrupted: by Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP; steps that are done are in a checkpoint.
    """
    config = with_absolute_paths(config)
    folder, from_main = config.run.folder, distributed.from_main
    with (
        interruption.handled(),
        distributed.joined(config.model.device, config.run.process_timeout_s),
        open_folder(config, resume=resume, quiet=quiet) as (display, start),
    ):
        complete = from_main(lambda: finished(config, start), "the start")
        if complete is not None:
            display.note(f"{folder} is complete: {config.run.num_steps} steps done")
            if distributed.is_main():
                summary(display, complete, {})
            return complete
        config = start.keep_dtype(config)
        with open_parts(config, start, display, accept_changed_data) as (parts, state):
            before = evaluate_at_end(parts, state) if not state.step else None
            with saved_at_limit(parts.job, parts.learner, state, parts.inputs):
                loop(parts, state)
            after = evaluate_at_end(parts, state)
            finish(parts, state)
        outcome = from_main(
            lambda: Outcome(folder, before or result_of(folder, evaluation_name(0)), after),
            "the end",
        )
        if distributed.is_main():
            summary(display, outcome, parts.timer.total_s)
        display.note(f"everything is in {folder}")
    return outcome


# --- before the first step ------------------------------------------------------------------------


@contextlib.contextmanager
def open_parts(
    config: RunConfig, start: Start, display: Display, accept_changed_data: bool
) -> Iterator[tuple[Parts, State]]:
    """Builds everything for a run that starts or resumes, and closes it at the end."""
    inputs: dict[str, Any] = {}

    def on_loaded(policy: Policy, prompts: PromptSets) -> None:
        data = {"train": prompt_inputs(prompts.train), "eval": prompt_inputs(prompts.eval)}
        inputs.update(base=base_inputs(policy), data=data)
        check_same_inputs(inputs)
        if not accept_changed_data:
            start.check_inputs(inputs, config.run.folder)

    with (
        RunLog(
            config.run.folder,
            config.run.loggers,
            config.run.transcripts_per_step,
            resume_step=start.log_step,
            config=config.model_dump(mode="json"),
        ) as log,
        open_run(
            config,
            on_loaded=on_loaded,
            on_note=display.note,
            on_warning=display.warn,
            on_progress=display.sampling,
        ) as opened,
        with_handover(opened) as job,
    ):
        learner = make_learner(
            job.policy,
            config.optim,
            num_steps=config.run.num_steps * config.optim.num_updates,
            temperature=config.sampling.temperature,
            on_note=display.note,
        )
        stream, timer = job.prompts.stream(config), PhaseTimer()
        draw = partial(make_request, config, stream, display.sampling)
        worker = RolloutWorker(
            job.sampler,
            job.reward,
            requests(draw, start.state.get("step", 0), config.run.num_steps),
            max_staleness=config.sampling.max_staleness,
            check=partial(check_version, job.sampler),
        )
        rounds = StepSampler(config, job.algorithm.advantage, worker, draw, timer.phase)
        evaluation = make_evaluation(job, display.evaluation)
        nonfinite = NonfiniteSteps(config.run.folder, config.optim)
        pushes = Pushes(config.run, display.warn)
        parts = Parts(
            job, learner, rounds, evaluation, display, log, timer, nonfinite, inputs, pushes
        )
        yield parts, prepare(parts, stream, start)


def prepare(parts: Parts, stream: PromptStream, start: Start) -> State:
    """Checks the sampler, restores the checkpoint or runs the warm start, publishes a version."""
    job, folder = parts.job, parts.job.config.run.folder
    if distributed.is_main():
        write_record(job.config, job.policy, parts.inputs)
    max_kl = job.config.sampling.max_kl
    probe = check_at_start(job.policy, job.sampler, job.prompts.eval, folder / "probe", max_kl)
    parts.display.note(described(probe))
    if warning := unbounded_staleness(job.config.algorithm, job.config.sampling):
        parts.display.warn(warning)
    state = State(stream, stream.state_dict())
    if start.checkpoint is not None:
        if start.has_other_data("eval", parts.inputs) and distributed.is_main():
            set_aside(folder / "eval", start.state["step"])
        state = restore(job, parts.learner, stream, start, parts.inputs)
        if parts.log.has_line(state.step):
            state.metrics = {}
        parts.display.note(f"resumed from {start.checkpoint}")
    kept = -1 if start.checkpoint is None else state.step
    if distributed.is_main():
        clean(folder, kept, job.config.run.keep_last)  # later steps may come out otherwise now
        remove_results_after(folder / "eval", kept)
        drop_best_after(folder, kept)
    if start.checkpoint is None:
        warm_up(parts, state)
    publish(job, state)
    if start.checkpoint is None:
        save(job, parts.learner, state, parts.inputs)
    else:
        # A kill may have come between an evaluation and this.
        update_best(folder, state.step, parts.display.note)
    return state


def warm_up(parts: Parts, state: State) -> None:
    """The supervised steps before RL, if the job has any."""
    job, config = parts.job, parts.job.config
    if not config.warm_start.num_steps:
        return
    if not has_solutions(job.prompts.train):
        parts.display.warn(
            "no row of data.train has a worked solution: the warm start is skipped, and RL starts "
            "from the base model"
        )
        return
    if job.policy.has_base:
        evaluate_policy(parts, state, is_base=True)
    job.sampler.release_memory()  # for the learner
    with (
        RunLog(config.run.folder, resume_step=-1, metrics_file="warm_start.jsonl") as log,
        parts.timer.phase("warm_start"),
    ):
        parts.display.stage("warm start", config.warm_start.num_steps)

        def on_step(step: int, metrics: dict[str, float]) -> None:
            log.write(step, metrics)
            parts.display.step(step, metrics)

        warm_start(parts.learner, job.prompts.train, job.tokenizer, config, on_step)


# --- evaluations, and the end ---------------------------------------------------------------------


def evaluate_policy(parts: Parts, state: State, *, is_base: bool = False) -> EvalResult:
    """The held-out evaluation of the newest version, or of the base model with the adapter off.

    A result that is in the run folder already is only loaded.
    """
    name = "base" if is_base else evaluation_name(state.step)
    folder, phase = parts.job.config.run.folder, f"the evaluation {name}"
    result = distributed.from_main(lambda: result_of(folder, name), phase)
    if result is not None:
        return result
    if is_base:
        parts.rounds.worker.set_adapter(None)
    else:
        with parts.timer.phase("sample"):
            parts.rounds.worker.ensure_adapter(state.adapter)
    with parts.timer.phase("eval"):
        result = evaluate(
            parts.job.sampler,
            parts.evaluation,
            folder / "eval" / name,
            policy="base" if is_base or state.adapter is None else state.adapter.fingerprint,
            step=None if is_base else state.step,
            restart=True,  # a file that another history of this run left is of no use
        )
    parts.display.evaluation_result(name, result)
    return result


def evaluate_at_end(parts: Parts, state: State) -> EvalResult:
    """The evaluation before the first step or after the last, unless the loop has done it.

    Trackers get its numbers here, since it has no line in metrics.jsonl.
    """
    folder, name = parts.job.config.run.folder, evaluation_name(state.step)
    is_new = distributed.from_main(lambda: result_of(folder, name), "an evaluation") is None
    result = evaluate_policy(parts, state)
    if is_new or not state.step:
        parts.log.track(state.step, result.metrics())
        update_best(folder, state.step, parts.display.note)
    return result


def is_due(every: int, step: int) -> bool:
    """Whether something done every so many steps (0: never) is done after this one."""
    return bool(every) and step % every == 0


def finish(parts: Parts, state: State) -> None:
    """Proves that the base was never written to, draws the figures and, last, makes RUN/adapter."""
    folder, policy = parts.job.config.run.folder, parts.job.policy
    policy.check_base(parts.inputs["base"]["fingerprint"])
    if not distributed.is_main():
        return
    draw_figures(folder)
    with atomic_directory(folder / "adapter") as scratch:
        shutil.copytree(folder / "adapters" / f"v{state.step:06d}", scratch, dirs_exist_ok=True)
    parts.pushes.last()
