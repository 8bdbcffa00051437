"""The engine sleeps while the learner works on the same GPU: calls and their order, on an engine
that only records them. tests/samplers/test_vllm_sampler.py puts a real one to sleep."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from rl_lora.adapters.files import save_adapter
from rl_lora.config import LoraSection
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.overlap import Batch, Request, RolloutWorker
from rl_lora.samplers.vllm import merged_weights
from rl_lora.samplers.vllm import sampler as vllm_sampler
from rl_lora.samplers.vllm.sampler import VllmSampler
from rl_lora.samplers.vllm.settings import EngineOptions, memory_fraction, with_memory_fraction
from rl_lora.samplers.vllm.sleep import checksums
from rl_lora.types import Adapter, SampleParams
from tests.helpers.fakes import FakeReward, make_prompt
from tests.helpers.tiny_models import make_policy, random_llama, shake

GIB = 2**30
PARAMS = SampleParams(num_samples=1, max_tokens=3, temperature=1.0, seed=0)
SLEEP, WAKE = ["reset_prefix_cache", "sleep 1"], ["wake_up"]
SAMPLE = ["add_request", "step"]


class RecordingEngine:
    """Records calls; while it sleeps its weights are zero, and what computes with them raises."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.calls = settings, list[str]()
        self.model = self.make_model()
        self.slot = torch.zeros(1, 1, 8, 3)  # of the adapter in use
        self.model.lora_a_stacked = (self.slot,)  # type: ignore[assignment]
        self.backup: list[torch.Tensor] | None = None
        self.loras: set[int] = set()
        self.waiting: list[Any] = []
        self.has_room = self.keeps_adapter = True
        self.engine_core = SimpleNamespace(shutdown=lambda: self.calls.append("shutdown"))

    def make_model(self) -> Any:
        return nn.Linear(3, 2)

    def _use(self, call: str | None) -> None:
        assert self.backup is None, f"{call} on a sleeping engine"
        if call is not None:
            self.calls.append(call)

    def _held(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), self.slot]

    @torch.no_grad()
    def sleep(self, level: int) -> None:
        self._use(f"sleep {level}")
        self.backup = [tensor.clone() for tensor in self._held()]
        for tensor in self._held():
            tensor.zero_()

    @torch.no_grad()
    def wake_up(self) -> None:
        self.calls.append("wake_up")
        if not self.has_room:
            raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62")
        for tensor, saved in zip(self._held(), self.backup or (), strict=False):
            tensor.copy_(saved if self.keeps_adapter or tensor is not self.slot else 0 * saved)
        self.backup = None

    def apply_model(self, function: Any) -> list[Any]:
        self._use(None)
        return [function(self.model)]

    def add_lora(self, request: Any) -> bool:
        self._use(f"add_lora {request.lora_int_id}")
        self.loras = {request.lora_int_id}
        self.slot.fill_(request.lora_int_id)
        return True

    def list_loras(self) -> set[int]:
        return self.loras

    def reset_prefix_cache(self) -> bool:
        self._use("reset_prefix_cache")
        return True

    def add_request(self, key: str, tokens: Any, params: Any, lora_request: Any) -> None:
        self._use("add_request")
        self.waiting.append((key, lora_request))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[Any]:
        self._use("step")
        key, lora = self.waiting.pop(0)
        logprobs = SimpleNamespace(token_ids=[4], logprobs=[-0.5])
        answer = SimpleNamespace(finish_reason="stop", token_ids=[4], logprobs=logprobs)
        return [SimpleNamespace(finished=True, request_id=key, lora_request=lora, outputs=[answer])]

    def abort_request(self, keys: list[str]) -> None:
        self.waiting.clear()

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(decode=lambda ids, **_: "7", added_tokens_decoder={})


