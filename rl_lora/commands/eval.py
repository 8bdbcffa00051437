"""`rl-lora eval` and `compare`: the evaluation by itself, of a run's adapter, any adapter, or the
base.

With `--against` two policies are evaluated in one engine, on the same problems and random numbers.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rl_lora.adapters import files as adapters
from rl_lora.adapters.resize import common_settings, fitted
from rl_lora.build import RunContext, check_run_folder, make_evaluation, open_run
from rl_lora.config import RunConfig, load_config, parse_config
from rl_lora.config.checks import check_served
from rl_lora.config.overrides import apply_overrides
from rl_lora.errors import UserError
from rl_lora.evaluation.evaluate import evaluate
from rl_lora.evaluation.files import SUFFIX
from rl_lora.evaluation.paired import PairedResult, compare_evaluations
from rl_lora.evaluation.scores import EvalResult
from rl_lora.models.hub import adapter_path
from rl_lora.prompts import HELD_OUT, PromptSets
from rl_lora.report.terminal import Display
from rl_lora.runs.inputs import base_inputs, check_base, check_data, prompt_inputs
from rl_lora.runs.lock import run_lock
from rl_lora.runs.record import read_record, with_absolute_paths, with_dtype
from rl_lora.storage.directories import disk_errors

if TYPE_CHECKING:
    from rl_lora.policy import Policy

PAIRED_FOLDER = "paired"
_BASE_NAMES = ("base", "none")


@dataclass(frozen=True)
class EvalTarget:
    """Whom to evaluate.

    Example: EvalTarget(label="best", adapter=Path("runs/q/best"))
    """

    label: str
    adapter: Path | None  # None: the base model


def evaluation(
    target: Path,
    overrides: list[str],
    adapter: str | None,
    name: str,
    *,
    against: str | None = None,
    overwrite: bool = False,
    accept_changed_data: bool = False,
    quiet: bool = False,
) -> EvalResult:
    """Evaluates and writes RUN/eval/NAME.jsonl.gz (a line a problem) and NAME.json.

    A killed evaluation goes on where it was. With `against` the other policy's evaluation is
    NAME-against, and the comparison RUN/paired/NAME.json.

    Args:
        target: a run folder (its settings and its final adapter) or a config file.
        overrides: `section.key=value`; `data.eval=aime24` takes another evaluation.
        adapter: an adapter directory, "best" or "last" of the run, "base" for the base; None: the
            run's last one, or the base where the target is a config.
        name: of the files.
        against: a second policy to compare with, named as `adapter`.
        overwrite: start over, whatever evaluation of that name there is.
        accept_changed_data: go on although the run's base or problems are others than when it
            began; settings that the overrides change are not compared.
        quiet: print the tables alone.

    Raises:
        UserError: no such run, config or adapter, an adapter of another base model, an evaluation
        of that
            name with other settings or under way in another process, or a full disk.
    """
    config = with_absolute_paths(_settings(target, overrides))
    policies = [_choose(target, adapter)]
    if against is not None:
        policies.insert(0, _choose(target, against))
    config = _evaluation_config(config, [p.adapter for p in policies if p.adapter is not None])
    folder = target if target.is_dir() else config.run.folder
    names = [name] if against is None else [f"{name}-against", name]
    results: dict[str, EvalResult] = {}
    with ExitStack() as stack:
        stack.enter_context(disk_errors(folder))
        notes = [stack.enter_context(_lock(folder, file)) for file in names]
        check_run_folder(folder)
        if overwrite:
            for path in [folder / "eval" / f"{n}{end}" for n in names for end in (SUFFIX, ".json")]:
                path.unlink(missing_ok=True)
        display = stack.enter_context(Display(quiet=quiet))
        for note in filter(None, notes):
            display.note(note)

        def on_loaded(policy: Policy, prompts: PromptSets) -> None:
            if target.is_dir() and not accept_changed_data:
                _check_inputs(target, config, policy, prompts)

        job = stack.enter_context(
            open_run(
                config,
                num_steps=0,
                on_loaded=on_loaded,
                on_note=display.note,
                on_progress=display.sampling,
            )
        )
        for policy, file in zip(policies, names, strict=True):
            results[file] = _evaluate(job, policy, folder, file, display)
        _report(display, folder, dict(zip(names, policies, strict=True)), results)
    return results[name]


def compare(first: Path, second: Path, save: Path | None) -> PairedResult:
    """Compares two evaluations on disk, prints the table, and writes JSON where `save` says.

    Raises:
        UserError: no such evaluations, or evaluations of different problems.
    """
    result = compare_evaluations(first, second)
    with Display() as display:
        display.comparison(result)
    if save is not None:
        result.save(save)
    return result


def _evaluate(
    job: RunContext, policy: EvalTarget, folder: Path, name: str, display: Display
) -> EvalResult:
    scratch = folder / "eval" / f".{name}_adapter"
    handle = None
    if policy.adapter is not None:
        path = fitted(policy.adapter, job.policy, scratch)
        # vLLM knows adapters by name, and two runs of one name have adapters of one name.
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
    display.evaluation_result(f"{name} ({policy.label})", result)
    return result


def _report(
    display: Display,
    folder: Path,
    policies: dict[str, EvalTarget],
    results: dict[str, EvalResult],
) -> None:
    display.evaluations({policies[name].label: result for name, result in results.items()})
    if len(policies) == 2:
        first, second = policies
        paired = compare_evaluations(
            folder / "eval" / f"{first}{SUFFIX}",
            folder / "eval" / f"{second}{SUFFIX}",
            (policies[first].label, policies[second].label),
        )
        (folder / PAIRED_FOLDER).mkdir(exist_ok=True)
        paired.save(folder / PAIRED_FOLDER / f"{second}.json")
        display.comparison(paired)
    for note in next(iter(results.values())).notes:
        display.note(note)
    for name in results:
        display.note(f"every completion and verdict: {folder / 'eval' / name}{SUFFIX}")


def _settings(target: Path, overrides: list[str]) -> RunConfig:
    """The job's settings, of a run folder or a config file; of a run in the run's own dtype."""
    if not target.is_dir():
        return load_config(target, overrides)
    record = read_record(target)
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
    """Of one evaluation's files: a run under way may be evaluated, but one evaluation by one
    process."""
    file = f".evaluation_{name.replace('/', '_')}.lock"
    return run_lock(folder, file, what=f"the evaluation {name!r} in {folder}")


def _check_inputs(run: Path, config: RunConfig, policy: Policy, prompts: PromptSets) -> None:
    """Raises UserError where base or problems are others than when the run began.

    Not compared is what the caller has changed: the base by model.name, the problems by data, seed
    or model.
    """
    record = read_record(run)
    own = with_absolute_paths(parse_config(record["config"]))
    if config.model.name != own.model.name or config.model.revision != own.model.revision:
        return
    check_base(record["base_model"], base_inputs(policy), run)
    is_own_data = config.data.model_copy(update={"train": own.data.train}) == own.data
    if is_own_data and config.run.seed == own.run.seed and "data" in record:
        check_data(record["data"], {"eval": prompt_inputs(prompts.eval)}, run)


def _choose(target: Path, name: str | None) -> EvalTarget:
    """The policy that a name stands for; a run folder has "last" and "best"."""
    if name in _BASE_NAMES or (name is None and not target.is_dir()):
        return EvalTarget("base", None)
    if name not in (None, "last", "best"):
        assert name is not None
        return EvalTarget(name, adapter_path(name))
    if not target.is_dir():
        raise UserError(f"{target} is no run folder, and has no {name} adapter; give its directory")
    if name == "best":
        if not (target / "best").is_dir():
            raise UserError(
                f"{target} has no best adapter yet: no evaluation was held (run.eval_every)"
            )
        return EvalTarget("best", target / "best")
    versions = sorted((target / "adapters").glob("v[0-9]*"))
    final = target / "adapter"
    own = final if final.is_dir() else versions[-1] if versions else None
    if own is None:
        raise UserError(f"{target} has no adapter yet; --adapter base evaluates the base model")
    return EvalTarget("last", own)


def _evaluation_config(config: RunConfig, adapter_dirs: list[Path]) -> RunConfig:
    """The config with what the adapters need, and without data that no evaluation asks for."""
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
