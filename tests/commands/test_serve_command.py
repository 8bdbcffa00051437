"""`rl-lora serve-command JOB.toml`: the line of a server that a job can sample from."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import pytest

from rl_lora import cli
from rl_lora.commands.serve_command import job_lines
from tests.samplers.test_vllm_sampler import make_model

JOB = """
[model]
name = "{model}"
device = "cpu"
dtype = "float32"

[lora]
rank = 3

[data]
max_prompt_tokens = 50
train = [{{ name = "generated:chain_sum" }}]

[sampling]
max_tokens = 14
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(JOB.format(model=make_model(tmp_path / "model")))
    return path


def test_the_line_has_what_the_job_needs(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve-command", str(job), "run.output_dir=/mnt/runs", "--port", "8001"]) == 0
    where, _, serve, _, train = capsys.readouterr().out.splitlines()
    assert where.startswith("# one server for each engine; each sees /mnt/runs/")
    assert shlex.split(serve) == [
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1", "vllm", "serve", str(job.parent / "model"),
        "--port", "8001", "--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "128",
        "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2",
        "--logprobs-mode", "processed_logprobs", "--enable-scale-out",
        "--enforce-eager", "--block-size", "32",
        "--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048",
    ]  # fmt: skip
    assert shlex.split(train) == [
        "rl-lora", "train", str(job), "run.output_dir=/mnt/runs",
        'resources.servers=["http://localhost:8001"]',
    ]  # fmt: skip


def test_the_line_follows_the_job(job: Path) -> None:
    options = ["eval.max_tokens=400", "sampling.max_num_seqs=7", "lora.rank=9"]
    serve = shlex.split(job_lines(job, options, 8000)[2])
    values = dict(itertools.pairwise(serve))
    assert values["--max-model-len"] == "128"  # the model has no more
    assert (values["--max-num-seqs"], values["--max-lora-rank"]) == ("7", "16")


def test_what_servers_cannot_serve_is_refused(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve-command", str(job), "lora.mode=full"]) == 2
    assert "resources.servers take adapters" in capsys.readouterr().err
    assert cli.main(["serve-command", str(job.parent), "lora.rank=2"]) == 2
    assert "lora.rank=2 is a job's setting" in capsys.readouterr().err
