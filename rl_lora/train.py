"""The loop: prompts, rollouts, rewards, advantages, one optimizer step, a new adapter version."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.adapters.files import remove_old, save_adapter, saved_version
from rl_lora.advantages import ADVANTAGES
from rl_lora.batches import make_samples, pack
from rl_lora.build import RunContext, check_run_folder, evaluation_identity, open_run
from rl_lora.config import RunConfig
from rl_lora.errors import StaleAdapterError
from rl_lora.evaluation.best import best_evaluation, drop_best_after, keep_best
from rl_lora.evaluation.contamination import contamination_notes
from rl_lora.evaluation.evaluate import evaluate, remove_results_after, set_aside
from rl_lora.evaluation.scores import EvalResult, load_result
from rl_lora.learner import Learner
from rl_lora.nn.segments import MAX_WASTED_PAIRS
from rl_lora.outcome import Outcome, evaluation_name, finished, result_of, summary
from rl_lora.overlap import Batch, RolloutWorker, step_params
from rl_lora.policy import check_trainable
from rl_lora.prompts import PromptSets, PromptStream
from rl_lora.report.run_figures import draw_figures
from rl_lora.report.terminal import Display
from rl_lora.runs.checkpoint import checkpoint_steps, drop_after
from rl_lora.runs.inputs import base_inputs, prompt_inputs
from rl_lora.runs.lock import run_lock
from rl_lora.runs.log import RunLog
from rl_lora.runs.machine import MachineMeter
from rl_lora.runs.metrics import PhaseTimer, memory_metrics, rollout_metrics, speed_metrics
from rl_lora.runs.record import with_absolute_paths, write_record
from rl_lora.runs.snapshot import Start, find_start, load_snapshot, save_snapshot
from rl_lora.samplers import cpu_memory
from rl_lora.samplers.liveness import check_at_start, check_step, check_version, staleness_metrics
from rl_lora.seeds import mix_seed
from rl_lora.sft.warm_start import has_solutions, warm_start
from rl_lora.storage.directories import atomic_directory, disk_errors
from rl_lora.types import Adapter, Prompt, RolloutGroup, SampleParams

if TYPE_CHECKING:
    from rl_lora.policy import Policy


class Run:
    """The state of one run between steps: what a checkpoint holds, and where it is written."""

    def __init__(
        self, job: RunContext, display: Display, folder: Path, inputs: dict[str, Any] | None = None
    ) -> None:
        config = job.config
        self.job, self.display, self.folder = job, display, folder
        self.inputs = inputs or {}  # hashes of base and data, for record and checkpoints
        self.learner = Learner(
            job.policy,
            config.optim,
            config.algorithm,
            temperature=config.sampling.temperature,
            num_steps=config.run.num_steps * config.optim.num_updates,
        )
        self.stream = PromptStream(job.prompts.train, config.run.seed)
        self.position = self.stream.state_dict()  # of the next step's prompts
        self.worker = RolloutWorker(job.sampler, job.reward)
        self.overlaps = config.sampling.overlap
        self.timer = PhaseTimer()
        self.step = 0  # steps done, which is the adapter's version
        self.adapter: Adapter | None = None  # published last; None: before the first one is
        self.previous: Adapter | None = None  # the version before it

    def publish(self) -> Adapter:
        """Writes the policy's present version; the sampler takes it, at once if it is free."""
        adapters = self.folder / "adapters"
        adapter = save_adapter(
            self.job.policy, adapters, version=self.step, run_name=self.job.config.run.name
        )
        if self.adapter is not None:
            self.previous = self.adapter
        self.adapter = adapter
        if not self.overlaps:
            self.worker.set_adapter(adapter)
        keep = {self.step, self.step - 1}
        if self.overlaps:  # what a run that is resumed from a checkpoint samples from first
            keep |= {step - 1 for step in checkpoint_steps(self.folder)}
        remove_old(adapters, keep=keep)
        return adapter

    def next_batch(self) -> Batch:
        """The batch to learn from; with sampling.overlap the one after it is sampled from now on.

        Step k samples from version k - 1, with overlap from version k - 2 (the first from 0).
        """
        job, worker, version = self.job, self.worker, self.step
        if not self.overlaps:
            batch = worker.sample(*self._request(), version)
        elif (batch_or_none := worker.pop()) is not None:
            batch = batch_or_none
        else:  # this process's first: what was under way at a kill is sampled again
            worker.ensure_adapter(self.previous or self.adapter)
            batch = worker.sample_in_thread(*self._request(), max(0, version - 1))
        self.position = self.stream.state_dict()
        if self.overlaps:
            worker.ensure_adapter(self.adapter)
            probes, max_kl = job.prompts.eval[:4], job.config.sampling.max_kl
            batch = replace(batch, checks=check_version(job.policy, job.sampler, probes, max_kl))
        if self.overlaps and self.step + 1 < job.config.run.num_steps:
            worker.start(*self._request(ahead=1), version)
        else:
            job.sampler.release_memory()  # the learner's turn
        return batch

    def _request(self, ahead: int = 0) -> tuple[list[Prompt], SampleParams]:
        """Prompts and settings of the next step's batch, or of the one after it."""
        prompts_N = self.stream.take(self.job.config.sampling.num_prompts)
        self.display.sampling(0, len(prompts_N) * self.job.config.sampling.num_samples, 0)
        return prompts_N, self.params(ahead)

    def params(self, ahead: int = 0) -> SampleParams:
        """How the next step samples, or the one after it."""
        return step_params(self.job.config, self.step + 1 + ahead)

    def save(self) -> None:
        """One atomic checkpoint, and the older ones pruned."""
        more = {"previous": self.previous and self.previous.fingerprint, "stream": self.position}
        save_snapshot(self.step, self.learner, self.job.config, inputs=self.inputs, **more)

    def restore(self, start: Start) -> None:
        """Takes a checkpoint's state over. Raises UserError where it is broken."""
        assert start.checkpoint is not None
        state = load_snapshot(start.checkpoint, self.learner, self.job.config)
        stream, num_prompts = state["stream"], len(self.job.prompts.train)
        if start.has_other_data("train", self.inputs) and stream["num_prompts"] != num_prompts:
            # Other rows, which the user has accepted: a new epoch of them.
            stream |= {"epoch": stream["epoch"] + 1, "position": 0, "owed": []}
            stream |= {"num_prompts": num_prompts}
        self.stream.load_state_dict(stream)
        self.position = self.stream.state_dict()
        self.step = state["step"]
        if self.overlaps and self.step:
            before = self.folder / "adapters" / f"v{self.step - 1:06d}"
            self.previous = saved_version(before, state["previous"])

    def evaluation(self, name: str, *, adapter_off: bool = False) -> EvalResult:
        """The held-out evaluation; a result that is already in the run folder is not made again."""
        folder = self.folder / "eval"
        if (folder / f"{name}.json").is_file():
            return load_result(folder / f"{name}.json")
        config = self.job.config
        if adapter_off:
            self.worker.set_adapter(None)
        else:
            with self.timer.phase("sample"):
                self.worker.ensure_adapter(self.adapter)
        prompts_N = self.job.prompts.eval
        with self.timer.phase("eval"):
            result = evaluate(
                self.job.sampler,
                prompts_N,
                self.job.reward,
                config.eval,
                max_tokens=config.sampling.max_tokens,
                seed=mix_seed(config.run.seed, "exam"),  # another label, other samples
                stop=config.sampling.stop,
                step=None if adapter_off else self.step,
                folder=folder,
                name=name,
                identity=evaluation_identity(self.job, None if adapter_off else self.adapter),
                notes=contamination_notes(config.model, (prompt.source for prompt in prompts_N)),
                restart=True,  # what another history of the run left is worth nothing
                on_progress=self.display.evaluation,
            )
        self.display.evaluation_result(name, result)
        return result

    def keep_best(self) -> None:
        """RUN/best, if the present step's evaluation is the best one."""
        adapter = self.folder / "adapters" / f"v{self.step:06d}"
        if (best := keep_best(self.folder, adapter, self.step)) is not None and self.step:
            self.display.note(f"best so far: step {best.step}, accuracy {best.accuracy:.1%}")

    def learn(self, groups_N: list[RolloutGroup]) -> dict[str, float]:
        """Advantages, microbatches, optimizer step, and the check that the sampler was right."""
        config, policy = self.job.config, self.job.policy
        staleness = staleness_metrics(groups_N, self.step, max_staleness=int(self.overlaps))
        rewards_N_G, kl = self.learner.penalised_rewards(groups_N, config.optim.microbatch_tokens)
        advantages_N_G = ADVANTAGES[config.algorithm.advantage](rewards_N_G)
        updates = pack(
            make_samples(groups_N, advantages_N_G),
            denominator=config.algorithm.denominator,
            max_tokens=config.sampling.max_tokens,
            microbatch_tokens=config.optim.microbatch_tokens,
            num_updates=config.optim.num_updates,
            share_prompts=config.optim.share_prompts and policy.can_share_prompts,
            keep_zero_advantage=config.algorithm.kl == "loss",
            max_wasted_pairs=MAX_WASTED_PAIRS.get(policy.device.type, 0),
        )
        metrics = self.learner.update(updates)
        cpu_memory.trim()
        if not staleness[
            "rollouts/staleness_max"
        ]:  # older ones: `next_batch` has checked the sampler
            check_step(metrics, policy.dtype, config.sampling.max_kl)
        return metrics | kl | staleness


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    accept_changed_data: bool = False,
) -> Outcome:
    """Runs a job to its end and leaves everything in its run folder.

    Args:
        config: the job.
        resume: go on from the newest checkpoint, if there is one; a complete run is only reported.
        quiet: print only warnings and the summary.
        accept_changed_data: go on although base or data are others than when the run began.

    Raises:
        UserError: bad input, an older run in the way, another process at work in the folder, or a
            full disk.
        StaleAdapterError: the sampler does not sample from the learner's weights.
    """
    check_trainable(config.model, config.lora)
    config = with_absolute_paths(config)
    folder = config.run.folder
    with disk_errors(folder), run_lock(folder) as taken_over, Display(quiet=quiet) as display:
        check_run_folder(folder)
        if taken_over is not None:
            display.note(taken_over)
        start = find_start(config, resume=resume)
        if outcome := finished(config, start):
            display.note(f"{folder} is complete: {config.run.num_steps} steps done")
            summary(display, outcome, {})
            return outcome
        config = start.restarted(config)
        found: dict[str, Any] = {}

        def on_loaded(policy: Policy, prompts: PromptSets) -> None:
            data = {"train": prompt_inputs(prompts.train), "eval": prompt_inputs(prompts.eval)}
            found.update(base=base_inputs(policy), data=data)
            if not accept_changed_data:
                start.check_inputs(found, folder)

        with (
            RunLog(
                folder,
                config.run.loggers,
                config.run.transcripts_per_step,
                resume_step=start.log_step,
                config=config.model_dump(mode="json"),
            ) as log,
            open_run(
                config, on_loaded=on_loaded, on_note=display.note, on_progress=display.sampling
            ) as job,
        ):
            run = Run(job, display, folder, found)
            prepare(run, start)
            before = _first_evaluation(run, log)
            loop(run, log)
            after = _last_evaluation(run, log)
            _finish(run)
        draw_figures(folder)
        outcome = Outcome(folder, before, after)
        summary(display, outcome, run.timer.total_s)
        display.note(f"everything is in {folder}")
    return outcome


