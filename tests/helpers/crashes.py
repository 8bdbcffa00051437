"""Jobs that are killed at random moments, started again until they end, and compared with an
unbroken run's files. `scripts/crash_test.py` kills many, the tests a few."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

import rl_lora.train
from rl_lora.cli import main
from tests.helpers.kills import Ending, Kill, in_a_child, in_a_process
from tests.helpers.run_files import difference, run_files

ROOT = Path(__file__).resolve().parents[2]
SMOKE, SFT_TINY = (ROOT / "configs" / name for name in ("smoke.toml", "sft_tiny.toml"))
_SMALL = ["run.name=x", "run.num_steps=4", "data.held_out=4", "run.loggers=[]"]
RL_SMALL = [
    *_SMALL,
    *("sampling.num_prompts=2", "sampling.max_tokens=16", "sampling.num_samples=4"),
]
# Most groups are tied, and steps have several rounds.
DYNAMIC = ["sampling.max_rounds=3", "sampling.oversample=1.5", "sampling.temperature=0.3"]
DYNAMIC += ["data.curriculum=pass_rate"]
SFT_SMALL = [*_SMALL, "sft.batch_size=4"]


@dataclass(frozen=True)
class Job:
    """A command line that can be killed and given again.

    Example: Job("rl: every step", ("train", "smoke", "run.output_dir=FOLDER", "--resume"))
    """

    name: str
    arguments: tuple[str, ...]  # of `rl-lora`; FOLDER stands for where it runs
    prepared: Path | None = None  # what is in FOLDER at its start
    is_study: bool = False  # its last start has --retry, for cells that were killed by themselves
    can_fork: bool = True  # False: its libraries do not work in a forked child
    has_figures: bool = False  # False: they are not compared, and forked children draw none


@dataclass(frozen=True)
class Crash:
    """A job that was killed and then ended."""

    kills: tuple[Kill, ...]  # those that hit it
    last: Ending  # of the start that ran to the end
    files: dict[str, str]  # as `run_files`
    error: str = ""  # if the last start failed: the last of what it printed


class Bench:
    """Runs jobs in one folder, the same for all, so that the paths in their files are the same.

    Args:
        folder: for everything; emptied before each job.
    """

    def __init__(self, folder: Path) -> None:
        self._work, self._log = folder / "work", folder / "work.log"
        self._whole: dict[tuple[Job, bool], Crash] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def whole(self, job: Job, *, is_forked: bool = True) -> Ending:
        """How an unbroken run ends; each job's is made once.

        Raises:
            AssertionError: it fails, or a separate process writes other files than a forked one.
        """
        if (job, is_forked) not in self._whole:
            crash = self.crash(job, [], is_forked=is_forked)
            assert not crash.error, crash.error
            self._whole[job, is_forked] = crash
            if not is_forked and job.can_fork:
                assert not (found := self.difference(job, crash)), found
        return self._whole[job, is_forked].last

    def difference(self, job: Job, crash: Crash) -> str:
        """The first file that differs from the unbroken run's, and how; empty if none does."""
        self.whole(job, is_forked=job.can_fork)
        return difference(self._whole[job, job.can_fork].files, crash.files)

    def crash(self, job: Job, kills: Sequence[Kill], *, is_forked: bool = True) -> Crash:
        """Starts the job once for each kill, and then until it ends.

        Raises:
            AssertionError: a process outlives it.
        """
        shutil.rmtree(self._work, ignore_errors=True)
        if job.prepared is None:
            self._work.mkdir()
        else:
            shutil.copytree(job.prepared, self._work)
        arguments = [part.replace("FOLDER", str(self._work)) for part in job.arguments]
        draw = rl_lora.train.draw_figures if job.has_figures else lambda folder: []
        with mock.patch("rl_lora.train.draw_figures", draw):
            hits = tuple(kill for kill in kills if self._start(arguments, kill).was_killed)
            if job.is_study:
                arguments.append("--retry")
            last = self._start(arguments, Kill(is_forked=is_forked))
        if last.code != 0:
            text = self._log.read_text(encoding="utf-8", errors="replace")
            return Crash(hits, last, {}, f"exit code {last.code}: {text[-3000:]}")
        files = run_files(self._work)
        if not job.has_figures:
            files = {name: files[name] for name in files if "/figures/" not in name}
        return Crash(hits, last, files)

    def keep(self, job: Job, folder: Path) -> Path:
        """Copies an unbroken run's folder; returns the copy."""
        crash = self.crash(job, [])
        assert not crash.error, crash.error
        shutil.copytree(self._work, folder)
        return folder

    def _start(self, arguments: Sequence[str], kill: Kill) -> Ending:
        if kill.is_forked:
            return in_a_child(lambda: main(arguments), self._log, kill)
        return in_a_process([sys.executable, "-m", "rl_lora", *arguments], self._log, kill)


def load_libraries(folder: Path) -> None:
    """Runs short jobs in this process, so that forked children find all modules loaded.

    One thread: the pools of others would be lost in a fork.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    more = [f"run.output_dir={folder}", "run.num_steps=1", "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        for command, config, small in (("train", SMOKE, RL_SMALL), ("sft", SFT_TINY, SFT_SMALL)):
            run = [*small, *more, f"run.name={command}"]
            assert main([command, str(config), *run]) == 0
    torch.set_num_threads(num_threads)


def draw_kills(source: random.Random, whole: Ending, *, is_forked: bool = True) -> list[Kill]:
    """One to three moments for a job whose unbroken run ended so."""
    kills = []
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        is_group, seconds = source.random() < 0.5, source.uniform(0, whole.seconds)
        number = source.randint(1, whole.num_operations) if whole.num_operations else None
        if is_forked and source.random() < 0.6:
            kills.append(Kill(at_operation=number, is_group=is_group))
        else:
            kills.append(Kill(after_s=seconds, is_group=is_group, is_forked=is_forked))
    return kills


def rl(name: str, *settings: str) -> Job:
    """A small RL job."""
    return _job(name, "train", SMOKE, *RL_SMALL, *settings)


def sft(name: str, *settings: str) -> Job:
    """A small supervised job."""
    return _job(name, "sft", SFT_TINY, *SFT_SMALL, *settings)


def _job(name: str, command: str, config: Path, *settings: str) -> Job:
    return Job(name, (command, str(config), *settings, "run.output_dir=FOLDER", "--resume"))
