"""`rl-lora eval`: evaluates a run's adapter, any adapter, or the base model.

With `--against` two policies are evaluated in one engine, on the same problems and random numbers.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rl_lora.adapters import files as adapters
from rl_lora.adapters.resize import common_settings, fitted
from rl_lora.build import RunContext, check_run_folder, make_evaluation, open_run
from rl_lora.config import RunConfig, load_config, parse_config
from rl_lora.config.checks import check_served
from rl_lora.config.overrides import apply_overrides
from rl_lora.data.collect import HELD_OUT
from rl_lora.errors import UserError
from rl_lora.evaluation.evaluate import evaluate
from rl_lora.evaluation.files import SUFFIX
from rl_lora.evaluation.paired import compare_evaluations
from rl_lora.evaluation.scores import EvalResult
from rl_lora.models.hub import adapter_path
from rl_lora.prompts import PromptSets
from rl_lora.report.terminal import Display
from rl_lora.runs.inputs import base_inputs, check_base, check_data, prompt_inputs
from rl_lora.runs.lock import run_lock
from rl_lora.runs.record import read_record, with_absolute_paths, with_dtype
from rl_lora.storage.directories import disk_errors

if TYPE_CHECKING:
    from rl_lora.policy import Policy

PAIRED_FOLDER = "paired"
_BASE_NAMES = ("base", "none")
_SUFFIXES = (SUFFIX, ".json")


@dataclass(frozen=True)
class EvalTarget:
    """Which policy to evaluate.

    Example: EvalTarget(label="best", adapter=Path("runs/q/best"))
    """

    label: str
    adapter: Path | None  # None: the base model


@dataclass(frozen=True)
class EvalRequest:
    """What `rl-lora eval` is asked to do.

    Example: EvalRequest(target=Path("runs/q"), overrides=["data.eval=aime24"], adapter="best")
    """

    target: Path  # a run folder (its settings and its last adapter) or a config file
    overrides: list[str] = field(default_factory=list)  # section.key=value
    # An adapter directory, "best" or "last" of the run, or "base"; None: the run's last adapter, or
    # the base model if the target is a config.
    adapter: str | None = None
    name: str = "evaluation"  # of the files
    against: str | None = None  # a second policy to compare with, given as `adapter`
    overwrite: bool = False  # replace an evaluation of that name
    # Evaluate although the run's base model or problems have changed since it began. Settings that
    # the overrides change are not compared.
    accept_changed_data: bool = False
    quiet: bool = False  # print only the tables


def evaluation(request: EvalRequest) -> EvalResult:
    """Evaluates and writes RUN/eval/NAME.jsonl.gz (one line per problem) and NAME.json.

    An evaluation that was killed resumes. With `against` the other policy's evaluation is
    NAME-against, and the comparison RUN/paired/NAME.json.

    Raises:
        UserError: no such run, config or adapter, an adapter of another base model, an evaluation
            of that name that has other settings or is being made by another process, or a full
            disk.
    """
    target, name = request.target, request.name
    targets = {name: _choose(target, request.adapter)}
    if request.against is not None:
        targets = {f"{name}-against": _choose(target, request.against), **targets}
    config = with_absolute_paths(_settings(target, request.overrides))
    config = _evaluation_config(config, [t.adapter for t in targets.values() if t.adapter])
    folder = target if target.is_dir() else config.run.folder

    def on_loaded(policy: Policy, prompts: PromptSets) -> None:
        if target.is_dir() and not request.accept_changed_data:
            _check_inputs(target, config, policy, prompts)

    with ExitStack() as stack:
        stack.enter_context(disk_errors(folder))
        notes = [stack.enter_context(_lock(folder, file)) for file in targets]
        check_run_folder(folder)
        if request.overwrite:
            for path in [folder / "eval" / f"{n}{end}" for n in targets for end in _SUFFIXES]:
                path.unlink(missing_ok=True)
        display = stack.enter_context(Display(quiet=request.quiet))
        for note in filter(None, notes):
            display.note(note)
        job = stack.enter_context(
            open_run(
                config,
                num_steps=0,
                on_loaded=on_loaded,
                on_note=display.note,
                on_progress=display.sampling,
            )
        )
        results = {
            file: _evaluate(job, chosen, folder, file, display) for file, chosen in targets.items()
        }
        _report(display, folder, targets, results)
    return results[name]


def _evaluate(
    job: RunContext, target: EvalTarget, folder: Path, name: str, display: Display
) -> EvalResult:
    scratch = folder / "eval" / f".{name}_adapter"
    handle = None
    if target.adapter is not None:
        path = fitted(target.adapter, job.policy, scratch)
        # vLLM identifies adapters by name, and two runs of one name share their adapters' names.
        unique = f"evaluation-{adapters.fingerprint(adapters.load_tensors(path))[:16]}"
        handle = adapters.open_adapter(path, job.policy, name=unique)
    try:
        job.sampler.set_adapter(handle)
        result = evaluate(
            job.sampler,
            make_evaluation(job, display.evaluation),
            folder / "eval" / name,
            policy="base" if handle is None else handle.fingerprint,
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    display.evaluation_result(f"{name} ({target.label})", result)
    return result


def _report(
    display: Display,
    folder: Path,
    targets: dict[str, EvalTarget],
    results: dict[str, EvalResult],
) -> None:
    display.evaluations({targets[name].label: result for name, result in results.items()})
    if len(targets) == 2:
        first, second = targets
        paired = compare_evaluations(
            folder / "eval" / f"{first}{SUFFIX}",
            folder / "eval" / f"{second}{SUFFIX}",
            (targets[first].label, targets[second].label),
        )
        (folder / PAIRED_FOLDER).mkdir(exist_ok=True)
        paired.save(folder / PAIRED_FOLDER / f"{second}.json")
        display.comparison(paired)
    for note in next(iter(results.values())).notes:
        display.note(note)
    for name in results:
        display.note(f"every completion and verdict: {folder / 'eval' / name}{SUFFIX}")


def _settings(target: Path, overrides: list[str]) -> RunConfig:
    """The settings of a run folder, with the run's dtype, or of a config file."""
    if not target.is_dir():
        return load_config(target, overrides)
    fix = f"evaluate its adapter with a config: rl-lora eval CONFIG --adapter {target / 'adapter'}"
    record = read_record(target, fix)
    if "sft" in record["config"]:
        raise UserError(
            f"{target} is a supervised run, and an evaluation samples: give a config with "
            f"data.eval and sampling, and --adapter {target / 'adapter'}"
        )
    own = parse_config(record["config"])
    config = parse_config(apply_overrides(record["config"], overrides, RunConfig))
    if config.model.name == own.model.name:
        return with_dtype(config, str(record["dtype"]).removeprefix("torch."))
    return config


