"""A run that was stopped anywhere resumes to the same end, or says in one line why it does not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rl_lora.adapters.files import load_tensors
from rl_lora.cli import main
from rl_lora.config import RunConfig, load_config, parse_as
from rl_lora.config.sft import SftConfig, load_sft_config
from rl_lora.errors import UserError
from rl_lora.models import device as devices
from rl_lora.runs.checkpoint import (
    checkpoint_steps,
    latest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from rl_lora.runs.log import RunLog
from rl_lora.runs.machine import environment
from rl_lora.runs.record import read_record
from rl_lora.sft.train import fine_tune
from rl_lora.studies.config import StudyConfig, cells_of
from rl_lora.studies.results import append_row, make_row, read_table
from rl_lora.train import train
from tests.sft.test_sft import TINY
from tests.studies.test_studies import raw_study, write_study
from tests.test_train import SMOKE, metrics_of

pytestmark = pytest.mark.faults

RARELY = ["run.checkpoint_every=50", "data.held_out=4"]
SIZES = {
    "rl": ["sampling.num_prompts=2", "sampling.max_tokens=16", "sampling.num_samples=4"],
    "sft": ["sft.batch_size=4"],
}


class KilledError(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def job(arm: str, folder: Path, *overrides: str) -> RunConfig | SftConfig:
    settings = [*RARELY, *SIZES[arm], f"run.output_dir={folder}", "run.num_steps=4", *overrides]
    return load_config(SMOKE, settings) if arm == "rl" else load_sft_config(TINY, settings)


def run(arm: str, folder: Path, *overrides: str, resume: bool = False, accept: bool = False) -> Any:
    function: Any = train if arm == "rl" else fine_tune
    config = job(arm, folder, *overrides)
    return function(config, resume=resume, quiet=True, accept_changed_data=accept)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs."""
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)


def result(run_folder: Path) -> tuple[list[dict[str, Any]], dict[str, list[float]], list[str]]:
    """Metrics but for the machine's, the adapter, and the names of the evaluations."""
    tensors = load_tensors(run_folder / "adapter")
    names = sorted(path.name for path in (run_folder / "eval").glob("*.json"))
    return (
        metrics_of(run_folder),
        {name: tensors[name].flatten().tolist() for name in sorted(tensors)},
        names,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The result of an unbroken run of an arm; each is made once."""
    folder, found = tmp_path_factory.mktemp("whole"), {}

    def of(arm: str, *overrides: str) -> Any:
        key = f"{arm}{len(overrides)}"
        if key not in found:
            run(arm, folder, f"run.name={key}", *overrides)
            found[key] = result(folder / key)
        return found[key]

    return of


def kill_at(
    monkeypatch: pytest.MonkeyPatch, where: str, arm: str, folder: Path, *overrides: str
) -> None:
    """Stops a run before a step's line is written, or within a function `module:name:call`."""
    with monkeypatch.context() as patch:
        if where.isdigit():
            write = RunLog.write

            def stop(self: RunLog, step: int, metrics: Any) -> None:
                if step == int(where):
                    raise KilledError
                write(self, step, metrics)

            patch.setattr(RunLog, "write", stop)
        else:
            module, name, call = where.split(":")
            calls = iter(range(1, 1000))

            def die(*_: Any, **__: Any) -> Any:
                if next(calls) == int(call):
                    raise KilledError
                return original(*_, **__)

            target = __import__(f"rl_lora.{module}", fromlist=[name])
            original = getattr(target, name)
            patch.setattr(target, name, die)
        with pytest.raises(KilledError):
            run(arm, folder, *overrides)


# --- killed before the first periodic checkpoint, and elsewhere -----------------------------------


@pytest.mark.parametrize(
    ("arm", "where"),
    [
        ("sft", "0"),  # before anything is on record
        ("sft", "1"),
        ("sft", "3"),
        ("sft", "sft.train:save_checkpoint:1"),  # between the first line and the first checkpoint
        ("sft", "sft.train:save_adapter:1"),  # all steps done, nothing published
        ("rl", "1"),
        ("rl", "3"),
        ("rl", "train:evaluate:1"),  # before the first evaluation
        ("rl", "state:save_adapter:3"),  # a step that is learned and not published
        ("rl", "train:finish:1"),  # all done but the adapter's last place
    ],
)
def test_a_run_killed_before_its_first_periodic_checkpoint_resumes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[str], Any],
    arm: str,
    where: str,
) -> None:
    kill_at(monkeypatch, where, arm, tmp_path, "run.name=killed")
    assert checkpoint_steps(tmp_path / "killed") <= {0, 4}
    run(arm, tmp_path, "run.name=killed", resume=True)
    assert result(tmp_path / "killed") == whole(arm)