def prepare(run: Run, start: Start) -> None:
    """The sampler's proof, then the checkpoint's state or the warm start; publishes a version."""
    job, config = run.job, run.job.config
    write_record(config, job.policy, run.inputs)
    probe = check_at_start(
        job.policy, job.sampler, job.prompts.eval[:4], run.folder / "probe", config.sampling.max_kl
    )
    run.display.note(
        "sampler serves the learner's weights: mean |difference| of log-probs "
        + ", ".join(f"{name} {value:.1e}" for name, value in probe.items())
        + " nats"
    )
    if start.checkpoint is not None:
        if start.has_other_data("eval", run.inputs):
            set_aside(run.folder / "eval", start.state["step"])
        run.restore(start)
        run.display.note(f"resumed from {start.checkpoint}")
    kept = -1 if start.checkpoint is None else run.step
    drop_after(run.folder, kept)  # steps that are run again are another history
    remove_results_after(run.folder / "eval", kept)
    drop_best_after(run.folder, kept)
    if start.checkpoint is None:
        _warm_up(run)
    run.publish()
    if start.checkpoint is None:
        run.save()
    else:
        run.keep_best()  # a kill may have come between an evaluation and this


def _warm_up(run: Run) -> None:
    """The supervised steps before the first one of RL, if the job has them."""
    job, config = run.job, run.job.config
    if not config.warm_start.num_steps:
        return
    if not has_solutions(job.prompts.train):
        run.display.warn(
            "no row of data.train has a worked solution: the warm start is left out, and RL starts "
            "from the base model"
        )
        return
    if not job.policy.is_full:
        run.evaluation("base", adapter_off=True)
    with (
        RunLog(run.folder, resume_step=-1, metrics_file="warm_start.jsonl") as log,
        run.timer.phase("warm_start"),
    ):
        run.display.stage("warm start", config.warm_start.num_steps)

        def on_step(step: int, metrics: dict[str, float]) -> None:
            log.write(step, metrics)
            run.display.step(step, metrics)

        warm_start(run.learner, job.prompts.train, job.tokenizer, config, on_step)


