"""A study's settings: one job and grids over its settings; each combination is a cell.

    [study]                     name, arm (rl or sft), seeds, refinement
    [job]                       the settings that all cells share, as for `rl-lora train` or `sft`
    [[grid]]                    a product of lists; several grids are joined
    lora.rank = [1, 8, 64]
    optim.lr = [1e-3, 3e-3]

Cells that amount to the same job (full fine-tuning at rank 1 and at rank 8) are one.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from rl_lora.config import RunConfig, Section, parse_as, read_settings
from rl_lora.config.overrides import apply_overrides
from rl_lora.config.sft import SftConfig
from rl_lora.errors import UserError

JobConfig = RunConfig | SftConfig
ROOTS: dict[str, type[RunConfig] | type[SftConfig]] = {"rl": RunConfig, "sft": SftConfig}
# Ignored in full fine-tuning: cells that differ only in these are one cell.
_LORA_ONLY = ("rank", "alpha", "layers", "lm_head", "variant")
# Settings added after studies had been run: at these values they are left out of a cell's key.
_LATER = (
    ("lora", "variant", "lora"),
    ("optim", "lora_plus_ratio", 1.0),
    ("optim", "max_nonfinite_steps", 3),
)


class StudySection(Section):
    """How the study is run."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # of the study's folder
    output_dir: str = "runs/studies"  # the study's folder is output_dir/name
    arm: Literal["rl", "sft"] = "rl"  # what [job] is: `rl-lora train` or `rl-lora sft`
    seeds: tuple[int, ...] = (0, 1, 2)  # run.seed of the cells; each condition runs with all
    processes_per_cell: int = Field(1, ge=1)  # each on its own GPU, or on the CPU
    num_threads: int = Field(1, ge=1)  # per process on a CPU
    num_per_gpu: int = Field(1, ge=1)  # processes at once per GPU; one small model leaves it idle
    # Rounds of further learning rates for each condition: the geometric means of the best rate and
    # its neighbors, and one beyond the grid's end if the best is there.
    refine_rounds: int = Field(0, ge=0, le=4)
    # Number of last steps whose mean reward is a run's result (rl).
    final_steps: int = Field(5, ge=1)


class StudyConfig(Section):
    """A whole study."""

    study: StudySection = StudySection()
    job: dict[str, Any] = Field(default_factory=dict)
    grid: tuple[dict[str, Any], ...] = Field(default=({},), min_length=1)

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return Path(self.study.output_dir) / self.study.name


class Condition(NamedTuple):
    """What identifies a learning-rate sweep."""

    mode: str  # lora or full
    rank: int  # 0: full
    layers: str  # with an adapter: all, attention or mlp
    lm_head: bool
    batch_size: int  # sequences a step
    variant: str = "lora"
    lora_plus_ratio: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    key: str  # digest of all settings that the run's result depends on, e.g. 3f2a90c1b7
    config: JobConfig
    num_processes: int = 1  # that its work is divided among; its result does not depend on them

    @property
    def arm(self) -> str:
        """Either "rl" or "sft"."""
        return "rl" if isinstance(self.config, RunConfig) else "sft"

    @property
    def batch_size(self) -> int:
        """Sequences a step."""
        config = self.config
        if isinstance(config, RunConfig):
            return config.sampling.num_prompts * config.sampling.num_samples
        return config.sft.batch_size

    @property
    def condition(self) -> Condition:
        """The sweep that it belongs to."""
        lora, ratio, size = self.config.lora, self.config.optim.lora_plus_ratio, self.batch_size
        if lora.mode == "full":
            return Condition("full", 0, "all", False, size)
        return Condition(lora.mode, lora.rank, lora.layers, lora.lm_head, size, lora.variant, ratio)

    @property
    def cost_class(self) -> str:
        """Cells of one class differ only in rate and seed, so they take about the same time."""
        settings = self._settings()
        settings["optim"].pop("lr")
        settings["run"].pop("seed")
        if self.num_processes > 1:
            settings["num_processes"] = self.num_processes
        return _digest(settings)

    def _settings(self) -> dict[str, Any]:
        settings = self.config.model_dump(mode="json")
        settings["run"] = {k: settings["run"][k] for k in ("seed", "num_steps", "eval_every")}
        settings["model"].pop("shard")  # where the weights are does not change the result
        if self.config.lora.mode == "full":
            settings["lora"] = {"mode": "full"}
        for section, key, usual in _LATER:
            if settings[section].get(key) == usual:
                settings[section].pop(key)
        return settings

    def with_rate(self, lr: float) -> Cell:
        """The same cell at another learning rate."""
        optim = self.config.optim.model_copy(update={"lr": lr})
        return make_cell(self.config.model_copy(update={"optim": optim}), self.num_processes)


