"""Ctrl-C, SIGTERM and SIGUSR1 in real processes, at known points: what is left, what resumes.

A resumed run must equal an unbroken one: adapter, metrics, samples, evaluations.
"""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rl_lora.launchers import interruption
from rl_lora.launchers.interruption import Interrupted
from rl_lora.runs import checkpoint as checkpoints
from rl_lora.runs.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    latest_checkpoint,
    read_checkpoint,
)
from tests.helpers import signals
from tests.helpers.signals import Ending, Signal, num_lines
from tests.runs.test_resume import SIZES, result
from tests.sft.test_sft import TINY
from tests.studies.test_studies import raw_study, write_study
from tests.test_overlap import OwnWeights
from tests.test_train import ROOT, SMOKE

pytestmark = pytest.mark.faults

HINT = "; run the same command with --resume to continue from the last checkpoint"
EVERY = ["run.checkpoint_every=50", "run.eval_every=2", "data.held_out=4", "run.num_steps=4"]
RL = ["train", str(SMOKE), *SIZES["rl"], *EVERY, "eval.chunk_samples=2"]
RL += ["reward.name=tests.helpers.signals:score"]
COMMANDS = {"rl": RL, "sft": ["sft", str(TINY), *SIZES["sft"], *EVERY, "sft.num_tests=1"]}
WARM = ["warm_start.num_steps=2", "run.num_steps=1", "run.eval_every=0"]
AHEAD = ["sampling.backend=vllm", "sampling.max_staleness=2"]
SAMPLING = "rl_lora.samplers.torch_sampler:_record"


def prepare() -> None:
    """Figures take longer than these runs, and no job has vLLM's engine."""
    patch = pytest.MonkeyPatch()  # of a child, which ends
    write = checkpoints.write_checkpoint

    def write_once(run_folder: Path, step: int, *arguments: Any) -> Path:
        assert "--resume" in sys.argv or not checkpoint_path(run_folder, step).exists()
        return write(run_folder, step, *arguments)

    def make(section: Any, policy: Any, **options: Any) -> OwnWeights:
        del options["learner_bytes"], options["on_warning"]
        return OwnWeights(policy, **options)

    patch.setattr(checkpoints, "write_checkpoint", write_once)
    patch.setattr("rl_lora.train.draw_figures", lambda folder: [])
    if any(word in AHEAD for word in sys.argv):
        patch.setattr("rl_lora.build.make_sampler", make)
        patch.setattr("rl_lora.samplers.vllm.checks.check_vllm", lambda *_: None)


def run(arm: str, folder: Path, *more: str, at: tuple[Signal, ...] = ()) -> Ending:
    sys.argv = ["rl-lora", *more]
    command = [*COMMANDS[arm], f"run.output_dir={folder}", "run.name=x", *more]
    return signals.run(command, *at, prepare=prepare)


