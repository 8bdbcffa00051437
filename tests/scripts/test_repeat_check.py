"""The check that repeats jobs sees what differs, and nothing of the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import repeat_check


def write_run(folder: Path, number: int, loss: float = 0.5, adapter: bytes = b"AB") -> None:
    """A run of two steps."""
    rows = [
        {"step": step, "time/step_s": number, "reward/mean": 1.0, "loss": loss} for step in (1, 2)
    ]
    files: dict[str, Any] = {
        "metrics.jsonl": "\n".join(map(json.dumps, rows)),
        "eval/step_000002.json": json.dumps({"total": {"accuracy": 0.5}, "seconds": number}),
        "run.json": json.dumps({"process": {"pid": number}}),
        "transcripts.jsonl": "{}",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(adapter)


@pytest.mark.parametrize(
    ("odd", "reported"),
    [
        ({}, "40 of 40 runs"),
        ({"loss": 0.5000001}, "where 2 parts differ: metrics of step   1, metrics of step   2"),
        ({"adapter": b"AC"}, "where 1 parts differ: adapter/adapter_model.safetensors"),
    ],
)
def test_one_odd_run_of_forty_is_found_and_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    odd: dict[str, Any],
    reported: str,
) -> None:
    done: list[int] = []

    def run(arguments: list[str], folder: Path, count: int) -> None:
        assert arguments == [*repeat_check.JOBS["rl"], "lora.rank=2"]
        for number in range(count):
            done.append(number)
            is_odd = len(done) == 33
            write_run(folder / str(number), len(done), **(odd if is_odd else {}))

    monkeypatch.setattr(repeat_check, "run", run)
    monkeypatch.setattr(repeat_check, "AT_ONCE", 40)
    arguments = ["repeat_check.py", "lora.rank=2", "--times=40", f"--out={tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert repeat_check.main() == bool(odd)
    printed = capsys.readouterr().out
    assert reported in printed
    assert printed.count("busy processes, load") == 40
    assert len([path for path in tmp_path.iterdir() if path.name != "last"]) == 1 + bool(odd)
