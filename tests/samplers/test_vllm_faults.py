"""Faults within a real vLLM engine: it fails, hangs, or has too little room for its KV cache."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rl_lora import cli
from rl_lora import train as loop
from rl_lora.adapters.files import load_tensors
from rl_lora.errors import EngineError, StaleAdapterError, UserError
from rl_lora.rollouts import sample_groups
from rl_lora.samplers.restarts import RestartingSampler
from rl_lora.samplers.vllm import settings as vllm_settings
from rl_lora.samplers.vllm.sampler import VllmSampler
from rl_lora.types import Adapter, Completion, Prompt, SampleParams
from tests.samplers.test_vllm_sampler import PROMPTS, make_model, make_sampler, publish

PARAMS = SampleParams(num_samples=3, max_tokens=16, temperature=0.8, seed=7)
ROUNDING = 1e-4  # nats, at most; batches of other sizes are added up in another order

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(900),  # several engines each
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="these compare float32 log-probs of vLLM's CPU back end"
    ),
]
Step = Callable[[Any], list[Any]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("vllm")
    return make_model(tmp_path_factory.mktemp("model") / "llama", tied=False)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """install(at, fault, times): engines do something else in every `at`-th step from now on."""
    from vllm import LLMEngine

    original = LLMEngine.step

    def install(at: int, fault: Step, times: int = 1) -> None:
        numbers = itertools.count(1)

        def step(engine: Any) -> list[Any]:
            number = next(numbers)
            is_faulty = number % at == 0 and number // at <= times
            return fault(engine) if is_faulty else original(engine)

        monkeypatch.setattr(LLMEngine, "step", step)

    return install


def restarting(model_dir: Path, told: list[str], **options: Any) -> RestartingSampler:
    return RestartingSampler(
        lambda: make_sampler(model_dir, **options),
        max_restarts=2,
        timeout_s=600.0,
        on_restart=told.append,
    )


def assert_same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    """The same tokens of the same version, with the same log-probs up to rounding."""
    flat, other = ([c for group in groups for c in group] for groups in (found, expected))
    assert [c.token_ids for c in flat] == [c.token_ids for c in other]
    assert [c.adapter_version for c in flat] == [c.adapter_version for c in other]
    for one, two in zip(flat, other, strict=True):
        logprobs = (torch.tensor(c.sampler_logprobs_T) for c in (one, two))
        torch.testing.assert_close(*logprobs, atol=ROUNDING, rtol=0)


def undisturbed(model_dir: Path, adapter: Adapter, **options: Any) -> list[list[Completion]]:
    with contextlib.closing(make_sampler(model_dir, **options)) as sampler:
        sampler.set_adapter(adapter)
        return sampler.sample(PROMPTS, PARAMS)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("merge_adapter", [True, False])
def test_an_engine_that_fails_is_replaced_and_the_samples_are_the_same(
    model_dir: Path, tmp_path: Path, steps: Any, merge_adapter: bool
) -> None:
    adapter, told = publish(model_dir, tmp_path, 1), list[str]()
    options = {"merge_adapter": merge_adapter, "max_num_seqs": 3}  # one group after the other
    expected = undisturbed(model_dir, adapter, **options)

    failed: list[weakref.ref[Any]] = []

    def fail(engine: Any) -> list[Any]:
        failed.append(weakref.ref(engine))
        raise RuntimeError("kernel image is invalid\nand so on")

    with contextlib.closing(restarting(model_dir, told, **options)) as sampler:
        steps(20, fail, times=2)  # in the second group, and in the third
        sampler.set_adapter(adapter)
        delivered: list[int] = []
        found = sampler.sample(PROMPTS, PARAMS, lambda index, _: delivered.append(index))
        assert_same(found, expected)
        assert delivered == [0, 1, 2]
        line = "vLLM failed (RuntimeError: kernel image is invalid); a new engine continues with"
        assert told == [f"{line} the same seeds"] * 2
        assert sampler.num_restarts == 2
        assert_same(sampler.sample(PROMPTS, PARAMS), expected)
        assert len(sampler.token_logprobs([PROMPTS[0].token_ids])[0]) == 2
        gc.collect()
        assert [engine() for engine in failed] == [None, None]  # their memory is free

        steps(1, fail, times=99)
        with pytest.raises(EngineError, match=r"is invalid\); 2 restarts in a row") as got:
            sampler.sample(PROMPTS, PARAMS)
        assert isinstance(got.value.__cause__, RuntimeError)
    assert not torch.distributed.is_initialized()


def forever(engine: Any) -> list[Any]:
    while True:
        pass


def no_tokens(engine: Any) -> list[Any]:
    """The engine's steps end, but none brings a token, as where no request can be scheduled."""
    engine.step = list
    return []


@pytest.mark.long
@pytest.mark.parametrize("hang", [forever, no_tokens])
def test_an_engine_that_hangs_is_replaced_and_the_samples_are_the_same(
    model_dir: Path, tmp_path: Path, steps: Any, hang: Step
) -> None:
    adapter, told = publish(model_dir, tmp_path, 1), list[str]()
    expected = undisturbed(model_dir, adapter)
    with contextlib.closing(restarting(model_dir, told)) as sampler:
        sampler.set_adapter(adapter)
        sampler._timeout_s = 3.0

        def hang_once(engine: Any) -> list[Any]:
            sampler._timeout_s = 600.0  # for the calls after this one
            return hang(engine)

        steps(5, hang_once)
        assert_same(sampler.sample(PROMPTS, PARAMS), expected)
        assert len(told) == 1
        assert told[0].startswith("vLLM gave no token for")