@pytest.fixture(autouse=True)
def argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def outcome(run_folder: Path) -> Any:
    file = run_folder / "transcripts.jsonl"
    return result(run_folder), file.read_text() if file.is_file() else ""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The outcome of an unbroken run of an arm; each is made once."""
    folder = tmp_path_factory.mktemp("whole")
    found: dict[Any, Any] = {}

    def of(arm: str, *more: str) -> Any:
        key = f"{arm}{len(found)}"
        if (arm, more) not in found:
            assert run(arm, folder / key, *more) == Ending(0)
            found[arm, more] = outcome(folder / key / "x")
        return found[arm, more]

    return of


def checkpoint(folder: Path) -> dict[str, Any]:
    newest = latest_checkpoint(folder / "x")
    assert newest is not None
    return read_checkpoint(newest)[1]


def after(folder: Path, num: int) -> Callable[[], bool]:
    """Whether so many lines are on record."""
    return lambda: num_lines(folder / "x/metrics.jsonl") == num


# point -> (arm, function, lines of metrics.jsonl before, lines and step of the checkpoint after)
POINTS: dict[str, tuple[str, str, int, int, int]] = {
    "sampling": ("rl", SAMPLING, 2, 2, 2),
    "scoring": ("rl", "rl_lora.rollouts:score_groups", 2, 2, 2),
    "a pass": ("rl", "rl_lora.learner:Learner._policy_objective", 2, 2, 2),
    "an optimizer step": ("rl", "rl_lora.learner:Learner._step", 2, 3, 3),
    "a publication": ("rl", "rl_lora.train:publish", 1, 1, 2),  # its evaluation comes next
    "a line": ("rl", "rl_lora.runs.log:RunLog.write", 2, 3, 3),
    "the last checkpoint": ("rl", "rl_lora.runs.checkpoint:_document_hash", 4, 4, 4),
    "a pass of sft": ("sft", "rl_lora.learner:Learner._log_loss_objective", 2, 2, 1),
    "a step of sft": ("sft", "rl_lora.learner:Learner._step", 3, 4, 3),
    "a test of sft": ("sft", "rl_lora.sft.held_out_loss:to_device", 2, 2, 2),
}
IN_CI = ("sampling", "a test of sft")


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=[] if p in IN_CI else pytest.mark.long) for p in POINTS]
)
def test_a_signal_saves_the_last_whole_step_and_the_run_resumes_to_the_same_end(
    tmp_path: Path, whole: Callable[..., Any], point: str
) -> None:
    arm, where, before, lines, step = POINTS[point]
    ending = run(arm, tmp_path, at=(Signal(where, after(tmp_path, before)),))
    assert ending == Ending(143, [f"rl-lora: stopped by SIGTERM after step {step}{HINT}"])
    assert num_lines(tmp_path / "x/metrics.jsonl") == lines
    assert checkpoint(tmp_path)["step"] == step
    assert run(arm, tmp_path, "--resume") == Ending(0)
    assert outcome(tmp_path / "x") == whole(arm)


@pytest.mark.slow
def test_an_evaluation_that_a_signal_ends_is_completed_with_its_steps_line(
    tmp_path: Path, whole: Callable[..., Any]
) -> None:
    """Its first problems stay; and a kill after the line does not write it twice."""
    file = tmp_path / "x/eval/step_000002.jsonl.gz"
    in_second_chunk = Signal(
        SAMPLING, lambda: file.is_file() and file.stat().st_size > 0, [signal.SIGUSR1]
    )
    ending = run("rl", tmp_path, at=(in_second_chunk,))
    assert ending == Ending(143, [f"rl-lora: stopped by SIGUSR1 after step 2{HINT}"])
    assert num_lines(tmp_path / "x/metrics.jsonl") == 1
    saved = checkpoint(tmp_path)
    assert (saved["step"], saved["metrics"]["rollouts/num"]) == (2, 8)
    first = file.read_bytes()
    assert len(gzip.decompress(first).splitlines()) == 2  # of four
    killed = Signal(
        "rl_lora.learner:Learner._step", after(tmp_path, 2), [signal.SIGKILL], hangs=True
    )
    assert run("rl", tmp_path, "--resume", at=(killed,)) == Ending(-signal.SIGKILL)
    assert file.read_bytes().startswith(first)
    assert checkpoint(tmp_path)["metrics"] == saved["metrics"]  # and the line is there
    assert run("rl", tmp_path, "--resume") == Ending(0)
    assert outcome(tmp_path / "x") == whole("rl")


@pytest.mark.slow
@pytest.mark.long
def test_a_signal_before_the_first_step_says_what_is_repeated(
    tmp_path: Path, whole: Callable[..., Any]
) -> None:
    warm = Signal("rl_lora.learner:Learner._step", numbers=[signal.SIGINT])
    ending = run("rl", tmp_path, *WARM, at=(warm,))
    assert ending == Ending(130, [f"rl-lora: stopped by Ctrl-C before the first checkpoint{HINT}"])
    evaluation = Signal(SAMPLING, (tmp_path / "x/checkpoints/step_000000").is_dir)
    ending = run("rl", tmp_path, *WARM, "--resume", at=(evaluation,))
    assert ending == Ending(143, [f"rl-lora: stopped by SIGTERM after step 0{HINT}"])
    assert run("rl", tmp_path, *WARM, "--resume") == Ending(0)
    assert outcome(tmp_path / "x") == whole("rl", *WARM)


# --- one signal, two, and what does not end -------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
def test_a_second_signal_ends_the_process_within_a_write(
    tmp_path: Path, whole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one that comes with the first is the same, passed on by a launcher."""
    twice = Signal(SAMPLING, after(tmp_path, 1), [signal.SIGINT, signal.SIGTERM])
    ending = run("rl", tmp_path, at=(twice,))
    assert ending == Ending(130, [f"rl-lora: stopped by Ctrl-C after step 1{HINT}"])
    monkeypatch.setattr(interruption, "_SAME_S", -1.0)
    first = Signal(SAMPLING, after(tmp_path, 3))
    second = Signal(
        "rl_lora.runs.checkpoint:_document_hash", lambda: interruption.received() is not None
    )
    assert run("rl", tmp_path, "--resume", at=(first, second)) == Ending(-signal.SIGTERM)
    assert checkpoint(tmp_path)["step"] == 1
    assert list((tmp_path / "x/checkpoints").glob(".step_000003*"))  # half of one
    assert run("rl", tmp_path, "--resume") == Ending(0)
    assert outcome(tmp_path / "x") == whole("rl")


