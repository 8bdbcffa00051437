"""Sharded weights: two processes, each with half of a model, do what one with all of it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from rl_lora.adapters.files import FULL_FILE, fingerprint
from rl_lora.config import load_config
from rl_lora.errors import UserError
from rl_lora.models.load import load_model
from rl_lora.nn.sharded import _check_dtypes
from rl_lora.train import train
from tests.helpers.processes import LIMIT_S, ROOT, faulty, launch, result
from tests.helpers.sharded_program import CASES, eager_kernels, main, resume
from tests.helpers.tiny_models import random_llama


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any element."""
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())
    return max(float((found[n].double() - t.double()).abs().max()) for n, t in expected.items())


pytestmark = pytest.mark.timeout(2 * LIMIT_S)
JOB = """
    lora.mode=full optim.lr=1e-4 run.num_steps=2 run.transcripts_per_step=64 data.held_out=2
    sampling.num_prompts=4 sampling.num_samples=4 sampling.max_tokens=16 reward.num_workers=1
""".split()


IN_CI = ("full", "lora")
NAMES = [n if n in IN_CI else pytest.param(n, marks=pytest.mark.long) for n in CASES]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """(folder, {case of num: what it found}) of the selected cases in one process and in two."""
    tests = [test for test in request.session.items if test.path == request.path]
    selected = {test.callspec.params.get("name") for test in tests if hasattr(test, "callspec")}
    names = [name for name in CASES if name in selected]
    folder = tmp_path_factory.mktemp("sharded")
    for name in names:
        CASES[name].make(folder / name)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes
    with eager_kernels():
        main(folder, names)
    torch.set_num_threads(num_threads)
    program = ["-m", "tests.helpers.sharded_program", str(folder), *names]
    job = launch(program, folder / "logs")
    assert job.code == 0, job.launcher
    return folder, {
        f"{name} of {num}": torch.load(folder / f"of-{num}" / f"{name}.pt")
        for name in names
        for num in (1, 2)
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_learn_publish_and_sample_as_one(
    outcomes: tuple[Path, dict[str, dict[str, Any]]], name: str
) -> None:
    one, two = (outcomes[1][f"{name} of {num}"] for num in (1, 2))
    limit = 1e-5 if CASES[name].lora == {"mode": "full"} else 1e-6
    assert (two["base"], two["start"]) == (one["base"], one["start"])
    assert two["probe"] == pytest.approx(one["probe"], rel=0.05, abs=1e-5)  # of random weights
    for found, expected in zip(two["metrics"], one["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert distance(two["weights"], one["weights"]) <= limit
    assert distance(two["file"], two["weights"]) == 0
    assert two["fingerprint"] == fingerprint(two["weights"])
    assert two["tokens"] == one["tokens"]
    assert two["logprobs"] == pytest.approx(one["logprobs"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_does_not_know_how_many_processes_wrote_it(
    outcomes: tuple[Path, dict[str, dict[str, Any]]], name: str
) -> None:
    """Written by one and resumed by two, and the other way round."""
    folder, found = outcomes
    limit = 1e-5 if CASES[name].lora == {"mode": "full"} else 1e-6
    for whole, resumed in (
        (found[f"{name} of 1"], found[f"{name} of 2"]["resumed"]),
        (found[f"{name} of 2"], resumed_here(folder, name)),
    ):
        assert resumed["metrics"] == pytest.approx(whole["metrics"][-1], rel=1e-5, abs=1e-6)
        assert distance(resumed["weights"], whole["weights"]) <= limit


def resumed_here(folder: Path, name: str) -> dict[str, Any]:
    """In one process, from the checkpoint of two."""
    with eager_kernels():
        return resume(folder, folder / "of-2", name)


def test_weights_of_two_dtypes_cannot_be_trained_in_shards(tmp_path: Path) -> None:
    model = load_model(random_llama(tmp_path / "model"), torch.bfloat16)
    _check_dtypes(model)
    model.model.norm.float()
    with pytest.raises(UserError, match=r"model.norm.weight is torch.float32 .* model.dtype="):
        _check_dtypes(model)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.faults
def test_a_job_that_loses_a_rank_within_a_pass_says_so_and_resumes_on_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1 is of two processes, and the end is that of a job in one: of all weights."""
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)
    command = ["train", "smoke", f"run.output_dir={tmp_path}", "run.name=two", *JOB]
    fault = "1 rl_lora.nn.optimized:MasterWeights.gradients 2 kill"  # one pass a step
    killed = launch(faulty(command, fault), tmp_path / "logs")
    assert killed.codes == {0: 3, 1: -9}
    ((rank, line),) = killed.lines()
    assert rank == 0
    assert re.match(r"the run stopped: rank 1 on \S+ ended after ", line)
    assert killed.left == []
    for name in ("one", "two"):
        settings = [*JOB, f"run.output_dir={tmp_path}", f"run.name={name}"]
        train(load_config(ROOT / "configs" / "smoke.toml", settings), resume=True, quiet=True)
    found, expected = (result(tmp_path / name, FULL_FILE) for name in ("two", "one"))
    assert found["samples"] == expected["samples"]
    for row, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert distance(load(found["adapter"]), load(expected["adapter"])) <= 1e-5