@pytest.fixture(params=[torch.bfloat16], ids=str)
def sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[VllmSampler]:
    """On a GPU of 80 GiB of which 60 are free, where the learner will take 4 more; in float32 the
    engine has the model itself, and adapters are merged into it."""
    lora = lambda name, number, path: SimpleNamespace(  # noqa: E731
        lora_name=name, lora_int_id=number, path=path
    )
    vllm = SimpleNamespace(
        LoRARequest=lora,
        SamplingParams=lambda **options: options,
        RequestOutputKind=SimpleNamespace(FINAL_ONLY=2),
        tokens_input=list,
    )
    monkeypatch.setattr(vllm_sampler, "import_vllm", lambda device: vllm)
    monkeypatch.setattr(
        vllm_sampler, "make_engine", lambda _, settings, on_cpu: RecordingEngine(settings)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    model_dir = random_llama(tmp_path / "model")
    if request.param == torch.float32:
        layers = lambda model: [n for n in model.named_modules() if "_proj" in n[0]]  # noqa: E731
        monkeypatch.setattr(merged_weights, "_linear_layers", layers)
        monkeypatch.setattr(
            RecordingEngine, "make_model", lambda _: LlamaForCausalLM.from_pretrained(model_dir)
        )
    policy: Any = SimpleNamespace(
        model_dir=model_dir,
        lora=LoraSection(rank=1),
        quantize=None,
        dtype=request.param,
        device=torch.device("cuda"),
    )
    options = EngineOptions(learner_bytes=4 * GIB)
    with contextlib.closing(VllmSampler(policy, end_token_ids=[2], engine=options)) as made:
        yield made


@pytest.fixture
def versions(sampler: VllmSampler, tmp_path: Path) -> list[Adapter]:
    policy = make_policy(sampler._model_dir)
    made = []
    for version in range(3):
        shake(policy, seed=version)
        made.append(save_adapter(policy, tmp_path, version=version, run_name="test"))
    return made


def taken(sampler: VllmSampler) -> list[str]:
    """The engine's calls since the last time."""
    calls = list(sampler._engine.calls)
    sampler._engine.calls.clear()
    return calls


def test_the_engine_gets_what_the_learner_leaves_and_sleeps_at_once(sampler: VllmSampler) -> None:
    settings = sampler._engine.settings
    assert settings["gpu_memory_utilization"] == (60 - 4 - 4) / 80  # 4 GiB of reserve
    assert settings["enable_sleep_mode"]
    assert taken(sampler) == SLEEP


def test_sampler_and_learner_take_turns(sampler: VllmSampler, versions: list[Adapter]) -> None:
    """Asleep whenever the learner works; awake, with the adapter loaded, whenever it samples."""
    taken(sampler)
    requests = (Request([make_prompt()], PARAMS) for _ in range(3))
    with RolloutWorker(sampler, FakeReward(), requests) as worker:
        for step, version in enumerate(versions):
            batch = worker.next_batch(version)
            assert batch.scoring.groups()[0].rollouts_G[0].completion.adapter_version == step
            assert sampler._engine.backup is not None  # the learner would work now
            loaded = [*WAKE, f"add_lora {step + 1}"] if step == 0 else []
            assert taken(sampler) == [*loaded, *SAMPLE, *SLEEP]
            if step < 2:
                worker.offer(versions[step + 1])
                assert taken(sampler) == [*WAKE, f"add_lora {step + 2}"]


def test_an_adapter_survives_a_nap(sampler: VllmSampler, versions: list[Adapter]) -> None:
    sampler.set_adapter(versions[0])
    sampler.release_memory()
    taken(sampler)
    sampler.release_memory()  # a second sleep would unmap memory that is not mapped
    assert taken(sampler) == []
    sampler.sample([make_prompt()], PARAMS)
    assert taken(sampler) == [*WAKE, *SAMPLE]
    assert bool((sampler._engine.slot == 1).all())


@pytest.mark.parametrize("sampler", [torch.float32], indirect=True, ids=str)
def test_a_merged_adapter_survives_a_nap_and_is_replaced_after_it(
    sampler: VllmSampler, versions: list[Adapter]
) -> None:
    engine = sampler._engine
    assert "enable_lora" not in engine.settings
    assert taken(sampler) == SLEEP

    def assert_is_served(version: int | None) -> None:
        policy = make_policy(sampler._model_dir)
        for seed in range(version + 1 if version is not None else 0):
            shake(policy, seed=seed)
        ids = torch.arange(5, 15).unsqueeze(0)
        expected = policy.model(input_ids=ids).logits
        torch.testing.assert_close(
            engine.model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4
        )

    sampler.set_adapter(versions[0])
    assert taken(sampler) == []  # nothing is written to a sleeping engine
    sampler.sample([make_prompt()], PARAMS)
    assert taken(sampler) == [*WAKE, "reset_prefix_cache", *SAMPLE]
    assert_is_served(0)
    sampler.release_memory()
    sampler.sample([make_prompt()], PARAMS)
    assert taken(sampler) == [*SLEEP, *WAKE, *SAMPLE]
    assert_is_served(0)
    sampler.release_memory()
    for version in (1, None):
        sampler.set_adapter(None if version is None else versions[version])
        sampler.sample([make_prompt()], PARAMS)
        assert_is_served(version)


def test_an_adapter_that_is_lost_in_sleep_is_noticed(
    sampler: VllmSampler, versions: list[Adapter]
) -> None:
    sampler.set_adapter(versions[0])
    sampler.release_memory()
    sampler._engine.keeps_adapter = False
    for _ in range(2):  # and not only the first time
        with pytest.raises(StaleAdapterError, match="checksums differ"):
            sampler.sample([make_prompt()], PARAMS)
    assert "add_request" not in taken(sampler)


def learn_in_vain(batch: Batch) -> None:
    raise FloatingPointError("gradient norm is nan")


def test_sampling_continues_after_a_learner_that_failed(
    sampler: VllmSampler, versions: list[Adapter]
) -> None:
    requests = (Request([make_prompt()], PARAMS) for _ in range(2))
    with RolloutWorker(sampler, FakeReward(), requests) as worker:
        with pytest.raises(FloatingPointError):
            learn_in_vain(worker.next_batch(versions[0]))
        assert len(worker.next_batch(versions[0]).scoring.groups()) == 1


def test_an_engine_that_samples_is_not_put_to_sleep(sampler: VllmSampler) -> None:
    sampler._wake()
    sampler._engine.waiting.append(("0", None))
    taken(sampler)
    sampler.release_memory()
    assert taken(sampler) == []


def test_a_gpu_without_room_to_wake(sampler: VllmSampler) -> None:
    sampler._engine.has_room = False
    with pytest.raises(UserError, match=r"no room to wake .*out of memory.*memory_fraction"):
        sampler.sample([make_prompt()], PARAMS)
    assert sampler._engine.waiting == []
    engine = sampler._engine
    with pytest.warns(UserWarning, match="closed without being woken"):
        sampler.close()
    assert engine.calls[-1] == "shutdown"


def test_closing_a_sleeping_engine(sampler: VllmSampler) -> None:
    engine = sampler._engine
    engine.calls.clear()
    sampler.close()
    sampler.close()
    assert engine.calls == ["wake_up", "shutdown"]
    with pytest.raises(RuntimeError, match="closed"):
        sampler.release_memory()


def test_checksums_see_every_bit_of_every_tensor() -> None:
    model: Any = nn.Linear(2, 1).bfloat16()
    model.register_buffer("cosines", torch.tensor([1.5, 2.5]))
    model.lora_b_stacked = (torch.zeros(2), torch.zeros(3))
    model.w13_lora_a_stacked = torch.zeros(0)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(-2.0)
    # bfloat16 1.0 is 0x3f80 = 16256 and -2.0 0xc000 = -16384; float32 1.5 is 0x3fc00000 and
    # 2.5 0x40200000.
    expected = [2 * 16256, -16384, 0x3FC00000 + 0x40200000, 0, 0]
    assert checksums(model) == expected
    model.lora_b_stacked[1][2] = 1e-45  # the least of all changes
    assert checksums(model) == [*expected[:4], 1]
    assert checksums(nn.Identity()) == []


def test_a_share_that_is_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 80 * GIB))
    asked, gpu = EngineOptions(memory_fraction=0.3, learner_bytes=70 * GIB), torch.device("cuda", 1)
    assert with_memory_fraction(asked, gpu) is asked
    assert with_memory_fraction(EngineOptions(), gpu).memory_fraction == 16 / 80
    with pytest.raises(UserError, match=r"20\.0 of 80\.0 GiB free, and the learner takes 16\.0"):
        with_memory_fraction(EngineOptions(learner_bytes=16 * GIB), gpu)


def test_the_share_leaves_the_reserve() -> None:
    assert memory_fraction(80 * GIB, taken=16 * GIB) == 60 / 80
    assert memory_fraction(1000 * GIB, taken=0) == 0.95
