"""The supervised loop: a batch, one optimizer step by log loss, the test loss along the way.

The test's steps lie at equal ratios (1, 2, 4, ...), as the article's learning curves go by log
steps. Metrics: `sft/loss` (nats a completion token of the step's batch, before the step) and
`test/nll` with its 95 % interval.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rl_lora import jsonl
from rl_lora.adapter import save_adapter
from rl_lora.batches import pack
from rl_lora.checkpoint import drop_after, latest_checkpoint
from rl_lora.config import AlgorithmSection
from rl_lora.display import Display
from rl_lora.errors import StaleAdapterError
from rl_lora.job import check_run_folder, open_model
from rl_lora.learner import Learner
from rl_lora.metrics import PhaseTimer, memory_metrics, speed_metrics
from rl_lora.models import check_rows
from rl_lora.nll import HeldOutLoss, held_out_loss
from rl_lora.run_record import write_record
from rl_lora.runlog import METRICS_FILE, RunLog
from rl_lora.sft_config import SftConfig
from rl_lora.sft_data import SftSets, load_sft, step_indices
from rl_lora.snapshot import load_snapshot, resume_step, save_snapshot

if TYPE_CHECKING:
    from rl_lora.policy import Policy


@dataclass(frozen=True)
class SftOutcome:
    """What a supervised run ends with.

    Example: SftOutcome(folder=Path("runs/sft"), before=2.31, after=1.62)
    """

    folder: Path
    before: float  # test NLL of the base, nats a token
    after: float


def curve_steps(num_steps: int, num_tests: int, every: int = 0) -> list[int]:
    """Steps after which the test is held: num_tests of them at equal ratios, the last one with
    them, and every `every`-th (0: none)."""
    if num_steps == 0:
        return []
    ratio = num_steps ** (1 / num_tests)
    steps = {max(1, round(ratio**power)) for power in range(1, num_tests + 1)} | {num_steps}
    if every:
        steps |= set(range(every, num_steps + 1, every))
    return sorted(steps)


def fine_tune(config: SftConfig, *, resume: bool = False, quiet: bool = False) -> SftOutcome:
    """Runs a supervised job to its end and leaves everything in its run folder.

    Args:
        config: the job.
        resume: go on from the newest checkpoint, if there is one; a complete run is only reported.
        quiet: print only warnings and the summary.

    Raises:
        UserError: bad input, or an older run in the way.
        FloatingPointError: the gradient is not finite.
    """
    folder = config.run.folder
    check_run_folder(folder)
    checkpoint = latest_checkpoint(folder) if resume else None
    with (
        Display(quiet=quiet) as display,
        RunLog(
            folder,
            config.run.loggers,
            resume_step=resume_step(checkpoint, resume),
            config=config.model_dump(mode="json"),
        ) as log,
    ):
        policy, sets = _prepare(config, display)
        learner = Learner(
            policy,
            config.optim,
            AlgorithmSection(),
            temperature=1.0,
            num_steps=config.run.num_steps,
        )
        base_hash = policy.base_fingerprint()
        write_record(config, policy, base_hash)
        step = 0
        if checkpoint is not None:
            step = int(load_snapshot(checkpoint, learner, config)["step"])
            drop_after(folder, step)
            display.note(f"resumed from {checkpoint}")
        _loop(config, learner, sets, log, display, step)
        if not policy.is_full and policy.base_fingerprint() != base_hash:
            raise StaleAdapterError("the base model's weights changed during the run")
        _publish(policy, folder, config)
        outcome = _outcome(folder)
        display.note(
            f"test loss {outcome.before:.4f} before, {outcome.after:.4f} after (nats a token); "
            f"everything is in {folder}"
        )
    return outcome


def _prepare(config: SftConfig, display: Display) -> tuple[Policy, SftSets]:
    from rl_lora.policy import Policy

    model_dir, tokenizer, context = open_model(config.model, display.note, config.lora)
    sets = load_sft(config.data, tokenizer, context, config.run.seed)
    for note in sets.notes:
        display.note(note)
    samples = (row.sample() for row in (*sets.train, *sets.test))
    check_rows((s.prompt_ids + s.completion_ids for s in samples), tokenizer, model_dir)
    policy = Policy(
        model_dir,
        config.model,
        config.lora,
        seed=config.run.seed,
        checkpoint_activations=config.optim.checkpoint_activations,
    )
    return policy, sets


def _loop(
    config: SftConfig,
    learner: Learner,
    sets: SftSets,
    log: RunLog,
    display: Display,
    step: int,
) -> None:
    run, timer = config.run, PhaseTimer()
    tests = set(curve_steps(run.num_steps, config.sft.num_tests, run.eval_every))
    display.stage("fine-tuning", run.num_steps, step)
    if step == 0:
        log.write(0, _test(learner, sets, config).metrics())
        save_snapshot(0, learner, config)
    timer.take()
    while step < run.num_steps:
        indices = step_indices(step + 1, config.sft.batch_size, len(sets.train), run.seed)
        with timer.phase("learn"):
            metrics = _step(learner, sets, indices, config)
        step += 1
        if step in tests:
            with timer.phase("eval"):
                metrics |= _test(learner, sets, config).metrics()
        metrics |= timer.take() | memory_metrics()
        log.write(step, metrics | speed_metrics(metrics))
        display.step(step, metrics)
        if step % run.checkpoint_every == 0 or step == run.num_steps:
            save_snapshot(step, learner, config)


def _step(
    learner: Learner, sets: SftSets, indices: list[int], config: SftConfig
) -> dict[str, float]:
    samples = [sets.train[index].sample() for index in indices]
    (microbatches,) = pack(
        samples,
        denominator="tokens",
        max_tokens=config.data.max_tokens,
        microbatch_tokens=config.optim.microbatch_tokens,
    )
    num_tokens = sum(batch.num_tokens for batch in microbatches)
    num_padded = sum(batch.token_ids_BT.numel() for batch in microbatches)
    counts = {
        "learn/tokens": float(num_tokens),
        "learn/completion_tokens": float(sum(len(s.completion_ids) for s in samples)),
        "learn/padding_fraction": 1 - num_tokens / num_padded,
    }
    return learner.fit(microbatches, lr=config.optim.lr) | counts


def _test(learner: Learner, sets: SftSets, config: SftConfig) -> HeldOutLoss:
    samples = [sequence.sample() for sequence in sets.test]
    return held_out_loss(learner.policy, samples, config.optim.microbatch_tokens)


def _publish(policy: Policy, folder: Path, config: SftConfig) -> None:
    """The adapter (or the weights) where users look for it."""
    adapter = save_adapter(
        policy, folder / "adapters", version=config.run.num_steps, run_name=config.run.name
    )
    final = folder / "adapter"
    shutil.rmtree(final, ignore_errors=True)
    adapter.path.rename(final)
    shutil.rmtree(folder / "adapters", ignore_errors=True)


def _outcome(folder: Path) -> SftOutcome:
    tests = [r["test/nll"] for r in jsonl.read_lines(folder / METRICS_FILE) if "test/nll" in r]
    nan = float("nan")
    first, last = (nan if value is None else float(value) for value in (tests[0], tests[-1]))
    return SftOutcome(folder, first, last)
