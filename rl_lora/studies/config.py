"""A study's settings: one job and the grids over it, as cells.

    [study]                     name, arm (rl or sft), seeds, refinement
    [job]                       the job that all cells share, as `rl-lora train` or `sft` reads it
    [[grid]]                    a product of lists; several grids are put together
    lora.rank = [1, 8, 64]
    optim.lr = [1e-3, 3e-3]

Cells that come out as the same job (a full fine-tuning cell of rank 1 and of rank 8) are one.
"""

from __future__ import annotations

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
# What a full fine-tuning run does not look at: cells that differ in it alone are one cell.
_LORA_ONLY = ("rank", "alpha", "layers", "lm_head", "variant")
# Settings that came after studies had been run: at these values they are no part of a cell's key.
_LATER = (("lora", "variant", "lora"), ("optim", "lora_plus_ratio", 1.0))


class StudySection(Section):
    """What is studied and how."""

    name: str = Field("study", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: str = "runs/studies"  # the study's folder is output_dir/name
    arm: Literal["rl", "sft"] = "rl"
    seeds: tuple[int, ...] = (0, 1, 2)
    num_threads: int = Field(1, ge=1)  # of a cell on a CPU
    num_per_gpu: int = Field(1, ge=1)  # cells at once on one GPU; a small model leaves it idle
    # Rounds of further rates for each condition: halfway (by ratio) to the best one's neighbours,
    # and beyond the grid's end where the best one lies there.
    refine_rounds: int = Field(0, ge=0, le=4)
    # Steps at a run's end whose mean reward is its result (rl).
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
    """What a learning rate is swept for.

    Example: Condition(mode="lora", rank=8, layers="all", lm_head=False, batch_size=32,
    variant="dora", lora_plus_ratio=1.0)
    """

    mode: str  # lora or full
    rank: int  # 0: full
    layers: str
    lm_head: bool
    batch_size: int  # sequences a step
    variant: str = "lora"
    lora_plus_ratio: float = 1.0


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Example: Cell(key="3f2a90c1b7", config=RunConfig(...))
    """

    key: str  # changes with any setting that a run's result depends on
    config: JobConfig

    @property
    def arm(self) -> str:
        """rl or sft."""
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
        """What its rate is swept for."""
        lora = self.config.lora
        if lora.mode == "full":
            return Condition("full", 0, "all", False, self.batch_size)
        return Condition(
            mode="lora",
            rank=lora.rank,
            layers=lora.layers,
            lm_head=lora.lm_head,
            batch_size=self.batch_size,
            variant=lora.variant,
            lora_plus_ratio=self.config.optim.lora_plus_ratio,
        )

    @property
    def cost_class(self) -> str:
        """Cells of one class take about the same time: they differ in rate and seed alone."""
        return _digest(self._settings(without=("lr", "seed")))

    def _settings(self, without: tuple[str, ...] = ()) -> dict[str, Any]:
        settings = self.config.model_dump(mode="json")
        settings["run"] = {k: settings["run"][k] for k in ("seed", "num_steps", "eval_every")}
        if self.config.lora.mode == "full":
            settings["lora"] = {"mode": "full"}
        for section, key, usual in _LATER:
            if settings[section].get(key) == usual:
                settings[section].pop(key)
        for section, key in (("optim", "lr"), ("run", "seed")):
            if key in without:
                settings[section].pop(key, None)
        return settings

    def with_rate(self, lr: float) -> Cell:
        """The same cell at another learning rate."""
        optim = self.config.optim.model_copy(update={"lr": lr})
        return make_cell(self.config.model_copy(update={"optim": optim}))


def make_cell(config: JobConfig) -> Cell:
    """The cell of one job; its key is a digest of the settings."""
    cell = Cell("", config)
    return Cell(_digest(cell._settings()), config)


def load_study(path: Path, overrides: list[str] | None = None) -> StudyConfig:
    """Reads and checks a study.

    Raises:
        UserError: the file, a key, or a cell's settings are wrong, naming the first.
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
    """All cells of the grids, each once, seeds innermost.

    Raises:
        UserError: a cell's settings are wrong, naming the cell.
    """
    cells: dict[str, Cell] = {}
    for grid in study.grid:
        for departures in products(grid):
            for seed in study.study.seeds:
                cell = make_cell(_job(study, departures, seed))
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
    raw: dict[str, Any] = json.loads(json.dumps(study.job))  # a copy of its own
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
        return parse_as(ROOTS[study.study.arm], raw)
    except UserError as error:
        told = ", ".join(f"{key}={value}" for key, value in departures.items()) or "the job"
        raise UserError(f"study {study.study.name}, cell {told}: {error}") from error


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]