@pytest.mark.slow
@pytest.mark.long
def test_what_hangs_does_not_keep_the_process(
    tmp_path: Path, whole: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler is abandoned; of a reward, which has its own thread, the process waits no longer
    than _CLOSE_S. The checkpoint comes before."""
    sampler = Signal("rl_lora.samplers.torch_sampler:_decode", after(tmp_path, 1), hangs=True)
    ending = run("rl", tmp_path, at=(sampler,))
    assert ending == Ending(143, [f"rl-lora: stopped by SIGTERM after step 1{HINT}"])
    monkeypatch.setattr(interruption, "_CLOSE_S", 0.5)
    reward = Signal("rl_lora.rollouts:score_groups", after(tmp_path, 2), hangs=True)
    ending = run("rl", tmp_path, "--resume", at=(reward,))
    without = "without waiting for what did not end within 0 s"
    assert ending == Ending(143, [f"rl-lora: stopped by SIGTERM, {without}"])
    assert checkpoint(tmp_path)["step"] == 2
    assert run("rl", tmp_path, "--resume") == Ending(0)
    assert outcome(tmp_path / "x") == whole("rl")


# --- other commands, threads and processes --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "where", ["rl_lora.learner:Learner._policy_objective", "rl_lora.overlap:RolloutWorker.pop"]
)
def test_the_thread_that_samples_ahead_ends_too(
    tmp_path: Path, whole: Callable[..., Any], where: str
) -> None:
    ending = run("rl", tmp_path, *AHEAD, at=(Signal(where, after(tmp_path, 2)),))
    assert ending == Ending(143, [f"rl-lora: stopped by SIGTERM after step 2{HINT}"])
    assert run("rl", tmp_path, *AHEAD, "--resume") == Ending(0)
    assert outcome(tmp_path / "x") == whole("rl", *AHEAD)


@pytest.mark.slow
def test_an_evaluation_by_itself_ends_likewise_and_continues(tmp_path: Path) -> None:
    command = ["eval", str(SMOKE), "data.held_out=4", "eval.chunk_samples=2", "--name", "own"]
    command += ["sampling.max_tokens=16", f"run.output_dir={tmp_path}"]
    file = tmp_path / "smoke/eval/own.jsonl.gz"
    at = Signal(SAMPLING, lambda: file.is_file() and file.stat().st_size > 0)
    again = "; run the same command again to continue where it stopped"
    assert signals.run(command, at) == Ending(143, [f"rl-lora: stopped by SIGTERM{again}"])
    first = file.read_bytes()
    assert len(gzip.decompress(first).splitlines()) == 2  # of four
    assert signals.run(command) == Ending(0)
    assert file.read_bytes().startswith(first)
    assert len(gzip.decompress(file.read_bytes()).splitlines()) == 4


def send_at_line(command: list[str], file: Path, wanted: int, number: int) -> tuple[int, str]:
    """(exit code, stderr) of a command line whose whole process group gets the signal, as from a
    terminal, once the file has so many lines; no process of it is left."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
        # A shell that runs the tests in the background lets them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    while process.poll() is None and num_lines(file) < wanted:
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    _, errors = process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    return process.returncode, errors.decode()


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_at_a_terminal_leaves_no_worker(tmp_path: Path) -> None:
    """On all threads of the machine, with the verifier's workers, which get the signal as well."""
    command = [sys.executable, "-m", "rl_lora", "train", str(SMOKE), f"run.output_dir={tmp_path}"]
    file = tmp_path / "smoke/metrics.jsonl"
    code, errors = send_at_line(command, file, 3, signal.SIGINT)
    assert code == 130
    step = num_lines(file)
    assert errors == f"rl-lora: stopped by Ctrl-C after step {step}{HINT}\n"
    assert latest_checkpoint(tmp_path / "smoke") == (
        tmp_path / f"smoke/checkpoints/step_{step:06d}"
    )
    assert not (tmp_path / "smoke/.lock").exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("vllm_installed")
def test_a_run_with_vllm_ends_in_the_same_way(tmp_path: Path) -> None:
    """One thread samples ahead in it while the other learns."""
    command = [sys.executable, "-m", "rl_lora", "train", str(SMOKE), f"run.output_dir={tmp_path}"]
    command += [*AHEAD, "run.transcripts_per_step=0"]
    file = tmp_path / "smoke/metrics.jsonl"
    code, errors = send_at_line(command, file, 2, signal.SIGTERM)
    step = num_lines(file)
    assert (code, errors.splitlines()[-1:]) == (
        143,
        [f"rl-lora: stopped by SIGTERM after step {step}{HINT}"],
    )
    more = ["--resume", f"run.num_steps={step + 2}"]
    subprocess.run([*command, *more], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    assert num_lines(file) == step + 2


@pytest.mark.slow
@pytest.mark.long
def test_the_cells_of_a_study_write_checkpoints_and_end(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    raw["job"]["run"] |= {"num_steps": 2000, "checkpoint_every": 5000}
    path, cells = write_study(tmp_path, raw), tmp_path / "s/cells"
    command = [sys.executable, "-m", "rl_lora", "study", str(path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not any(
        num_lines(file) > 3 for file in cells.glob("*/metrics.jsonl")
    ):
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    _, errors = process.communicate()
    again = "; run the same command again to continue where it stopped"
    assert (process.returncode, errors) == (143, f"rl-lora: stopped by SIGTERM{again}\n")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    steps = {  # of the last line and of the checkpoint
        (num_lines(file) - 1, max(checkpoint_steps(file.parent)))
        for file in cells.glob("*/metrics.jsonl")
        if num_lines(file) > 1
    }
    assert steps
    assert all(on_record == saved for on_record, saved in steps)
    assert not (tmp_path / "s/results.jsonl").exists()


# --- the handlers ---------------------------------------------------------------------------------


def test_only_the_systems_own_handlers_are_replaced_and_only_inside() -> None:
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}

    def own(number: int, frame: object) -> None: ...

    def interrupted() -> None:
        with interruption.handled():
            assert signal.getsignal(signal.SIGUSR1) is own
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            with interruption.handled():
                pass
            signal.raise_signal(signal.SIGINT)

    try:
        signal.signal(signal.SIGUSR1, own)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for _ in range(2):  # a program may train again after an interruption
            with pytest.raises(Interrupted, match="stopped by Ctrl-C") as caught:
                interrupted()
            assert (caught.value.code, interruption.received()) == (130, None)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with interruption.handled():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that ends with an error does
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        thread = threading.Thread(target=lambda: interruption.handled().__enter__())
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_waits_for_a_place_where_the_step_can_be_abandoned() -> None:
    done: list[str] = []

    def loop() -> None:
        with interruption.handled(), interruption.steps(lambda: done.append("saved")):
            with interruption.abandonable():
                done.append("sampled")
            signal.raise_signal(signal.SIGTERM)
            done.append("learned")
            with interruption.abandonable():
                done.append("not reached")

    def no_loop() -> None:
        with interruption.handled():
            signal.raise_signal(signal.SIGUSR1)  # nohup, if it runs the tests, ignores SIGHUP
            done.append("not reached")

    def one_whole() -> None:
        with interruption.handled():
            with interruption.unbroken():
                signal.raise_signal(signal.SIGTERM)
                done.append("whole")
            done.append("not reached")

    for function in (loop, no_loop, one_whole):
        with pytest.raises(Interrupted):
            function()
    assert done == ["sampled", "learned", "saved", "whole"]
