"""Studies as a user runs them: failed cells, kills, refinement, estimates; the table's rows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from rl_lora.cli import main
from rl_lora.config import parse_as
from rl_lora.errors import UserError
from rl_lora.runs.lock import is_alive
from rl_lora.storage.jsonl import read_lines
from rl_lora.studies.config import StudyConfig, cells_of, make_cell
from rl_lora.studies.plan import Timing, estimate, read_timing
from rl_lora.studies.results import CURVE_POINTS, append_row, curve, make_row, read_table
from rl_lora.studies.run import (
    _gpus,
    all_cells,
    num_slots,
    pending_cells,
    refined_cells,
    run_study,
)
from rl_lora.train import train

ROOT = Path(__file__).resolve().parents[2]


def raw_study(folder: Path, arm: str = "sft") -> dict[str, Any]:
    """Three rates of rank 1 on the tiny model, the largest of which cannot work."""
    job: dict[str, Any] = {
        "run": {"num_steps": 4, "checkpoint_every": 2, "loggers": []},
        "model": {"name": "tiny-fast", "device": "cpu", "dtype": "float32"},
    }
    source = {"name": "generated:chain_sum", "num_rows": 80, "options": {"max_digits": 1}}
    job["data"] = {"train": [source], "held_out": 8}
    if arm == "rl":
        job["sampling"] = {"backend": "torch", "num_prompts": 4, "num_samples": 4, "max_tokens": 32}
    section = {"name": "s", "arm": arm, "seeds": [0], "output_dir": str(folder)}
    return {"study": section, "job": job, "grid": [{"optim": {"lr": [1e-4, 1e-3, 1e30]}}]}


def write_study(folder: Path, raw: dict[str, Any]) -> Path:
    lines = ["[study]"] + [f"{key} = {json.dumps(value)}" for key, value in raw["study"].items()]
    for section, values in raw["job"].items():
        lines.append(f"[job.{section}]")
        for key, value in values.items():
            text = "[{ name = 'generated:chain_sum', num_rows = 80, options = { max_digits = 1 } }]"
            lines.append(f"{key} = {text if key == 'train' else json.dumps(value)}")
    for grid in raw["grid"]:
        lines.append("[[grid]]")
        for section, values in grid.items():
            lines += [f"{section}.{key} = {json.dumps(value)}" for key, value in values.items()]
    path = folder / "study.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


# --- rows and plans, without a run ----------------------------------------------------------------


def test_long_curves_are_thinned_at_equal_ratios() -> None:
    steps = [{"step": n, "x": float(n)} for n in range(1, 1001)]
    thin = curve(steps, "x")
    assert len(thin["step"]) <= CURVE_POINTS
    assert thin["step"] == thin["value"]  # means of both over the same spans
    assert thin["step"][0] == 1
    assert thin["step"][-1] > 900  # the mean of the last span
    assert curve(steps[:3], "x") == {"step": [1, 2, 3], "value": [1.0, 2.0, 3.0]}
    assert curve([{"step": 1, "x": None}], "x") == {"step": [], "value": []}


@pytest.mark.parametrize(
    ("losses", "status", "result"),
    [
        ([3.0, 2.0, 1.0], "done", 1.0),
        ([3.0, 2.0, 4.0], "diverged", 4.0),
        ([3.0, None], "nan", None),
    ],
)
def test_status_of_a_supervised_cell(
    tmp_path: Path, losses: list[float | None], status: str, result: float | None
) -> None:
    lines = [{"step": n, "test/nll": loss} for n, loss in enumerate(losses)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    cell = cells_of(parse_as(StudyConfig, raw_study(tmp_path)))[0]
    row = make_row(cell, tmp_path, 5, 1.0, "", "")
    assert (row["status"], row["result"]) == (status, result)
    failed = make_row(cell, tmp_path, 5, 1.0, "it broke", "crashed")
    assert (failed["status"], failed["result"], failed["error"]) == ("crashed", None, "it broke")


def test_result_of_an_rl_cell_is_the_mean_of_its_last_steps(tmp_path: Path) -> None:
    lines = [{"step": n, "reward/mean": n / 10} for n in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    cell = cells_of(parse_as(StudyConfig, raw_study(tmp_path, "rl")))[0]
    row = make_row(cell, tmp_path, 4, 1.0, "", "")
    assert (row["start"], row["result"], row["status"]) == (0.25, 0.85, "done")
    assert row["batch_size"] == 16


def test_the_table_has_one_row_a_cell_and_survives_a_cut_line(tmp_path: Path) -> None:
    append_row(tmp_path, {"cell": "a", "result": 1})
    append_row(tmp_path, {"cell": "b", "result": 2})
    append_row(tmp_path, {"cell": "a", "result": 3})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"cell": "c", "resu')
    assert [row["result"] for row in read_table(tmp_path)] == [2, 3]
    with pytest.raises(UserError, match="run the study first"):
        read_table(tmp_path / "nowhere")


def test_refinement_waits_for_the_grid_and_goes_round_the_best(tmp_path: Path) -> None:
    study = parse_as(StudyConfig, raw_study(tmp_path))
    section = study.study.model_copy(update={"refine_rounds": 2})
    study = study.model_copy(
        update={"study": section, "grid": ({"optim": {"lr": [1e-3, 1e-2, 0.1]}},)}
    )
    cells = cells_of(study)

    def row(cell: Any, result: float | None) -> dict[str, Any]:
        return {
            "cell": cell.key,
            "lr": cell.config.optim.lr,
            "seed": 0,
            "result": result,
            "status": "diverged" if result is None else "done",
            **cell.condition._asdict(),
        }

    rows = [row(cells[0], 2.0), row(cells[1], 1.0)]
    assert all_cells(study, rows) == cells  # one cell of the grid is not done
    assert pending_cells(cells, {r["cell"] for r in rows}) == [cells[2]]
    rows.append({**row(cells[2], None), "status": "crashed"})
    assert all_cells(study, rows) == cells  # with its result another rate may be the best
    rows[-1] = row(cells[2], None)  # it diverged
    further = refined_cells(study, cells, rows)
    assert [cell.config.optim.lr for cell in further] == [3.16e-3, 3.16e-2]
    assert all_cells(study, rows) == [*cells, *further]
    rows += [row(further[0], 0.5), row(further[1], 1.5)]
    rates = [cell.config.optim.lr for cell in all_cells(study, rows)[5:]]
    assert rates == [1.78e-3, 5.62e-3]


def test_timing_and_estimate_by_hand(tmp_path: Path) -> None:
    steps = [
        {"step": 1, "time/step_s": 5.0, "memory/peak_resident_mb": 100.0},
        {"step": 2, "time/step_s": 3.0, "time/eval_s": 1.0, "memory/peak_resident_mb": 120.0},
        {"step": 3, "time/step_s": 2.0, "memory/peak_resident_mb": 120.0},
    ]
    timing = read_timing(steps, seconds=14.0)
    assert timing == Timing(setup_s=4.0, step_s=2.0, test_s=1.0, peak_mb=120.0)
    study = parse_as(StudyConfig, raw_study(tmp_path))
    cells = cells_of(study)
    # 4 steps, all of them with a test: 4 + 4 x 2 + 4 x 1 = 16 s a cell
    assert timing.cell_seconds(cells[0]) == 16.0
    timings = {cells[0].cost_class: timing}
    plan = estimate(study, cells, [], timings)
    assert plan.seconds == max(16.0, 3 * 16.0 / num_slots(study, 120.0)[0])
    assert plan.peak_mb == 120.0
    done = {"status": "done", "cost_class": cells[0].cost_class, "seconds": 7.0, "peak_mb": 90.0}
    assert estimate(study, cells[:1], [done], timings).seconds == 7.0


def test_slots_keep_within_cores_and_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = parse_as(StudyConfig, raw_study(tmp_path))
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    assert num_slots(study) == (8, False)
    threads = study.model_copy(update={"study": study.study.model_copy(update={"num_threads": 4})})
    assert num_slots(threads) == (2, False)
    assert num_slots(study, peak_mb=1e9) == (1, False)  # a petabyte: one at a time, still
    pairs = parse_as(StudyConfig, {"study": {"processes_per_cell": 2}})
    assert num_slots(pairs) == (4, False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10e9))
    # 0.8 x 10 GB holds 5 cells of one 1.5 GB process, and 2 of two
    assert [num_slots(one, peak_mb=1500) for one in (study, pairs)] == [(5, False), (2, False)]


def test_cells_on_gpus_go_round_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    study = parse_as(StudyConfig, {"study": {"num_per_gpu": 3}})
    assert num_slots(study) == (6, True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [_gpus(slot, 1) for slot in range(4)] == ["4", "7", "4", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [_gpus(slot, 1) for slot in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)  # two pairs, and one is left over
    study = parse_as(StudyConfig, {"study": {"num_per_gpu": 2, "processes_per_cell": 2}})
    assert num_slots(study) == (4, True)
    assert [_gpus(slot, 2) for slot in range(4)] == ["0,1", "2,3", "0,1", "2,3"]
    study = parse_as(StudyConfig, {"study": {"processes_per_cell": 6}})
    with pytest.raises(UserError, match=r"processes_per_cell = 6, .* 5 GPU.*: set it to 5 or less"):
        num_slots(study)


# --- real studies ---------------------------------------------------------------------------------


def test_a_failed_cell_is_a_row_and_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, raw_study(tmp_path))
    assert main(["study", str(path), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "3 cells, 3 to run" in out
    assert "about" in out
    assert "GB of memory each" in out
    assert not (tmp_path / "s" / "results.jsonl").exists()
    assert main(["study", str(path)]) == 0
    rows = {row["lr"]: row for row in read_table(tmp_path / "s")}
    assert [rows[rate]["status"] for rate in (1e-4, 1e-3)] == ["done", "done"]
    assert rows[1e30]["status"] in ("nan", "diverged")
    assert rows[1e-3]["curves"]["test_nll"]["step"][0] == 0
    capsys.readouterr()
    assert main(["study", str(path)]) == 0  # nothing is left to do
    assert "3 cells, 0 to run" in capsys.readouterr().out
    assert main(["study", str(path), "--table"]) == 0
    assert "Best rates" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_rl_study_resumes(tmp_path: Path) -> None:
    raw = raw_study(tmp_path, "rl")
    raw["grid"] = [{"optim": {"lr": [1e-4, 1e-3]}}]
    path = write_study(tmp_path, raw)
    command = [sys.executable, "-m", "rl_lora.cli", "study", str(path)]
    table = tmp_path / "s" / "results.jsonl"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and not table.exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = {row["cell"]: row for row in read_table(table)}
    assert first
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rows = read_table(table)
    assert len(rows) == 2
    assert {row["status"] for row in rows} <= {"done", "diverged"}
    for row in rows:
        assert first.get(row["cell"], row) == row  # what was done is not done again
    assert not list((tmp_path / "s" / "cells").glob("*/checkpoints"))


DEADLY = """
import os, signal