def loop(run: Run, log: RunLog) -> None:
    """Step k learns from samples of version k - 1, with overlap k - 2, and publishes version k."""
    timer, config = run.timer, run.job.config.run
    run.display.stage("training", config.num_steps, run.step)
    timer.take()
    with MachineMeter() as meter, run.worker:
        while run.step < config.num_steps:
            with timer.phase("sample"):
                batch = run.next_batch()
            with timer.phase("score"):  # what is left of it
                groups_N = batch.scoring.groups()
            with timer.phase("learn"):
                stats = run.learn(groups_N)
            run.step += 1
            with timer.phase("publish"):
                run.publish()
            metrics = rollout_metrics(groups_N) | stats | batch.metrics()
            if has_evaluation := bool(config.eval_every) and run.step % config.eval_every == 0:
                metrics |= run.evaluation(evaluation_name(run.step)).metrics()
            metrics |= timer.take() | memory_metrics() | meter.take()
            metrics |= speed_metrics(metrics)
            log.transcripts(run.step, groups_N)
            log.write(run.step, metrics)
            run.display.step(run.step, metrics)
            is_last = run.step == config.num_steps
            # RUN/best is never of a step that a resumed run goes through again.
            if (
                run.step % config.checkpoint_every == 0
                or is_last
                or (has_evaluation and _is_best(run))
            ):
                run.save()
            if has_evaluation:
                run.keep_best()


