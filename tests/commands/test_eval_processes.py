"""`rl-lora eval` in two processes: one process's files and tables, written and printed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rl_lora.adapters.files import save_adapter
from rl_lora.cli import main
from rl_lora.config import ModelSection
from rl_lora.models.resolve import resolve_model
from rl_lora.storage.jsonl import read_json, read_lines
from tests.helpers.processes import launch
from tests.helpers.tiny_models import make_policy, shake


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "seconds"}


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_evaluate_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(7)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Neither fits the other's shape, so that both are converted.
    names = ("small", "large")
    for name, rank, layers in zip(names, (1, 3), ("mlp", "attention"), strict=True):
        policy = make_policy(
            resolve_model(ModelSection(name="tiny-noisy")), rank=rank, layers=layers
        )
        policy.base_name = "tiny-noisy"
        shake(policy, seed=7, size=0.05)
        save_adapter(policy, tmp_path / name, version=1, run_name=name)
    adapters = [str(tmp_path / name / "v000001") for name in names]
    common = f"data.eval={data} eval.num_samples=2 eval.temperature=1.0 eval.chunk_samples=10"
    options = [*common.split(), "sampling.max_tokens=16", "--adapter", adapters[0]]
    command = ["eval", "smoke", *options, "--against", adapters[1]]
    assert main([*command, f"run.output_dir={tmp_path}/one"]) == 0
    printed = capsys.readouterr().out

    program = ["-m", "rl_lora", *command, f"run.output_dir={tmp_path}/two"]
    job = launch(program, tmp_path / "logs")
    assert (job.code, job.left) == (0, []), job.launcher
    one, both = tmp_path / "one/smoke", tmp_path / "two/smoke"
    for name in ("evaluation", "evaluation-against"):
        file = f"eval/{name}.jsonl.gz"
        divided = read_lines(both / file)
        assert len(divided) == 7
        assert [*map(without_seconds, divided)] == [*map(without_seconds, read_lines(one / file))]
        results = (read_json(folder / f"eval/{name}.json") for folder in (one, both))
        assert without_seconds(next(results)) == without_seconds(next(results))
    assert read_json(both / "paired/evaluation.json") == read_json(one / "paired/evaluation.json")
    for words in ("McNemar", "every completion and verdict"):
        assert job.printed(0, stream="stdout").count(words) == printed.count(words) > 0
    assert job.printed(1, stream="stdout") == ""
    assert not list((both / "eval").glob(".*"))  # no fitted copy, no lock
