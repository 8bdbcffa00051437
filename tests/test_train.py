"""The loop as a user runs it, on the quickly made tiny model: records, seeds, resume, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora import cli
from rl_lora import train as loop
from rl_lora.adapters.files import load_tensors
from rl_lora.build import open_run
from rl_lora.config import RunConfig, load_config
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.runs.checkpoint import latest_checkpoint
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.train import train
from rl_lora.types import Adapter, Completion
from tests.helpers.kills import kill_9_at_line
from tests.helpers.run_files import steady

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "configs" / "smoke.toml"
SHORT = ["run.num_steps=3", "data.held_out=8", "sampling.num_prompts=4", "sampling.max_tokens=32"]
# Not a property of the run: they differ between two runs of one seed.


def smoke(folder: Path, *overrides: str) -> RunConfig:
    return load_config(SMOKE, [*SHORT, f"run.output_dir={folder}", *overrides])


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [steady(row) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        "lora.variant=dora",
        *(
            pytest.param(setting, marks=pytest.mark.long)
            for setting in (
                *(f"lora.variant={name}" for name in ("pissa", "rslora", "olora")),
                "optim.lora_plus_ratio=16",
            )
        ),
    ],
)
def test_variants_train_under_the_proofs_of_a_live_adapter_and_resume(
    tmp_path: Path, setting: str
) -> None:
    whole = ["lora.rank=2", "optim.lr=1e-4", "run.name=whole", setting]
    train(smoke(tmp_path, *whole), quiet=True)
    parts = [*whole[:2], "run.name=parts", setting]
    train(smoke(tmp_path, *parts, "run.num_steps=2"), quiet=True)
    train(smoke(tmp_path, *parts), resume=True, quiet=True)
    rows, again = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["mismatch/kl"] < 1e-7 for row in rows)
    assert rows == again
    final, resumed = (load_tensors(tmp_path / name / "adapter") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in final.items())


def test_a_run_leaves_its_records(tmp_path: Path) -> None:
    outcome = train(smoke(tmp_path, "run.eval_every=2", "run.loggers=['tensorboard']"), quiet=True)
    run = tmp_path / "smoke"
    assert outcome.folder == run
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert {
            "reward/mean",
            "cot/tokens_mean",
            "cot/truncated_rate",
            "entropy/mean",
            "mismatch/kl",
            "ratio/p50",
            "grad/norm",
            "adapter/norm",
            "groups/solved_all",
        } <= row.keys()
        assert 0 <= row["mismatch/kl"] < 1e-11  # sampled on the learner's own float32 weights
        assert row["mismatch/abs_max"] < 1e-3
    assert "eval/accuracy" in rows[1]
    assert "eval/accuracy" not in rows[0]
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["lora"]["rank"] == 1
    for name in (
        "transcripts.jsonl",
        "eval/step_000000.json",
        "eval/step_000002.json",
        "eval/step_000003.jsonl.gz",
        "best/adapter_config.json",
        "figures/reward.png",
        "adapter/adapter_config.json",
    ):
        assert (run / name).stat().st_size > 0, name
    # Of run.seed=0, since the first version: with another, accuracies would not be comparable.
    result = json.loads((run / "eval/step_000000.json").read_text())
    assert result["seed"] == 8_583_769_739_768_140_073
    assert list(run.rglob("events.out.tfevents*"))
    assert sorted(p.name for p in (run / "adapters").iterdir()) == ["v000002", "v000003"]


def test_one_seed_gives_one_run_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(smoke(tmp_path, f"run.name={name}", f"run.seed={seed}"), quiet=True)
    first, again, other = (metrics_of(tmp_path / name) for name in "abc")
    assert first == again
    assert first != other


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path: Path) -> None:
    train(smoke(tmp_path, "run.name=whole", "run.num_steps=4"), quiet=True)
    train(smoke(tmp_path, "run.name=broken", "run.num_steps=2"), quiet=True)
    train(smoke(tmp_path, "run.name=broken", "run.num_steps=4"), resume=True, quiet=True)
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "broken")
    whole, broken = (load_tensors(tmp_path / n / "adapter") for n in ("whole", "broken"))
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_complete_run_is_only_reported(tmp_path: Path) -> None:
    first = train(smoke(tmp_path), quiet=True)
    before = (tmp_path / "smoke" / "metrics.jsonl").read_bytes()
    start = time.perf_counter()
    again = train(smoke(tmp_path), resume=True, quiet=True)
    assert time.perf_counter() - start < 5
    assert again == first
    assert (tmp_path / "smoke" / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
@pytest.mark.long
def test_kill_9_at_any_moment_and_resume_give_the_same_run(tmp_path: Path) -> None:
    config = smoke(tmp_path, "run.name=whole", "run.num_steps=5", "warm_start.num_steps=2")
    train(config, quiet=True)
    command = [sys.executable, "-m", "rl_lora.cli", "train", str(SMOKE), "--resume", *SHORT]
    command += [f"run.output_dir={tmp_path}", "run.name=killed", "run.num_steps=5"]
    command += ["warm_start.num_steps=2"]
    for wanted in (1, 3):
        kill_9_at_line(command, tmp_path / "killed" / "metrics.jsonl", wanted, ROOT)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


def test_a_resumed_job_must_be_the_same_job(tmp_path: Path) -> None:
    train(smoke(tmp_path), quiet=True)
    with pytest.raises(UserError, match=r"optim\.lr=[\d.]+, this one has 0\.1"):
        train(smoke(tmp_path, "optim.lr=0.1"), resume=True, quiet=True)
    with pytest.raises(UserError, match="holds an older run"):
        train(smoke(tmp_path), quiet=True)


def test_warm_start_is_a_separate_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    learn = loop.warm_start
    monkeypatch.setattr(TorchSampler, "release_memory", lambda self: calls.append("release"))

    def recorded(*arguments: Any) -> None:
        calls.append("learn")
        learn(*arguments)

    monkeypatch.setattr(loop, "warm_start", recorded)
    train(smoke(tmp_path, "warm_start.num_steps=3", "warm_start.batch_size=8"), quiet=True)
    assert calls[:2] == ["release", "learn"]  # an engine on the same GPU sleeps meanwhile
    rows = [json.loads(x) for x in (tmp_path / "smoke/warm_start.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["sft/loss"] > 0
    assert (tmp_path / "smoke/eval/base.json").is_file()  # the base, adapter off, stays on record


def test_rows_without_solutions_leave_the_warm_start_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": f"{n} + 1", "answer": f"{n + 1}"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = smoke(tmp_path, f"data={tmp_path}/rows.jsonl", "warm_start.num_steps=2")
    train(config, quiet=True)
    assert "the warm start is skipped" in capsys.readouterr().out
    assert len(metrics_of(tmp_path / "smoke")) == 3
    assert not (tmp_path / "smoke/warm_start.jsonl").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.mode=full", "optim.lr=1e-4"],
        ["algorithm.advantage=grpo", "algorithm.loss=ppo", "optim.num_updates=2"],
        ["algorithm.loss=gspo", "algorithm.denominator=sequences"],
        ["algorithm.denominator=max_tokens"],
        ["algorithm.loss=cispo", "algorithm.kl=loss", "algorithm.kl_weight=0.01"],
        ["algorithm.kl=reward", "algorithm.kl_weight=0.01", "algorithm.advantage=rloo"],
        [
            "lora.mode=full",
            "algorithm.kl=loss",
            "algorithm.kl_weight=0.01",
            "optim.lr=1e-4",
            "algorithm.max_kl_to_base=10",
        ],
        ["optim.checkpoint_activations=true", "optim.microbatch_tokens=200"],
        ["algorithm.loss=truncated_importance_sampling", "algorithm.advantage=reinforce_pp"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_every_algorithm_runs_through_the_same_loop(tmp_path: Path, overrides: list[str]) -> None:
    train(smoke(tmp_path, "run.num_steps=2", *overrides), quiet=True)
    rows = metrics_of(tmp_path / "smoke")
    assert len(rows) == 2
    assert all(0 <= row["mismatch/kl"] < 1e-9 for row in rows)
    assert any(row["grad/norm"] > 0 for row in rows)
    where = {"algorithm.kl=loss": "loss/kl", "algorithm.kl=reward": "reward/kl"}
    for override, name in where.items():
        for row in rows:
            assert (name in row) == (override in overrides)
            assert row.get(name, 0.0) >= 0
    if "algorithm.kl=reward" in overrides:
        assert rows[1]["reward/kl"] > 1e-6  # of a policy that has left the base
        assert rows[1]["reward/kl_penalty"] != 0
    has_limit = "algorithm.max_kl_to_base=10" in overrides
    assert [row.get("policy/kl_to_base", 0.0) > 1e-6 for row in rows] == [False, has_limit]


@pytest.mark.slow
@pytest.mark.faults
def test_a_policy_too_far_from_the_base_stops_the_run_which_a_higher_limit_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "algorithm.max_kl_to_base"
    options = ["optim.lr=1e-2", "run.checkpoint_every=5"]
    train(smoke(tmp_path, "run.name=whole", f"{key}=100", *options), quiet=True)
    rows = metrics_of(tmp_path / "whole")
    kls = [row["policy/kl_to_base"] for row in rows]
    assert kls[0] < 1e-10  # a fresh adapter changes nothing
    assert 1e-4 < kls[1] < kls[2]
    low = [f"{key}={(kls[1] + kls[2]) / 2}", "run.name=parts", *options]
    words = ["train", str(SMOKE), "--quiet", *SHORT, f"run.output_dir={tmp_path}", *low]
    for more in ([], ["--resume"]):
        assert cli.main([*words, *more]) == 3
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("rl-lora: the run stopped: the policy's KL to the base model is ")
        assert f"over {key}=" in line
        newest = latest_checkpoint(tmp_path / "parts")
        assert newest is not None
        assert newest.name == "step_000002"
        assert metrics_of(tmp_path / "parts") == rows[:2]  # the third step has not learned
    train(smoke(tmp_path, *low, f"{key}=100"), resume=True, quiet=True)
    assert metrics_of(tmp_path / "parts") == rows
    weights = [tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_all_tied_steps_are_counted_and_the_run_continues(
    tmp_path: Path, write_module: Callable[[str, str], Path]
) -> None:
    write_module("zero", "def zero(completion, reference):\n    return 0.0\n")
    options = ["reward.name=zero:zero", "optim.schedule=linear", "optim.lr=3e-3"]
    train(smoke(tmp_path, *options), quiet=True)
    rows = metrics_of(tmp_path / "smoke")
    assert [row["optim/lr"] for row in rows] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert [row["learn/skipped_updates"] for row in rows] == [1.0] * 3
    assert [row["groups/tied"] for row in rows] == [4] * 3
    first, last = rows[0]["adapter/norm"], rows[-1]["adapter/norm"]
    assert first == last


LOSSES = """
import math
from rl_lora.losses import importance_sampling

