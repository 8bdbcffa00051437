"""Short jobs with a fault each, run one after another in one process (scripts/soak.py).

Each function gets an empty folder and a random source, injects its fault and checks how the job
ends. A job that can resume does so, to its end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import resource
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

import rl_lora.train
from rewards import load_reward
from rl_lora.cli import main
from rl_lora.config import load_config
from rl_lora.config.sft import load_sft_config
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.losses import LossInputs, importance_sampling
from rl_lora.report.live import LiveReport, make_server
from rl_lora.runs.checkpoint import latest_checkpoint
from rl_lora.runs.lock import run_lock
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.sft.train import fine_tune
from rl_lora.train import train
from tests.helpers.crashes import RL_SMALL, SFT_SMALL, SFT_TINY, SMOKE
from tests.helpers.hostile import hostile_inputs
from tests.helpers.kills import Kill, in_a_child

_numbers = itertools.count()
_calls_left: dict[str, int] = {}  # of the user's "reward" or "loss" until it fails; else: never


def rl(folder: Path, *settings: str, resume: bool = False, has_figures: bool = False) -> None:
    """A small RL job of four steps, in folder/x; its figures would take longer than itself."""
    config = load_config(SMOKE, [*RL_SMALL, f"run.output_dir={folder}", *settings])
    draw = rl_lora.train.draw_figures if has_figures else lambda folder: []
    with mock.patch("rl_lora.train.draw_figures", draw):
        train(config, resume=resume, quiet=True)


def resumed(folder: Path, *settings: str) -> None:
    """The job of `rl`, to its end."""
    rl(folder, *settings, resume=True)
    assert (folder / "x" / "adapter").is_dir()


def undisturbed(folder: Path, source: random.Random) -> None:
    """No fault, but more of what a job can do."""
    choices = ["optim.num_updates=2", "reward.num_workers=2", "warm_start.num_steps=2"]
    choices += ["run.eval_every=2", "run.loggers=['tensorboard']", "lora.mode=full"]
    rl(folder, source.choice(choices), has_figures=True)


def supervised(folder: Path, source: random.Random) -> None:
    """A supervised job that is resumed with more steps."""
    for num_steps in (2, source.randint(3, 6)):
        settings = [*SFT_SMALL, f"run.output_dir={folder}", f"run.num_steps={num_steps}"]
        fine_tune(load_sft_config(SFT_TINY, settings), resume=True, quiet=True)


def commands(folder: Path, source: random.Random) -> None:
    """An evaluation, a report and an export of a run."""
    rl(folder, "run.num_steps=2")
    run = str(folder / "x")
    assert main(["eval", run, "--name", "own", "--against", "base"]) == 0
    assert main(["report", run]) == 0
    assert main(["export", run, "--merged", str(folder / "merged")]) == 0


def damaged_checkpoint(folder: Path, source: random.Random) -> None:
    """One bit of the newest checkpoint is another."""
    rl(folder, "run.num_steps=3")
    newest = latest_checkpoint(folder / "x")
    assert newest is not None
    file = source.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    file.write_bytes(content)
    resumed(folder)


def full_disk(folder: Path, source: random.Random) -> None:
    """No file may grow beyond a size: the system's error EFBIG, which is treated as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = source.choice((200, 2_000, 5_000, 20_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            rl(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    resumed(folder)


def failing_reward(folder: Path, source: random.Random) -> None:
    """A user's reward raises in the midst of a batch."""
    _calls_left["reward"] = source.randint(2, 30)
    with pytest.raises(UserError, match="a user's error"):
        rl(folder, f"reward.name={__name__}:user_reward")
    del _calls_left["reward"]


def hanging_verifier(folder: Path, source: random.Random) -> None:
    """Answers that take forever: workers miss their deadline, are killed and replaced."""
    texts = source.sample([*hostile_inputs().values()], 20)
    reward = load_reward("math", num_workers=2, timeout_s=0.05)
    try:
        golds = [r"\sum_{k=1}^{n} k"] * len(texts)
        assert not any(score.correct for score in reward.score_batch(texts, golds))
    finally:
        reward.close()


def failing_sampler(folder: Path, source: random.Random) -> None:
    """The sampler raises between two groups of a batch."""
    num_left, sample = source.randint(5, 15), TorchSampler.sample

    def failing(self: Any, prompts_N: Any, params: Any, on_group: Any = None) -> Any:
        def on_one(index: int, completions_G: Any) -> None:
            nonlocal num_left
            num_left -= 1
            if num_left == 0:
                raise RuntimeError("the sampler's error")
            if on_group is not None:
                on_group(index, completions_G)

        return sample(self, prompts_N, params, on_one)

    with (
        mock.patch.object(TorchSampler, "sample", failing),
        pytest.raises(RuntimeError, match="the sampler's error"),
    ):
        rl(folder)
    resumed(folder)


