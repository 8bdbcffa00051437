"""`rl-lora eval`: the held-out exam by itself, of a run's adapter, any adapter, or the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rl_lora.config import RunConfig, apply_overrides, load_config, parse_config
from rl_lora.display import Display
from rl_lora.errors import UserError
from rl_lora.evaluate import EvalResult, evaluate
from rl_lora.job import check_run_folder, open_job
from rl_lora.sampler import mix_seed


def exam(target: Path, overrides: list[str], adapter: str | None, name: str) -> EvalResult:
    """Evaluates and writes RUN/eval/NAME.jsonl (a row a problem) and NAME.json.

    Args:
        target: a run folder (its settings and its final adapter) or a config file.
        overrides: `section.key=value`; `data.eval=aime24` takes another exam.
        adapter: an adapter directory, "none" for the base, None for the run's own.

    Raises:
        UserError: no such run, config or adapter, or an adapter of another base model.
    """
    config, own_adapter = _settings(target, overrides)
    chosen = own_adapter if adapter is None else None if adapter == "none" else Path(adapter)
    config = _with_adapter_settings(config, chosen)
    folder = target if target.is_dir() else config.run.folder
    check_run_folder(folder)
    with Display() as display, open_job(config, on_note=display.note) as job:
        if chosen is None:
            job.sampler.use(None)
        else:
            from rl_lora.adapter import open_adapter

            job.sampler.use(open_adapter(chosen, job.policy))
        result = evaluate(
            job.sampler,
            job.prompts.eval,
            job.reward,
            config.eval,
            max_tokens=config.sampling.max_tokens,
            seed=mix_seed(config.run.seed, "exam"),
            stop=config.sampling.stop,
            folder=folder / "eval",
            name=name,
            on_progress=display.exam,
        )
        display.exams({name: result})
        display.note(f"every completion and verdict: {folder / 'eval' / name}.jsonl")
    return result


def _settings(target: Path, overrides: list[str]) -> tuple[RunConfig, Path | None]:
    """The job's settings, and the adapter that a run folder ends with."""
    if not target.is_dir():
        return load_config(target, overrides), None
    record = target / "run.json"
    if not record.is_file():
        raise UserError(f"{target} is no run folder: it has no run.json")
    raw: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["config"]
    versions = sorted((target / "adapters").glob("v[0-9]*"))
    final = target / "adapter"
    own = final if final.is_dir() else versions[-1] if versions else None
    return parse_config(apply_overrides(raw, overrides)), own


def _with_adapter_settings(config: RunConfig, adapter: Path | None) -> RunConfig:
    """The config with the adapter's own rank and alpha, so that any PEFT directory can be given."""
    if adapter is None or not (adapter / "adapter_config.json").is_file():
        return config
    from rl_lora.adapter import lora_settings

    return config.model_copy(update={"lora": config.lora.model_copy(update=lora_settings(adapter))})