def _is_best(run: Run) -> bool:
    best = best_evaluation(run.folder, run.step)
    return best is not None and best.step == run.step


def _first_evaluation(run: Run, log: RunLog) -> EvalResult | None:
    """The policy before RL; for the trackers it is the curve's point at step 0."""
    if run.step > 0:
        return result_of(run.folder, evaluation_name(0))
    result = run.evaluation(evaluation_name(0))
    log.track(0, result.metrics())
    run.keep_best()
    return result


def _last_evaluation(run: Run, log: RunLog) -> EvalResult:
    """The policy at the end, if the loop has not evaluated it."""
    is_new = result_of(run.folder, evaluation_name(run.step)) is None
    result = run.evaluation(evaluation_name(run.step))
    if is_new:
        log.track(run.step, result.metrics())
        run.keep_best()
    return result


def _finish(run: Run) -> None:
    """The proof that the base was not written to, and the adapter where users look for it."""
    expected = run.inputs["base"]["fingerprint"]
    if not run.job.policy.is_full and run.job.policy.base_fingerprint() != expected:
        raise StaleAdapterError("the base model's weights changed during the run")
    with atomic_directory(run.folder / "adapter") as scratch:
        last = run.folder / "adapters" / f"v{run.step:06d}"
        shutil.copytree(last, scratch, dirs_exist_ok=True)