def make_cell(config: JobConfig, num_processes: int = 1) -> Cell:
    """The cell of one job."""
    cell = Cell("", config)
    return Cell(_digest(cell._settings()), config, num_processes)


def load_study(path: Path, overrides: list[str] | None = None) -> StudyConfig:
    """Reads and checks a study.

    Raises:
        UserError: names the first thing wrong in the file, a key, or a cell's settings.
    """
    of_job = [one.removeprefix("job.") for one in overrides or [] if one.startswith("job.")]
    of_study = [one for one in overrides or [] if not one.startswith("job.")]
    raw = read_settings(path, of_study, StudyConfig)
    study = parse_as(StudyConfig, raw)
    apply_overrides(study.job, of_job, ROOTS[study.study.arm])
    if not study.study.seeds:
        raise UserError("config: study.seeds is empty; give at least one seed")
    cells_of(study)
    return study


def cells_of(study: StudyConfig) -> list[Cell]:
    """All cells of the grids without duplicates, seeds innermost.

    Raises:
        UserError: names a cell whose settings are wrong.
    """
    cells: dict[str, Cell] = {}
    for grid in study.grid:
        for departures in products(grid):
            for seed in study.study.seeds:
                config = _job(study, departures, seed)
                cell = make_cell(config, study.study.processes_per_cell)
                cells.setdefault(cell.key, cell)
    return list(cells.values())


def products(grid: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Dotted key -> value, for every element of the product of a grid's lists.

    Example: {"lora": {"rank": [1, 8]}, "optim": {"lr": 0.1}} gives {"lora.rank": 1, "optim.lr":
    0.1} and {"lora.rank": 8, "optim.lr": 0.1}.
    """
    axes = dict(_axes(grid))
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _axes(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, list[Any]]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _axes(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, list) else [value]


def _job(study: StudyConfig, departures: Mapping[str, Any], seed: int) -> JobConfig:
    raw = copy.deepcopy(study.job)
    for key, value in {**departures, "run.seed": seed}.items():
        *parents, last = key.split(".")
        node = raw
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    if raw.get("lora", {}).get("mode") == "full":
        for key in _LORA_ONLY:
            raw["lora"].pop(key, None)
        raw.get("optim", {}).pop("lora_plus_ratio", None)
    try:
        config = parse_as(ROOTS[study.study.arm], raw)
        _check_processes(config, study.study.processes_per_cell)
    except UserError as error:
        name = ", ".join(f"{key}={value}" for key, value in departures.items()) or "the job"
        raise UserError(f"study {study.study.name}, cell {name}: {error}") from error
    return config


def _check_processes(config: JobConfig, num: int) -> None:
    """Raises UserError if a step has no work for each of a cell's processes."""
    if isinstance(config, RunConfig):
        setting, size = "sampling.num_prompts", config.sampling.num_prompts
    else:
        setting, size = "sft.batch_size", config.sft.batch_size
    if num > size:
        raise UserError(
            f"study.processes_per_cell = {num} is more than {setting} = {size}, and a step is "
            f"divided by prompts: set it to {size} or less"
        )


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
