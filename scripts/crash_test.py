"""Kills jobs with SIGKILL at random moments, lets them end, and compares them with unbroken runs.

    python scripts/crash_test.py                            # 50 of each kind but vllm
    python scripts/crash_test.py --kind vllm --kills 6
    python scripts/crash_test.py --kind rl --only 17        # one of them again

Every file of the run's folder is compared, times and the like apart (tests/helpers/run_files.py).
The moments are file operations and times, in start-up, steps, checkpoints, evaluations and figures;
some runs are killed several times. All but a few are forked children, on one thread, of a process
that has the libraries loaded; the others are separate processes, killed in their start-up too.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.helpers.crashes import DYNAMIC, ROOT, Bench, Job, draw_kills, load_libraries, rl, sft

CONFIGS = ROOT / "configs"
WHOLE_PROCESS_EVERY = 10  # runs: it takes seconds to load its libraries


# --- the jobs of each kind ------------------------------------------------------------------------


def rl_jobs(bench: Bench, folder: Path) -> list[Job]:
    more = "algorithm.loss=ppo optim.num_updates=2 algorithm.kl=loss algorithm.kl_weight=0.1"
    return [
        replace(rl("figures, a checkpoint each step", "run.eval_every=2"), has_figures=True),
        rl("before the first checkpoint", "run.checkpoint_every=50", "run.eval_every=2"),
        rl("warm start", "warm_start.num_steps=2", "run.checkpoint_every=2"),
        rl("ppo, two updates, KL", *more.split(), "run.checkpoint_every=3"),
        rl("dynamic sampling", *DYNAMIC, "run.checkpoint_every=2"),
        rl("full fine-tuning", "lora.mode=full", "optim.lr=1e-5", "run.eval_every=1"),
        rl("DoRA, all evaluated", "lora.variant=dora", "run.eval_every=1", "eval.chunk_samples=2"),
    ]


def sft_jobs(bench: Bench, folder: Path) -> list[Job]:
    return [
        sft("a checkpoint each step", "run.checkpoint_every=1"),
        sft("before the first checkpoint"),
        sft("every third step", "run.checkpoint_every=3", "run.num_steps=10", "run.keep_last=1"),
        sft("full fine-tuning", "lora.mode=full", "optim.lr=1e-4", "run.checkpoint_every=2"),
    ]


def eval_jobs(bench: Bench, folder: Path) -> list[Job]:
    """Of a finished run, which is made first."""
    run = rl("", "run.eval_every=2", "data.held_out=20")
    prepared = bench.keep(run, folder / "finished")
    small = ("eval.chunk_samples=4", "--name", "own")
    return [
        Job(name, ("eval", "FOLDER/x", *small, *more), prepared)
        for name, more in {
            "the last adapter": (),
            "against the base": ("--against", "base"),
            "best against last": ("--adapter", "best", "--against", "last"),
            "four samples": ("eval.num_samples=4", "eval.temperature=1"),
        }.items()
    ]


def study_jobs(bench: Bench, folder: Path) -> list[Job]:
    return [
        _study(folder, "RL", "study_rl_rank", _SMALL_RL_STUDY),
        _study(folder, "SFT, refined", "study_sft_rank", [*_SMALL_STUDY, "study.refine_rounds=1"]),
        _study(folder, "SFT, checkpoints", "study_sft_variants", _SMALL_STUDY[:-1]),
    ]


_SMALL_STUDY = ["job.run.num_steps=4", "job.data.held_out=4", "job.run.checkpoint_every=2"]
_SMALL_RL_STUDY = [
    *_SMALL_STUDY,
    *("job.sampling.num_prompts=2", "job.sampling.num_samples=4", "job.sampling.max_tokens=16"),
]


def vllm_jobs(bench: Bench, folder: Path) -> list[Job]:
    more = ("sampling.backend=vllm", "run.eval_every=2")
    jobs = [rl("vLLM", *more), rl("vLLM, stale", *more, "sampling.max_staleness=2")]
    return [replace(job, can_fork=False) for job in jobs]


def config_jobs(bench: Bench, folder: Path) -> list[Job]:
    """Every shipped config for a CPU. It keeps its run.checkpoint_every, and takes two steps more
    than that, or four where it is over 50."""
    jobs = []
    for path in sorted(CONFIGS.glob("*.toml")):
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        job = raw.get("job", raw)
        if job.get("model", {}).get("device") != "cpu":
            continue
        every = job["run"].get("checkpoint_every", 1)
        num_steps = every + 2 if every <= 50 else 4
        if "study" in raw:
            settings = [f"job.run.num_steps={num_steps}", "job.data.held_out=20"]
            jobs.append(_study(folder, path.stem, path.stem, settings))
        else:
            command = "sft" if path.stem.startswith("sft") else "train"
            more = [f"run.num_steps={num_steps}", "run.name=x", "run.output_dir=FOLDER"]
            jobs.append(Job(path.stem, (command, path.stem, *more, "--resume")))
    return jobs


def _study(folder: Path, name: str, config: str, settings: Sequence[str]) -> Job:
    """A shipped study with the first two cells of its grid."""
    text = (CONFIGS / f"{config}.toml").read_text(encoding="utf-8")
    head, *grids = text.split("[[grid]]")
    values = tomllib.loads(grids[0])
    path = folder / f"{config}.toml"
    path.write_text(head + "[[grid]]\n" + _first_cells(values), encoding="utf-8")
    own = ("study.seeds=[0]", "study.output_dir=FOLDER", "study.name=x", "study.refine_rounds=0")
    return Job(name, ("study", str(path), *own, *settings), is_study=True)


def _first_cells(grid: dict[str, Any]) -> str:
    """The grid with the first value of each list, and of the last one the first two."""
    lists = {
        f"{section}.{key}": list(values) if isinstance(values, list) else [values]
        for section, keys in grid.items()
        for key, values in keys.items()
    }
    lengths = dict.fromkeys(lists, 1) | {[*lists][-1]: 2}
    return "".join(f"{key} = {lists[key][:num]!r}\n" for key, num in lengths.items())


KINDS: dict[str, Callable[[Bench, Path], list[Job]]] = {
    "rl": rl_jobs,
    "sft": sft_jobs,
    "eval": eval_jobs,
    "study": study_jobs,
    "configs": config_jobs,
    "vllm": vllm_jobs,
}


# --- the kills ------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What has become of a kind's runs."""

    kind: str
    num_equal: int = 0
    num_kills: int = 0
    differences: list[str] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this (repeatable)")
    parser.add_argument("--kills", type=int, default=50, metavar="N", help="runs of each kind")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="only this run of its kind")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args(argv)
    numbers = range(arguments.kills) if arguments.only is None else [arguments.only]
    console = Console()
    with (
        tempfile.TemporaryDirectory(prefix="crash_test_") as folder,
        Progress(console=console) as progress,
    ):
        torch.set_num_threads(1)
        load_libraries(Path(folder) / "libraries")
        tallies = []
        for kind in arguments.kind or (kind for kind in KINDS if kind != "vllm"):
            tallies.append(tally := Tally(kind))
            crash_kind(tally, numbers, arguments.seed, Path(folder), progress)
    table = Table("kind", "runs", "kills", "equal", "different")
    for tally in tallies:
        num_different = len(tally.differences)
        counts = (tally.num_equal + num_different, tally.num_kills, tally.num_equal, num_different)
        table.add_row(tally.kind, *map(str, counts))
    console.print(table)
    return int(any(tally.differences for tally in tallies))