SUMS = 'name="generated:chain_sum", num_rows=12'
MIXED = [
    f'data.train=[{{{SUMS}, label="easy", weight=3, options={{max_terms=2, max_digits=1}}}}, '
    f'{{{SUMS}, label="hard", options={{min_terms=3, max_terms=3, max_digits=1}}}}]',
    'reward.terms=[{name="math"}, {name="format", weight=0.5, sources=["hard"]}]',
    *"algorithm.advantage=gdpo reward.overlong_tokens=8 data.curriculum=pass_rate".split(),
    *"sampling.num_prompts=5 run.num_steps=6 run.checkpoint_every=2".split(),
]


@pytest.mark.slow
def test_a_run_with_weights_terms_and_a_curriculum_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("rl", tmp_path, "run.name=whole", *MIXED)
    kill_at(monkeypatch, "4", "rl", tmp_path, "run.name=killed", *MIXED)
    run("rl", tmp_path, "run.name=killed", *MIXED, resume=True)
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    last = result(tmp_path / "whole")[0][-1]
    # 30 prompts, 22 or 23 of them of the easy set, which has 10 left by held-out rows of 4.
    assert last["data/epochs/easy"] > 2
    assert last["data/num_rated"] > 10
    assert last["data/draw_weight"] < 1
    assert last["reward/format/mean"] == last["reward/format/mean/hard"]


def test_a_warm_start_that_was_killed_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm = ["warm_start.num_steps=2", "run.num_steps=1"]
    run("rl", tmp_path, "run.name=whole", *warm)
    kill_at(monkeypatch, "2", "rl", tmp_path, "run.name=killed", *warm)
    run("rl", tmp_path, "run.name=killed", *warm, resume=True)
    assert result(tmp_path / "killed") == result(tmp_path / "whole")
    lines = (tmp_path / "killed" / "warm_start.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def leave_what_kills_leave(folder: Path) -> None:
    """Of a checkpoint, of a deletion, of a publish, of the best adapter, of a line."""
    for name in (".step_000003.99", ".step_000001.deleted"):
        (folder / "checkpoints" / name).mkdir()
        (folder / "checkpoints" / name / "tensors.safetensors").write_bytes(b"half")
    for name in ("adapters/.v000003.99", ".adapter.99", ".best.99"):
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_model.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 3, "rew')
    (folder / ".run.json.partial").write_text("{")


def test_what_kills_leave_is_in_nobodys_way(tmp_path: Path, whole: Callable[[str], Any]) -> None:
    run("rl", tmp_path, "run.name=killed", "run.num_steps=2", "run.checkpoint_every=1")
    leave_what_kills_leave(tmp_path / "killed")
    run("rl", tmp_path, "run.name=killed", resume=True)
    metrics, adapter, _ = result(tmp_path / "killed")
    assert (metrics, adapter) == whole("rl")[:2]
    left = (tmp_path / "killed").rglob("*")
    assert not [path for path in left if path.name.startswith(".")]
    names = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert names == ["step_000002", "step_000004"]


def test_a_longer_run_that_dies_at_its_end_is_not_complete_with_the_shorter_ones_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], Any]
) -> None:
    for arm, where in (("rl", "train:finish:1"), ("sft", "sft.train:_publish:1")):
        run(arm, tmp_path, f"run.name={arm}", "run.num_steps=2")
        with monkeypatch.context() as patch:
            module, name, _ = where.split(":")

            def die(*_: Any) -> None:
                raise KilledError

            patch.setattr(f"rl_lora.{module}.{name}", die)
            with pytest.raises(KilledError):
                run(arm, tmp_path, f"run.name={arm}", resume=True)
        run(arm, tmp_path, f"run.name={arm}", resume=True)
        assert result(tmp_path / arm)[1] == whole(arm)[1]


def test_figures_that_a_kill_prevented_are_drawn_by_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["run.name=x", "run.num_steps=1"]
    kill_at(monkeypatch, "train:draw_figures:1", "rl", tmp_path, *settings)
    drawn: list[Path] = []
    monkeypatch.setattr("rl_lora.train.draw_figures", drawn.append)
    for _ in range(2):  # the second finds it complete
        run("rl", tmp_path, *settings, resume=True)
        assert drawn == [tmp_path / "x"]


def test_a_complete_supervised_run_is_only_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("sft", tmp_path)
    monkeypatch.setattr("rl_lora.sft.train._run", None)  # nothing is computed
    assert run("sft", tmp_path, resume=True) == first


