"""`rl-lora eval`: evaluates a run's adapter, any adapter, or the base model.

With `--against` two policies are evaluated in one engine, on the same problems and random numbers.
The processes of a job divide the problems; rank 0 writes and prints.
"""

from __future__ import annotations

import contextlib
import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rl_lora import distributed
from rl_lora.adapters import files as adapters
from rl_lora.adapters.resize import common_settings, fitted
from rl_lora.build import RunContext, check_run_folder, make_evaluation, open_run
from rl_lora.config import HELD_OUT, RunConfig, load_config, parse_config
from rl_lora.config.checks import check_served
from rl_lora.config.overrides import apply_overrides
from rl_lora.errors import UserError
from rl_lora.evaluation.evaluate import evaluate
from rl_lora.evaluation.files import SUFFIX
from rl_lora.evaluation.paired import PairedResult, compare_evaluations
from rl_lora.evaluation.scores import EvalResult
from rl_lora.models.hub import adapter_path
from rl_lora.prompts import PromptSets
from rl_lora.report.terminal import Display
from rl_lora.runs.inputs import base_inputs, check_base, check_data, prompt_inputs
from rl_lora.runs.lock import run_lock
from rl_lora.runs.processes import (
    check_same_inputs,
    check_same_settings,
    check_shared_folder,
)
from rl_lora.runs.record import read_record, with_absolute_paths, with_dtype
from rl_lora.storage.directories import disk_errors

if TYPE_CHECKING:
    from rl_lora.policy import Policy


def evaluation(arguments: Namespace, *, on_training: bool = False) -> Path:
    """Evaluates as `eval_options` says, into RUN/eval/NAME.jsonl.gz (a line per problem) and .json.

    An evaluation that was killed resumes. With --against the other policy's evaluation is
    NAME-against, and the comparison RUN/paired/NAME.json.

    Args:
        arguments: of the command line.
        on_training: on the training problems instead.

    Returns:
        The file of NAME's problems.

    Raises:
        UserError: no such run, config or adapter, an adapter of another base model, an evaluation
            of that name that has other settings or is being made by another process, a full disk,
            or processes with different settings or files.
        OtherProcessError: another process of the job failed, died or hangs.
    """
    config = with_absolute_paths(settings_of(arguments.target, arguments.overrides))
    with distributed.joined(config.model.device, config.run.process_timeout_s):
        fix = "start all processes with the same one"
        distributed.check_same(vars(arguments), "command line", fix)
        return _evaluate_all(arguments, config, on_training=on_training)


def _evaluate_all(arguments: Namespace, config: RunConfig, *, on_training: bool) -> Path:
    target, name = arguments.target, arguments.name
    policies = {name: _choose(target, arguments.adapter)}
    if arguments.against is not None:
        policies = {f"{name}-against": _choose(target, arguments.against), **policies}
    adapter_dirs = [path for _, path in policies.values() if path]
    config = _evaluation_config(config, adapter_dirs, keep_training=on_training)
    folder = target if target.is_dir() else config.run.folder

    def on_loaded(policy: Policy, prompts: PromptSets) -> None:
        if distributed.world_size() > 1:
            data = {"eval": prompt_inputs(prompts.eval)}
            check_same_inputs({"base": base_inputs(policy), "data": data})
        if target.is_dir() and not arguments.accept_changed_data:
            _check_inputs(target, config, policy, prompts)

    with (
        _open_files(config, folder, list(policies), overwrite=arguments.overwrite) as display,
        open_run(
            config,
            num_steps=0,
            on_loaded=on_loaded,
            on_note=display.note,
            on_warning=display.warn,
            on_progress=display.sampling,
        ) as job,
    ):
        if on_training:
            job = replace(job, prompts=replace(job.prompts, eval=job.prompts.train))
        results = [
            _evaluate(job, path, folder / "eval" / file, display, label)
            for file, (label, path) in policies.items()
        ]
        labels = [label for label, _ in policies.values()]
        display.evaluations(dict(zip(labels, results, strict=True)))
        if len(policies) == 2:
            paired = distributed.from_main(lambda: _compare(folder, policies), "the comparison")
            display.comparison(paired)
        for note in results[0].notes:
            display.note(note)
        for file in policies:
            display.note(f"every completion and verdict: {folder / 'eval' / file}{SUFFIX}")
    return folder / "eval" / f"{name}{SUFFIX}"