def stale_sampler(folder: Path, source: random.Random) -> None:
    """The sampler refuses a version whose weights the policy does not have."""
    num_left, set_adapter = source.randint(2, 4), TorchSampler.set_adapter

    def stale(self: Any, adapter: Any) -> None:
        nonlocal num_left
        num_left -= adapter is not None
        if num_left == 0:
            raise StaleAdapterError("the sampler's weights are old")
        set_adapter(self, adapter)

    with (
        mock.patch.object(TorchSampler, "set_adapter", stale),
        pytest.raises(StaleAdapterError),
    ):
        rl(folder)
    resumed(folder)


def nan_gradient(folder: Path, source: random.Random) -> None:
    """The loss is not finite from some call on."""
    _calls_left["loss"] = source.randint(1, 6)
    settings = [f"algorithm.loss={__name__}:user_loss", "optim.max_nonfinite_steps=2"]
    with pytest.raises(FloatingPointError):
        rl(folder, *settings, f"reward.name={__name__}:user_reward", "run.num_steps=12")
    del _calls_left["loss"]


def interrupted(folder: Path, source: random.Random) -> None:
    """Ctrl-C at a random moment."""
    with _signal_after(source.uniform(0.1, 2), signal.SIGINT):
        rl(folder)
    resumed(folder)


def watched(folder: Path, source: random.Random) -> None:
    """The live report is read while the job runs."""
    rl(folder, "run.num_steps=1")
    report = LiveReport([folder / "x"])
    server = make_server(report, 0)
    address, stop = f"http://127.0.0.1:{server.server_port}/data", threading.Event()

    def read() -> None:
        while not stop.wait(0.2):
            report.refresh()
            with urllib.request.urlopen(address) as answer:
                assert answer.read().startswith(b"{")

    threads = [threading.Thread(target=one) for one in (server.serve_forever, read)]
    for thread in threads:
        thread.start()
    try:
        resumed(folder)
    finally:
        stop.set()
        threads[1].join()
        server.shutdown()
        server.server_close()
        threads[0].join()


def refused(folder: Path, source: random.Random) -> None:
    """Jobs that cannot start: a folder in use, a bad setting, no such model."""
    with run_lock(folder / "x"), pytest.raises(UserError, match="is being run by process"):
        rl(folder)
    for setting in ("optim.lr=-1", "model.name=no-such-model", "data.train=no-such-file.jsonl"):
        with pytest.raises(UserError):
            rl(folder, setting)


def killed_child(folder: Path, source: random.Random) -> None:
    """A job in a child process is killed, and resumed in another."""
    in_a_child(lambda: rl(folder), folder / "log", Kill(after_s=source.uniform(0.1, 2)))
    ending = in_a_child(lambda: resumed(folder), folder / "log")
    assert ending.code == 0, (folder / "log").read_text(encoding="utf-8")


JOBS: dict[str, Callable[[Path, random.Random], None]] = {
    job.__name__: job
    for job in (
        *(undisturbed, supervised, commands, damaged_checkpoint, full_disk, failing_reward),
        *(hanging_verifier, failing_sampler, stale_sampler, nan_gradient, interrupted, watched),
        *(refused, killed_child),
    )
}


# --- what the jobs are given ----------------------------------------------------------------------


def user_reward(completion: str, reference: str) -> float:
    """A reward that fails at some call, and ties no group."""
    if _is_to_fail("reward"):
        raise ValueError("a user's error")
    return float(next(_numbers) % 7)


def user_loss(inputs: LossInputs) -> tuple[Tensor, int | Tensor]:
    """A loss that is not finite from some call on."""
    loss, num_clipped = importance_sampling(inputs)
    return (loss * float("nan") if _is_to_fail("loss") else loss), num_clipped


def _is_to_fail(function: str) -> bool:
    if function not in _calls_left:
        return False
    _calls_left[function] -= 1
    return _calls_left[function] < 0


@contextlib.contextmanager
def _signal_after(seconds: float, number: signal.Signals) -> Iterator[None]:
    """Sends a signal to this process after some time, if the block takes so long."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    try:
        timer.start()
        yield
        timer.cancel()
        timer.join()
    except KeyboardInterrupt:
        timer.join()