def test_a_new_start_takes_nothing_over_from_another_job_that_was_killed_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its first evaluation and before its first step: a start without --resume is let
    in."""
    kill_at(monkeypatch, "1", "rl", tmp_path, "run.name=x", "run.seed=7", "eval.max_tokens=3")
    assert (tmp_path / "x" / "eval" / "step_000000.json").is_file()
    run("rl", tmp_path, "run.name=x", "run.num_steps=1")
    run("rl", tmp_path, "run.name=y", "run.num_steps=1")
    assert result(tmp_path / "x") == result(tmp_path / "y")
    evaluations = [
        json.loads((tmp_path / name / "eval" / "step_000000.json").read_text()) for name in "xy"
    ]
    for evaluation in evaluations:
        evaluation.pop("seconds")
    assert evaluations[0] == evaluations[1]
    (tmp_path / "x" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="holds an older run: add --resume"):
        run("rl", tmp_path, "run.name=x", "run.num_steps=1")


def test_no_step_draws_from_the_global_generators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], Any]
) -> None:
    """So checkpoints need not hold their states: resumed with others, a run ends the same."""
    states: list[tuple[Any, ...]] = []
    write = RunLog.write

    def look(self: RunLog, step: int, metrics: Any) -> None:
        numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 (under test)
        states.append((random.getstate(), repr(numpy_state), torch.get_rng_state().tolist()))
        write(self, step, metrics)

    for arm in ("rl", "sft"):
        run(arm, tmp_path, f"run.name={arm}", "run.num_steps=2")
        random.seed(arm)
        np.random.seed(len(arm))  # noqa: NPY002
        torch.manual_seed(len(arm))
        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "write", look)
            run(arm, tmp_path, f"run.name={arm}", resume=True)
        assert result(tmp_path / arm)[:2] == whole(arm)[:2]
        first, second = states
        assert first == second
        states.clear()


def test_a_damaged_newest_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    whole: Callable[[str], Any],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One bit of its tensors is another; and another version of torch had written it."""
    older = environment() | {"torch": "2.0.1"}
    with monkeypatch.context() as patch:
        patch.setattr("rl_lora.runs.checkpoint.environment", lambda: older)
        run("rl", tmp_path, "run.name=x", "run.num_steps=3", "run.checkpoint_every=1")
    newest = latest_checkpoint(tmp_path / "x")
    assert newest is not None
    content = bytearray((newest / "tensors.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "tensors.safetensors").write_bytes(content)
    capsys.readouterr()
    run("rl", tmp_path, "run.name=x", resume=True)
    assert result(tmp_path / "x") == whole("rl")
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint skipped: {newest}: tensors.safetensors is not the file")
    now = environment()["torch"]
    assert f"may differ in its last digits: torch 2.0.1 then, {now} now" in capsys.readouterr().out


# --- studies --------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_studys_cell_resumes_and_a_crashed_one_is_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_study(tmp_path)
    raw["job"]["run"]["checkpoint_every"] = 50
    raw["grid"] = [{"optim": {"lr": [1e-3, 2e-3]}}]
    study = parse_as(StudyConfig, raw)
    cells = {cell.config.optim.lr: cell for cell in cells_of(study)}
    path = write_study(tmp_path, raw)
    folder = tmp_path / "s"

    def kill(cell: Any) -> None:
        settings = cell.config.run.model_copy(
            update={"output_dir": str(folder / "cells"), "name": cell.key}
        )
        with monkeypatch.context() as patch:
            write = RunLog.write

            def stop(self: RunLog, step: int, metrics: Any) -> None:
                if step == 2:
                    raise KilledError
                write(self, step, metrics)

            patch.setattr(RunLog, "write", stop)
            with pytest.raises(KilledError):
                fine_tune(cell.config.model_copy(update={"run": settings}), quiet=True)

    for cell in cells.values():
        kill(cell)
    # One of them is in the table as crashed, its checkpoints gone, as after any crash.
    crashed = cells[2e-3]
    row = make_row(crashed, folder / "cells" / crashed.key, 5, 1.0, "it broke", "crashed")
    append_row(folder, row)
    assert main(["study", str(path)]) == 0
    assert {row["lr"]: row["status"] for row in read_table(folder)} == {
        1e-3: "done",
        2e-3: "crashed",
    }
    assert main(["study", str(path), "--retry"]) == 0
    rows = {row["lr"]: row for row in read_table(folder)}
    assert [rows[rate]["status"] for rate in (1e-3, 2e-3)] == ["done", "done"]
    assert rows[2e-3]["curves"]["test_nll"]["step"] == rows[1e-3]["curves"]["test_nll"]["step"]


# --- fewer steps than done, another dtype ---------------------------------------------------------


@pytest.mark.parametrize("arm", ["rl", "sft"])
def test_fewer_steps_than_done_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arm: str
) -> None:
    run(arm, tmp_path, "run.name=x", "run.num_steps=3")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    command = ["train", str(SMOKE)] if arm == "rl" else ["sft", str(TINY)]
    settings = [*RARELY, *SIZES[arm], f"run.output_dir={tmp_path}", "run.name=x"]
    assert main([*command, *settings, "run.num_steps=2", "--resume"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert f"{tmp_path / 'x'} has done 3 steps, more than run.num_steps=2" in lines[0]
    assert "set run.num_steps=3 or more" in lines[0]
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("arm", ["rl", "sft"])
def test_an_open_dtype_is_decided_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    """The timing says float32 when the run begins and bfloat16 when it resumes."""
    quickest = torch.float32
    monkeypatch.setattr(devices, "_matmul_seconds", lambda dtype, device: float(dtype != quickest))
    auto = ["model.dtype=auto"]
    run(arm, tmp_path, "run.name=whole", *auto)
    run(arm, tmp_path, "run.name=parts", *auto, "run.num_steps=2")
    quickest = torch.bfloat16
    assert devices.pick_dtype("auto", torch.device("cpu")) == torch.bfloat16
    run(arm, tmp_path, "run.name=parts", *auto, resume=True)
    assert read_record(tmp_path / "parts")["dtype"] == "torch.float32"
    assert result(tmp_path / "parts")[:2] == result(tmp_path / "whole")[:2]
    with pytest.raises(UserError, match=r"model\.dtype='float32', this one has 'bfloat16'"):
        run(arm, tmp_path, "run.name=parts", "model.dtype=bfloat16", resume=True)
    run(arm, tmp_path, "run.name=parts", "model.dtype=float32", resume=True)
    if arm == "rl":
        assert main(["eval", str(tmp_path / "whole"), "--name", "own"]) == 0
        evaluations = [tmp_path / "whole" / "eval" / f"{n}.json" for n in ("own", "step_000004")]
        own, last = (json.loads(path.read_text()) for path in evaluations)
        assert own["total"] == last["total"]


# --- earlier versions -----------------------------------------------------------------------------


def test_a_run_of_an_earlier_version_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("rl", tmp_path, "run.name=old", "run.num_steps=1")
    folder = tmp_path / "old"
    record = json.loads((folder / "run.json").read_text())
    assert record.pop("format") == 2
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    settings = [*RARELY, *SIZES["rl"], f"run.output_dir={tmp_path}", "run.name=old"]
    train_it = ["train", str(SMOKE), *settings, "run.num_steps=2"]
    again = "start again under another run.name, or delete it"
    commands = {
        (*train_it, "--resume"): again,
        tuple(train_it): again,
        ("eval", str(folder)): f"rl-lora eval CONFIG --adapter {folder / 'adapter'}",
    }
    for version, words in (({}, "an earlier version: its metrics"), ({"format": 3}, "a later")):
        (folder / "run.json").write_text(json.dumps(record | version))
        before[folder / "run.json"] = (folder / "run.json").stat().st_mtime_ns
        for command, fix in commands.items():
            capsys.readouterr()
            assert main(list(command)) == 2
            (line,) = capsys.readouterr().err.strip().splitlines()
            assert f"{folder} was made by {words}" in line
            assert line.endswith(fix)
    assert main(["status", str(folder)]) == 0
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p != folder} == {
        p: time for p, time in before.items() if p != folder
    }


def test_a_study_names_its_cell_of_an_earlier_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_study(tmp_path)
    cell = cells_of(parse_as(StudyConfig, raw))[0]
    run_folder = tmp_path / "s" / "cells" / cell.key
    (run_folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (run_folder / "run.json").write_text("{}")
    assert main(["study", str(write_study(tmp_path, raw))]) == 2
    error = capsys.readouterr().err
    assert f"{run_folder} was made by an earlier version" in error
    assert "delete it, and the cell starts again" in error


def test_random_states_in_a_checkpoint_are_ignored(
    tmp_path: Path, whole: Callable[[str], Any]
) -> None:
    run("sft", tmp_path, "run.name=old", "run.num_steps=2")
    path = latest_checkpoint(tmp_path / "old")
    assert path is not None
    tensors, state = read_checkpoint(path)
    tensors["rng/torch"] = torch.get_rng_state()
    write_checkpoint(tmp_path / "old", 2, tensors, state)
    run("sft", tmp_path, "run.name=old", resume=True)
    assert result(tmp_path / "old")[1] == whole("sft")[1]
