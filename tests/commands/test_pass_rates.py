"""`rl-lora pass-rates`: a file of the training problems' pass rates, and a job filtered by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rl_lora.build import open_run
from rl_lora.cli import main
from rl_lora.config import load_config
from rl_lora.evaluation.files import read_evaluation

SETTINGS = "data.train.num_rows=12 data.held_out=4 sampling.max_tokens=24".split()


@pytest.mark.slow
def test_pass_rates_are_written_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [*SETTINGS, "run.output_dir=runs"]
    command = ["pass-rates", "smoke", *settings, "--samples", "3", "--out", "rates.jsonl"]
    assert main(command) == 0
    assert "rates.jsonl: 8 problems" in capsys.readouterr().out
    rates = [json.loads(line) for line in Path("rates.jsonl").read_text().splitlines()]
    stored, problems_N = read_evaluation(Path("runs/smoke/eval/pass_rates.jsonl.gz"))
    assert (stored["num_samples"], stored["temperature"]) == (3, 1.0)
    assert [(one["prompt_id"], one["num_correct"]) for one in rates] == [
        (one.prompt_id, one.num_correct) for one in problems_N
    ]
    assert {one["num_samples"] for one in rates} == {3}
    # A second time nothing is sampled.
    Path("rates.jsonl").unlink()
    monkeypatch.setattr("rl_lora.samplers.torch_sampler.TorchSampler.sample", None)
    assert main(command) == 0
    assert [json.loads(line) for line in Path("rates.jsonl").read_text().splitlines()] == rates
    # Used by a job: only those that were solved most seldom are left.
    lowest = min(one["num_correct"] for one in rates)
    more = ["data.pass_rates=rates.jsonl", f"data.max_pass_rate={lowest / 3 + 0.01}"]
    with open_run(load_config(Path("smoke"), [*settings, *more]), num_steps=0) as job:
        kept = {prompt.prompt_id for prompt in job.prompts.train}
    assert kept == {one["prompt_id"] for one in rates if one["num_correct"] == lowest}
    assert 0 < len(kept) < 8


def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pass-rates", "smoke", f"run.output_dir={tmp_path}", "--out", "x.jsonl"]
    assert main([*command, "--samples", "0"]) == 2
    assert "eval.num_samples = 0" in capsys.readouterr().err