@pytest.mark.slow
def test_control_a_restart_without_the_adapter_is_found(
    model_dir: Path, tmp_path: Path, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = publish(model_dir, tmp_path, 1)

    def fail(engine: Any) -> list[Any]:
        monkeypatch.setattr(VllmSampler, "set_adapter", lambda self, adapter: None)
        raise RuntimeError("failed")

    with contextlib.closing(restarting(model_dir, [])) as sampler:
        sampler.set_adapter(adapter)
        steps(5, fail)
        with pytest.raises(StaleAdapterError, match=r"version \[-1\], and version 1 was"):
            sample_groups(sampler, PROMPTS, PARAMS, version=1)


@pytest.mark.long
def test_files_changed_before_a_restart_are_refused(
    model_dir: Path, tmp_path: Path, steps: Any
) -> None:
    adapter, other = publish(model_dir, tmp_path, 1), publish(model_dir, tmp_path, 2)

    def fail(engine: Any) -> list[Any]:
        (adapter.path / "adapter_model.safetensors").write_bytes(
            (other.path / "adapter_model.safetensors").read_bytes()
        )
        raise RuntimeError("failed")

    with contextlib.closing(restarting(model_dir, [])) as sampler:
        sampler.set_adapter(adapter)
        steps(5, fail)
        with pytest.raises(StaleAdapterError):
            sampler.sample(PROMPTS, PARAMS)


@pytest.mark.long
def test_a_run_whose_engine_fails_continues_as_if_it_had_not_and_ends_where_it_always_fails(
    tmp_path: Path,
    steps: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["run.num_steps=3", "data.held_out=4", "sampling.num_prompts=4"]
    options += ["sampling.max_tokens=32", "sampling.backend=vllm", "optim.lr=1e-3"]
    words = ["train", "smoke", "--quiet", f"run.output_dir={tmp_path}", *options]
    assert cli.main([*words, "run.name=whole"]) == 0
    publish = loop.publish

    def fail(engine: Any) -> list[Any]:
        raise RuntimeError("failed on purpose")

    def publish_and_fail_later(job: Any, state: Any) -> Adapter:
        if state.step == 1:
            steps(9, fail)
        return publish(job, state)

    monkeypatch.setattr(loop, "publish", publish_and_fail_later)
    assert cli.main([*words, "run.name=faulty"]) == 0
    told = "warning: vLLM failed (RuntimeError: failed on purpose); a new engine continues with"
    assert told in " ".join(capsys.readouterr().out.split())
    rows, others = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "faulty")
    )
    assert [row.get("system/engine_restarts") for row in rows] == [None] * 3
    assert [row.get("system/engine_restarts") for row in others] == [None, 1.0, None]
    for row, other in zip(rows, others, strict=True):
        for key in ("reward/mean", "rollouts/completion_tokens", "eval/accuracy"):
            assert row.get(key) == other.get(key)
        assert row["grad/norm"] == pytest.approx(other["grad/norm"], rel=1e-3)
        assert other["mismatch/kl"] < 1e-7
    weights = [load_tensors(tmp_path / name / "adapter") for name in ("whole", "faulty")]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-4, rtol=0)

    monkeypatch.setattr(loop, "publish", publish)
    steps(1, fail, times=99)
    assert cli.main([*words, "run.name=faulty", "run.num_steps=4", "--resume"]) == 3
    *trace, line = capsys.readouterr().err.splitlines()
    assert line == (
        "rl-lora: the run stopped: vLLM failed (RuntimeError: failed on purpose); 2 restarts in a "
        "row (sampling.max_restarts) did not help; run the same command with --resume to continue "
        "from the last checkpoint"
    )
    assert trace[-1] == "RuntimeError: failed on purpose"


# --- memory ---------------------------------------------------------------------------------------


def cache_of(num_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the next engines on the tiny model a KV cache of so many blocks."""
    block = vllm_settings.CPU_BLOCK_SIZE * 2 * 2 * 32 * 4  # layers, keys and values, width, float32
    monkeypatch.setattr(vllm_settings, "cpu_cache_bytes", lambda *args, **kw: num_blocks * block)


@pytest.mark.long
def test_a_full_cache_preempts_samples_which_end_up_the_same(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    adapter, preempted = publish(model_dir, tmp_path, 1), list[str]()
    prompts = [Prompt(f"p/{n}", "s", "q", "1", tuple(range(3 + n, 30 + n))) for n in range(4)]
    params = SampleParams(num_samples=3, max_tokens=30, temperature=0.8, seed=7)
    original = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kw: Any) -> Any:
        preempted.append(request.request_id)
        return original(self, request, *args, **kw)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)

    def sampled() -> list[list[Completion]]:
        with contextlib.closing(make_sampler(model_dir)) as sampler:
            sampler.set_adapter(adapter)
            return sampler.sample(prompts, params)

    expected = sampled()
    assert not preempted
    cache_of(8, monkeypatch)  # of which a sample takes two in the end
    assert_same(sampled(), expected)
    assert len(set(preempted)) > 1


@pytest.mark.usefixtures("model_dir")
def test_a_cache_without_room_for_one_sample_names_the_settings(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_of(2, monkeypatch)
    told = r"KV cache is needed.*lower sampling\.max_tokens or data\.max_prompt_tokens, or raise"
    with pytest.raises(UserError, match=told):
        make_sampler(model_dir)