calls = 0

def sometimes_nan(x):
    global calls
    calls += 1
    loss, clipped = importance_sampling(x)
    return (loss * math.nan if calls == 3 else loss), clipped

def nan_from_now_on(x):
    global calls
    calls += 1
    return importance_sampling(x)[0] * (1 if calls == 1 else math.nan), 0
"""


def test_steps_without_a_finite_gradient_are_left_out_and_kept(
    tmp_path: Path, write_module: Callable[[str, str], Path]
) -> None:
    write_module("my_losses", LOSSES)
    options = ["algorithm.loss=my_losses:sometimes_nan", "run.name=once"]
    train(smoke(tmp_path, *options), quiet=True)  # the first call tries the function out
    rows = metrics_of(tmp_path / "once")
    assert [row["learn/nonfinite_updates"] for row in rows] == [0, 1, 0]
    assert rows[0]["adapter/norm"] == rows[1]["adapter/norm"] != rows[2]["adapter/norm"]
    kept = (tmp_path / "once/nonfinite/step_000002.jsonl").read_text().splitlines()
    assert len(kept) == rows[1]["rollouts/num"]
    assert json.loads(kept[0]).keys() >= {"prompt_ids", "completion_ids", "sampler_logprobs"}

    sys.modules["my_losses"].calls = 0  # type: ignore[attr-defined]
    always = smoke(
        tmp_path,
        "algorithm.loss=my_losses:nan_from_now_on",
        "run.name=always",
        "optim.max_nonfinite_steps=2",
    )
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .* lower optim\.lr"):
        train(always, quiet=True)
    assert [row["step"] for row in metrics_of(tmp_path / "always")] == [1, 2]
    names = sorted(path.name for path in (tmp_path / "always/nonfinite").iterdir())
    assert names == ["step_000001.jsonl", "step_000002.jsonl"]

    # Resumed after step 1, which is the first of the two.
    sys.modules["my_losses"].calls = 0  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match=r"2 steps in a row"):
        train(always, resume=True, quiet=True)
    assert [row["step"] for row in metrics_of(tmp_path / "always")] == [1, 2]


class SilentSampler(TorchSampler):
    """Its completions of the second step have no token."""

    num_calls = 0

    def sample(self, prompts_N, params, on_group=None):  # type: ignore[no-untyped-def]
        SilentSampler.num_calls += params.num_samples > 1
        if params.num_samples == 1 or SilentSampler.num_calls != 2:
            return super().sample(prompts_N, params, on_group)
        empty = Completion((), "", (), False, self._version)
        groups = [[empty] * params.num_samples for _ in prompts_N]
        for index, group in enumerate(groups):
            on_group(index, group)
        return groups


@pytest.mark.parametrize("kl", ["none", "reward"])
def test_a_step_of_empty_completions_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kl: str
) -> None:
    monkeypatch.setattr("rl_lora.samplers.torch_sampler.TorchSampler", SilentSampler)
    SilentSampler.num_calls = 0
    train(smoke(tmp_path, f"algorithm.kl={kl}", "algorithm.kl_weight=0.01"), quiet=True)
    rows = metrics_of(tmp_path / "smoke")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["rollouts/completion_tokens"] == 0
    assert [row["learn/updates"] for row in rows] == [1, 0, 1]


class StaleSampler(TorchSampler):
    """Keeps giving the first version's log-probs, and claims to have the newest."""

    def set_adapter(self, adapter: Adapter | None) -> None:
        super().set_adapter(adapter)
        if adapter is not None and adapter.version >= 1:
            self._stale = True

    def sample(self, prompts_N, params, on_group=None):  # type: ignore[no-untyped-def]
        if getattr(self, "_stale", False):
            tensors = {n: t.clone() for n, t in self.policy.published_tensors().items()}
            for name, tensor in self.policy.published_tensors().items():
                if "lora_B" in name:
                    tensor.zero_()  # version 0
            try:
                return super().sample(prompts_N, params, on_group)
            finally:
                self.policy.load_tensors(tensors)
        return super().sample(prompts_N, params, on_group)


def test_a_stale_adapter_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rl_lora.samplers.torch_sampler.TorchSampler", StaleSampler)
    with pytest.raises(StaleAdapterError, match="stale or wrong adapter"):
        train(smoke(tmp_path), quiet=True)
    assert len(metrics_of(tmp_path / "smoke")) == 1  # the step before it is kept
    checkpoint = latest_checkpoint(tmp_path / "smoke")
    assert checkpoint is not None
    assert checkpoint.name == "step_000001"


def test_bad_input_is_found_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown reward 'maths'.*'math'"):
        train(smoke(tmp_path, "reward.name=maths"), quiet=True)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match=r"cannot be written.*set run\.output_dir"):
        train(smoke(blocked), quiet=True)


def test_the_job_closes_what_it_opened(tmp_path: Path) -> None:
    with open_run(smoke(tmp_path)) as job:
        assert isinstance(job.sampler, TorchSampler)
        assert len(job.prompts.eval) == 8