def _lock(folder: Path, name: str) -> AbstractContextManager[str | None]:
    """Lock on one evaluation's files; a run in progress may be evaluated meanwhile."""
    file = f".evaluation_{name.replace('/', '_')}.lock"
    return run_lock(folder, file, what=f"the evaluation {name!r} in {folder}")


def _check_inputs(run: Path, config: RunConfig, policy: Policy, prompts: PromptSets) -> None:
    """Raises UserError if the base model or the problems have changed since the run began.

    What the overrides change is not compared: the base with model.name, the problems with data,
    seed or model.
    """
    record = read_record(run)
    own = with_absolute_paths(parse_config(record["config"]))
    if config.model.name != own.model.name or config.model.revision != own.model.revision:
        return
    check_base(record["base_model"], base_inputs(policy), run)
    is_own_data = config.data.model_copy(update={"train": own.data.train}) == own.data
    if is_own_data and config.run.seed == own.run.seed:
        check_data(record["data"], {"eval": prompt_inputs(prompts.eval)}, run)


def _choose(target: Path, name: str | None) -> EvalTarget:
    """The policy of a name; a run folder has "last" and "best"."""
    if name in _BASE_NAMES or (name is None and not target.is_dir()):
        return EvalTarget("base", None)
    if name not in (None, "last", "best"):
        assert name is not None
        return EvalTarget(name, adapter_path(name))
    if not target.is_dir():
        raise UserError(
            f"{target} is not a run folder and has no {name} adapter; give the adapter's directory"
        )
    if name == "best":
        if not (target / "best").is_dir():
            raise UserError(
                f"{target} has no best adapter yet: nothing was evaluated (run.eval_every)"
            )
        return EvalTarget("best", target / "best")
    versions = sorted((target / "adapters").glob("v[0-9]*"))
    final = target / "adapter"
    own = final if final.is_dir() else versions[-1] if versions else None
    if own is None:
        raise UserError(f"{target} has no adapter yet; --adapter base evaluates the base model")
    return EvalTarget("last", own)


def _evaluation_config(config: RunConfig, adapter_dirs: list[Path]) -> RunConfig:
    """The config with what the adapters need, and without data that the evaluation does not use."""
    update: dict[str, object] = {}
    named = config.data.eval
    if named and all(source.name != HELD_OUT for source in named):
        update["data"] = config.data.model_copy(update={"train": ()})
    if lora := common_settings(adapter_dirs):
        update["lora"] = config.lora.model_copy(update=lora)
    config = config.model_copy(update=update)
    try:
        check_served(config.lora, config.sampling)
    except ValueError as error:
        raise UserError(f"adapter {adapter_dirs[0]}: {error}") from error
    return config