def crash_kind(
    tally: Tally, numbers: Sequence[int], seed: int, folder: Path, progress: Progress
) -> None:
    """Kills runs of a kind, those of `numbers`, and prints the ones that differ."""
    kind, bench = tally.kind, Bench(folder / tally.kind)
    jobs = KINDS[kind](bench, folder)
    task = progress.add_task(kind, total=len(numbers))
    for number in numbers:
        job, source = jobs[number % len(jobs)], random.Random(f"{seed} {kind} {number}")
        is_forked = job.can_fork and (number + 1) % WHOLE_PROCESS_EVERY != 0
        kills = draw_kills(source, bench.whole(job, is_forked=is_forked), is_forked=is_forked)
        crash = bench.crash(job, kills)
        tally.num_kills += len(crash.kills)
        if found := crash.error or bench.difference(job, crash):
            moments = ", ".join(map(str, crash.kills)) or "never"
            line = f"{kind} {number} ({job.name}), killed at {moments}: {found}"
            progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            again = f"--kind {kind} --only {number} --seed {seed}"
            progress.console.print(f"  again: python scripts/crash_test.py {again}")
            tally.differences.append(line)
        else:
            tally.num_equal += 1
        progress.advance(task)
        if not progress.console.is_terminal:  # where no bar is shown
            print(f"{kind} {number} of {len(numbers)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
