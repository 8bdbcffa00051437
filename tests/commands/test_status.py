"""The status of runs: states by files and process, the numbers, the curves, hostile folders."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from rl_lora import cli
from rl_lora.commands.status import read_status, sparkline, status_lines
from rl_lora.config import EvalSection, parse_config
from rl_lora.errors import UserError
from tests.helpers.evaluations import evaluate
from tests.helpers.fakes import FakeReward, FakeSampler, make_prompt

ROOT = Path(__file__).resolve().parents[2]
NOW = 2_000_000_000.0


def write_run(
    folder: Path, num_steps: int, step: int, *, process: dict[str, Any] | None = None
) -> Path:
    """A run folder with `step` steps done of num_steps, each of 30 s, last written at NOW - 5."""
    folder.mkdir(parents=True)
    config = parse_config({"run": {"num_steps": num_steps}}).model_dump(mode="json")
    record = {"config": config, **({} if process is None else {"process": process})}
    (folder / "run.json").write_text(json.dumps(record))
    lines = [
        {
            "step": k,
            "reward/mean": k / 100,
            "reward/correct_mean": 0.25,
            "cot/tokens_mean": 200.0 - k,
            "cot/truncated_rate": 0.125,
            "mismatch/kl": 2e-9,
            "speed/sample_tokens_per_s": 1234.5,
            "time/step_s": 30.0,
        }
        for k in range(1, step + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    touch(folder, NOW - 5)
    return folder


def touch(folder: Path, when: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (when, when))


def write_evaluation(folder: Path, step: int, num_correct: int) -> None:
    """An evaluation of ten problems."""
    prompts = [make_prompt(f"s/{index}") for index in range(10)]
    sampler = FakeSampler(lambda prompt, _: "7" if int(prompt.prompt_id[2:]) < num_correct else "8")
    options = {"step": step, "folder": folder / "eval", "name": f"step_{step:06d}"}
    evaluate(sampler, prompts, FakeReward(), EvalSection(), max_tokens=9, seed=0, **options)  # type: ignore[arg-type]


def this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": platform.node(), "started": time.time()}


def dead_process() -> dict[str, Any]:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    return {"pid": process.pid, "host": platform.node(), "started": time.time()}


def test_a_running_run_has_its_numbers_and_its_eta(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "q", 20, 12, process=this_process())
    write_evaluation(folder, 0, 2)
    write_evaluation(folder, 10, 8)
    touch(folder, NOW - 5)
    status = read_status(folder, NOW)
    assert (status.state, status.run.last_step, status.num_steps) == ("running", 12, 20)
    assert status.eta_s == 8 * 30
    lines = status_lines(status)
    assert lines[0].endswith("q  running  step 12 of 20  4 min 00 s left")
    assert lines[1:6] == [
        f"  process {os.getpid()}; last write 5 s ago",
        "  reward 0.120  correct 25.0%  length 188 tokens  truncated 12%",
        "  kl 2.0e-09  1,234 tokens/s  30.0 s per step",
        "  evaluation, step 10: accuracy 80.0% (44.4 to 97.5), 10 problems",
        "  best, step 10: 80.0% (44.4 to 97.5)",
    ]
    # 12 steps in 8 levels, the first the lowest and the last the highest.
    assert lines[6] == "  reward   ▁▂▂▃▄▄▅▅▆▇▇█  0.010 to 0.120"
    assert lines[7] == "  length   █▇▇▆▅▅▄▄▃▂▂▁  188 to 199"
    assert lines[8] == "  accuracy ▁█  20.0% to 80.0%"


@pytest.mark.parametrize(
    ("kind", "silent_s", "state"),
    [
        ("this", 5, "running"),
        ("this", 3600, "stalled"),
        ("dead", 5, "killed"),
        ("elsewhere", 5, "running"),
        ("elsewhere", 3600, "unknown"),
        ("none", 5, "running"),
        ("none", 3600, "killed"),
        ("reused", 5, "killed"),
    ],
)
def test_the_state_by_process_and_files(
    tmp_path: Path, kind: str, silent_s: float, state: str
) -> None:
    # A number that a later process has got: the one on record started long before it.
    born = psutil.Process().create_time()
    process = {
        "this": this_process(),
        "dead": dead_process(),
        "elsewhere": {"pid": 1, "host": "another-machine", "started": NOW},
        "none": None,
        "reused": {**this_process(), "started": born - 3600},
    }[kind]
    folder = write_run(tmp_path / "q", 20, 12, process=process)
    touch(folder, NOW - silent_s)
    status = read_status(folder, NOW)
    assert status.state == state, status.reason
    assert (status.eta_s is None) == (state != "running")


def test_long_steps_are_not_a_stall(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "q", 20, 1, process=this_process())
    line = {"step": 2, "time/step_s": 1000.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    touch(folder, NOW - 2900)  # 3 x 1000 s are the limit
    assert read_status(folder, NOW).state == "running"
    touch(folder, NOW - 3100)
    assert read_status(folder, NOW).state == "stalled"


def test_a_run_is_finished_with_its_adapter_and_its_last_evaluation(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "q", 12, 12, process=dead_process())
    assert read_status(folder, NOW).state == "killed"  # between the last step and the evaluation
    write_evaluation(folder, 12, 8)
    assert read_status(folder, NOW).state == "killed"
    (folder / "adapter").mkdir()
    status = read_status(folder, NOW)
    assert (status.state, status.eta_s) == ("finished", None)


def test_a_run_at_step_0_and_a_half_written_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "q", 20, 0, process=this_process())
    (folder / "warm_start.jsonl").write_text('{"step": 1, "sft/loss": 1.5}\n{"step": 2, "sft')
    lines = status_lines(read_status(folder, NOW))
    assert lines[0].endswith("running  step 0 of 20")
    assert lines[2:] == ["  warm start: step 1", "  loss 1.5000"]
    whole = write_run(tmp_path / "w", 20, 3, process=this_process())
    with (whole / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/mea')
    assert read_status(whole, NOW).run.last_step == 3
    (folder / "run.json").unlink()  # RunLog opens metrics.jsonl before run.json is written
    assert status_lines(read_status(folder, NOW))[0].endswith("step 0")


def test_an_evaluation_under_way_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "q", 20, 10, process=this_process())
    write_evaluation(folder, 10, 8)
    (folder / "eval" / "step_000010.json").unlink()
    assert read_status(folder, NOW).pending == "evaluation step_000010: 10 of 10 problems so far"


def test_a_number_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "q", 20, 2, process=this_process())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/mean": null, "cot/tokens_mean": 5}\n')
    lines = status_lines(read_status(folder, NOW))
    assert not any("reward 0.020" in line for line in lines)
    assert any(line == "  reward   ▁█   0.010 to 0.020" for line in lines)


def test_every_line_fits_80_columns(tmp_path: Path) -> None:
    folder = write_run(tmp_path / ("long-" * 30), 100_000, 300, process=this_process())
    lines = status_lines(read_status(folder, NOW))
    assert max(len(line) for line in lines) <= 80
    assert lines[0].startswith("…")
    assert lines[0].endswith("running  step 300 of 100000  830 h 50 min left")


def test_sparkline_by_hand() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 7, 7], 2) == "▁█"  # means of two
    assert sparkline([0, None, 7], 8) == "▁ █"
    assert sparkline([3, 3, 3], 8) == "▄▄▄"
    assert sparkline([], 8) == sparkline([None], 8) == ""
    assert len(sparkline(list(range(1001)), 40)) == 40


def test_the_command_line_takes_several_runs_and_refuses_other_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name, 20, 3, process=dead_process())) for name in "ab"]
    assert cli.main(["status", *runs]) == 0
    out = capsys.readouterr().out
    assert out.count("killed  step 3 of 20") == 2
    assert cli.main(["status", runs[0], str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"rl-lora: error: {tmp_path} is not a run folder: "
        "it has neither run.json nor metrics.jsonl\n"
    )
    (tmp_path / "a" / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is not valid JSON"):
        read_status(tmp_path / "a")


def test_without_torch_and_on_an_ascii_terminal(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "q", 20, 12, process=this_process())
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from rl_lora.cli import main\n"
        f"sys.exit(main(['status', {str(folder)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "step 12 of 20" in done.stdout
    assert "reward   _..-==++*%%#  0.010 to 0.120" in done.stdout