@contextlib.contextmanager
def _open_files(
    config: RunConfig, folder: Path, names: list[str], *, overwrite: bool
) -> Iterator[Display]:
    """Holds the evaluations' files for this job; yields the display."""
    check_same_settings(config)
    with contextlib.ExitStack() as stack:
        notes: list[str | None] = []
        if distributed.is_main():
            stack.enter_context(disk_errors(folder))
            notes = [stack.enter_context(_lock(folder, name)) for name in names]
            check_run_folder(folder)
            if overwrite:
                for file in [f"{name}{suffix}" for name in names for suffix in (SUFFIX, ".json")]:
                    (folder / "eval" / file).unlink(missing_ok=True)
        display = stack.enter_context(Display())
        for note in filter(None, notes):
            display.note(note)
        distributed.gather(None, "the start")  # rank 0 has made the folder
        check_shared_folder(folder)
        yield display


def _evaluate(
    job: RunContext, adapter: Path | None, path: Path, display: Display, label: str
) -> EvalResult:
    scratch, handle = path.with_name(f".{path.name}_adapter"), None
    try:
        if adapter is not None:
            directory = distributed.from_main(
                lambda: fitted(adapter, job.policy, scratch), "fitting an adapter"
            )
            # vLLM identifies adapters by name, and two runs of one name share their adapters'
            # names.
            key = adapters.fingerprint(adapters.load_tensors(directory))[:16]
            handle = adapters.open_adapter(directory, job.policy, name=f"evaluation-{key}")
        job.sampler.set_adapter(handle)
        on_problems = make_evaluation(job, display.evaluation)
        policy = "base" if handle is None else handle.fingerprint
        result = evaluate(job.sampler, on_problems, path, policy=policy)
        distributed.gather(None, "the end of an evaluation")  # all have read the adapter
    finally:
        if distributed.is_main():
            shutil.rmtree(scratch, ignore_errors=True)
    display.evaluation_result(f"{path.name} ({label})", result)
    return result


def _compare(folder: Path, policies: Mapping[str, tuple[str, Path | None]]) -> PairedResult:
    """Compares the two policies' evaluations, into RUN/paired/NAME.json."""
    first, second = (folder / "eval" / f"{file}{SUFFIX}" for file in policies)
    before, after = (label for label, _ in policies.values())
    paired = compare_evaluations(first, second, (before, after))
    (folder / "paired").mkdir(exist_ok=True)
    paired.save(folder / "paired" / f"{[*policies][-1]}.json")
    return paired


def settings_of(target: Path, overrides: list[str]) -> RunConfig:
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


def _lock(folder: Path, name: str) -> contextlib.AbstractContextManager[str | None]:
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


def _choose(target: Path, name: str | None) -> tuple[str, Path | None]:
    """(label, directory) of a policy, None for the base; a run folder has "last" and "best"."""
    if name in ("base", "none") or (name is None and not target.is_dir()):
        return "base", None
    if name not in (None, "last", "best"):
        return str(name), adapter_path(str(name))
    # A run in progress may publish another version before the other processes look.
    return distributed.from_main(lambda: _choose_of_run(target, name), "the start")


def _choose_of_run(target: Path, name: str | None) -> tuple[str, Path]:
    if not target.is_dir():
        raise UserError(
            f"{target} is not a run folder and has no {name} adapter; give the adapter's directory"
        )
    if name == "best":
        if not (target / "best").is_dir():
            raise UserError(
                f"{target} has no best adapter yet: nothing was evaluated (run.eval_every)"
            )
        return "best", target / "best"
    found = [target / "adapter", *sorted((target / "adapters").glob("v[0-9]*"), reverse=True)]
    own = next((path for path in found if path.is_dir()), None)
    if own is None:
        raise UserError(f"{target} has no adapter yet; --adapter base evaluates the base model")
    return "last", own


def _evaluation_config(
    config: RunConfig, adapter_dirs: list[Path], *, keep_training: bool
) -> RunConfig:
    """The config with what the adapters need, and without data that the evaluation does not use."""
    update: dict[str, object] = {}
    named = config.data.eval
    if named and all(source.name != HELD_OUT for source in named) and not keep_training:
        update["data"] = config.data.model_copy(update={"train": ()})
    if lora := common_settings(adapter_dirs):
        update["lora"] = config.lora.model_copy(update=lora)
    config = config.model_copy(update=update)
    try:
        check_served(config.lora, config.sampling, config.resources)
    except ValueError as error:
        raise UserError(f"adapter {adapter_dirs[0]}: {error}") from error
    return config