def score(completion, reference):
    if os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.0
"""


@pytest.mark.slow
@pytest.mark.long
def test_cells_of_two_processes(tmp_path: Path, write_module: Callable[[str, str], Path]) -> None:
    """The result is one process's, a rank's death is a row, and all end with a killed study."""
    raw = raw_study(tmp_path, "rl")
    raw["job"]["run"]["num_steps"] = 2
    raw["study"]["processes_per_cell"] = 2
    raw["grid"] = [{"optim.lr": 1e-3}, {"optim.lr": 1e-3, "reward.name": "deadly:score"}]
    write_module("deadly", DEADLY)
    study = parse_as(StudyConfig, raw)
    folder = tmp_path / "s/cells"
    program = f"""
from rl_lora.config import parse_as
from rl_lora.studies.config import StudyConfig
from rl_lora.studies.run import run_study
run_study(parse_as(StudyConfig, {raw!r}))
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as process:
        while process.poll() is None and not list(folder.glob("*/metrics.jsonl")):
            time.sleep(0.02)
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(started) >= 5  # two servers of processes, the launcher and two ranks
    deadline = time.monotonic() + 30
    while alive := [one for one in started if is_alive(one.pid, one.create_time())]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)

    row, killed = run_study(study)
    cell, _ = cells_of(study)
    run = cell.config.run.model_copy(update={"output_dir": str(tmp_path), "name": "one"})
    train(cell.config.model_copy(update={"run": run}), quiet=True)
    one = make_row(cell, tmp_path / "one", 5, 1.0, "", "")
    for key in ("cell", "status", "error", "start", "result", "curves"):
        assert row[key] == one[key]
    ours, theirs = (
        read_lines(path / "metrics.jsonl") for path in (folder / cell.key, tmp_path / "one")
    )
    assert len(ours) == len(theirs) == 2
    assert "system/all_reduce_bytes" in ours[0].keys() - theirs[0].keys()
    for our, their in zip(ours, theirs, strict=True):
        for key in ("reward/mean", "entropy/mean", "grad/norm", "adapter/norm"):
            assert our[key] == pytest.approx(their[key], rel=1e-6)
    assert killed["status"] == "crashed"
    assert re.match(r"rank 1 on \S+ ended ", killed["error"]), killed["error"]


def test_a_cell_that_dies_is_recorded(tmp_path: Path) -> None:
    raw = raw_study(tmp_path)
    raw["job"]["model"]["name"] = str(tmp_path / "no-model")
    cell = make_cell(cells_of(parse_as(StudyConfig, raw))[0].config)
    assert cell.arm == "sft"
    path = write_study(tmp_path, raw)
    assert main(["study", str(path)]) == 0
    rows = read_table(tmp_path / "s")
    assert [row["status"] for row in rows] == ["crashed"] * 3
    assert "does not exist (model.name)" in rows[0]["error"]
