"""VllmSampler on a vLLM engine over tiny random models, compared with transformers and PEFT."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from rl_lora.adapters.files import fingerprint, save_adapter
from rl_lora.config import LoraSection, ResourcesSection, RunConfig, SamplingSection
from rl_lora.environments.bridge import Bridge
from rl_lora.environments.episodes import EpisodeSampler
from rl_lora.environments.protocol import Step, Turn
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.launchers import interruption
from rl_lora.launchers.interruption import Interrupted
from rl_lora.rollouts import score_groups
from rl_lora.sampler import BASE_VERSION
from rl_lora.samplers.liveness import VersionCheck
from rl_lora.samplers.vllm import merged_weights
from rl_lora.samplers.vllm import sampler as vllm_sampler
from rl_lora.samplers.vllm import settings as vllm_settings
from rl_lora.samplers.vllm.checks import with_compilation
from rl_lora.samplers.vllm.engine import check_adapter, make_engine
from rl_lora.samplers.vllm.process import import_vllm, process_kept
from rl_lora.samplers.vllm.sampler import VllmSampler
from rl_lora.samplers.vllm.settings import (
    RANK_SLOTS,
    EngineOptions,
    cpu_cache_bytes,
    engine_settings,
    graph_sizes,
    lora_settings,
    merges_adapter,
)
from rl_lora.samplers.vllm.sleep import put_to_sleep, wake
from rl_lora.types import Adapter, Completion, Prompt, RolloutGroup, SampleParams
from tests.helpers.fakes import FakeReward
from tests.helpers.tiny_models import VOCAB, make_policy, random_llama, shake
from tests.samplers.test_adapter_faults import FILE_FAULTS, change_tensors

CPU = torch.device("cpu")
END = 2
CONTEXT = 64
PROMPTS = [
    Prompt("p/0", "s", "q", "1", (5, 6, 7)),
    Prompt("p/1", "s", "q", "1", (11, 12)),
    Prompt("p/2", "s", "q", "1", tuple(range(20, 60))),  # longer than a block of the prefix cache
]
PARAMS = SampleParams(num_samples=3, max_tokens=12, temperature=0.8, seed=7)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="these compare float32 log-probs of vLLM's CPU back end"
)


def make_model(folder: Path, **options: Any) -> Path:
    """A tiny Llama with a tokenizer that writes token 5 as 't5'."""
    random_llama(folder, **options)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{END}", unk_token="t0")
    tokenizer.save_pretrained(folder)
    return folder


def make_sampler(model_dir: Path, **options: Any) -> VllmSampler:
    engine = {name: options.pop(name, None) for name in ("merge_adapter", "eager")}
    policy = served(model_dir, options.pop("lora", LoraSection(rank=1)))
    options = {"max_model_len": CONTEXT, "max_num_seqs": 16, "end_token_ids": [END]} | options
    return VllmSampler(policy, engine=EngineOptions(**engine), **options)


def served(model_dir: Path, lora: LoraSection, device: torch.device = CPU) -> Any:
    """What the sampler looks at in a policy."""
    return SimpleNamespace(
        model_dir=model_dir, lora=lora, dtype=torch.float32, device=device, quantize=None
    )


def publish(model_dir: Path, folder: Path, version: int, **lora: Any) -> Adapter:
    """A version with its own random weights."""
    policy = make_policy(model_dir, **lora)
    shake(policy, seed=version, size=0.05)
    return save_adapter(policy, folder, version=version, run_name="test")


def expected_logprobs(
    model_dir: Path, adapter: Adapter | None, token_ids: Sequence[int], temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs of tokens 1, 2, ... by transformers, the adapter applied by PEFT."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None and adapter.is_full:
        model.load_state_dict(load_file(adapter.path / "model.safetensors"), strict=False)
    elif adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter.path))
    with torch.no_grad():
        logits_TV = model(input_ids=torch.tensor([list(token_ids)])).logits[0] / temperature
    targets = torch.tensor(list(token_ids[1:])).unsqueeze(-1)
    return logits_TV[:-1].log_softmax(-1).gather(-1, targets).squeeze(-1)


def differences(
    model_dir: Path, adapter: Adapter | None, groups: list[list[Completion]], temperature: float
) -> torch.Tensor:
    """|sampler - transformers| over all sampled tokens of PROMPTS' groups."""
    found = []
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            ids = [*prompt.token_ids, *completion.token_ids]
            expected = expected_logprobs(model_dir, adapter, ids, temperature)
            expected = expected[len(prompt.token_ids) - 1 :]
            found.append((expected - torch.tensor(completion.sampler_logprobs_T)).abs())
    return torch.cat(found)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "llama", tied=False)


@pytest.mark.usefixtures("vllm_installed")
def test_full_weights_are_replaced_and_the_engine_is_freed(model_dir: Path, tmp_path: Path) -> None:
    tied_dir = make_model(tmp_path / "tied", tied=True)
    adapter = publish(tied_dir, tmp_path / "weights", 1, mode="full")
    assert adapter.is_full
    ids = PROMPTS[2].token_ids
    with contextlib.closing(make_sampler(tied_dir, lora=LoraSection(mode="full"))) as sampler:
        base = torch.tensor(sampler.token_logprobs([ids])[0])
        expected = expected_logprobs(tied_dir, None, ids)
        torch.testing.assert_close(base, expected, atol=1e-4, rtol=0)

        sampler.sample(PROMPTS, PARAMS)  # fills the prefix cache with the base's keys and values
        sampler.set_adapter(adapter)
        groups = sampler.sample(PROMPTS, PARAMS)
        assert {c.adapter_version for group in groups for c in group} == {1}
        assert differences(tied_dir, adapter, groups, PARAMS.temperature).mean() < 1e-5
        changed = torch.tensor(sampler.token_logprobs([ids])[0])
        expected = expected_logprobs(tied_dir, adapter, ids)
        torch.testing.assert_close(changed, expected, atol=1e-4, rtol=0)
        assert (changed - base).abs().mean() > 1e-2

        sampler.set_adapter(None)
        assert sampler.token_logprobs([ids])[0] == base.tolist()
        with pytest.raises(ValueError, match="is_full"):
            sampler.set_adapter(replace(adapter, rank=1))
        with pytest.raises(RuntimeError, match=r"close\(\) it first"):
            make_sampler(model_dir)

    sampler.close()  # a second time
    assert not torch.distributed.is_initialized()
    assert not [o for o in gc.get_objects() if type(o).__name__ == "CPUModelRunner"]
    with pytest.raises(RuntimeError, match="closed"):
        sampler.sample(PROMPTS, PARAMS)


@pytest.mark.usefixtures("vllm_installed")
def test_models_that_vllm_does_not_serve(tmp_path: Path) -> None:
    narrow = make_model(tmp_path / "narrow", hidden=32)
    with pytest.raises(UserError, match=r"heads of 32, .*narrow are 16 wide.*backend=torch"):
        make_sampler(narrow)
    unknown = make_model(tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    with pytest.raises(
        UserError, match=r"does not serve .*unknown: .*\['Unheard'\] are not"
    ) as got:
        make_sampler(unknown)
    assert len(str(got.value)) < 400


@pytest.mark.usefixtures("vllm_installed")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ModuleNotFoundError("No module", name="flashinfer"), r"lacks flashinfer: install vLLM"),
        (
            ValueError("Free memory on device cuda:0 (9/79 GiB) is less than desired. Decrease it"),
            r"does not serve m: Free memory .*desired; .*lower sampling\.memory_fraction",
        ),
    ],
)
def test_what_an_engine_lacks_is_reported_with_its_fix(error: Exception, told: str) -> None:
    def refuse(settings: Any) -> None:
        raise error

    vllm = SimpleNamespace(EngineArgs=dict, LLMEngine=SimpleNamespace(from_engine_args=refuse))
    with pytest.raises(UserError, match=told):
        make_engine(vllm, {"model": "m"}, False)


def _process_state() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "affinity": os.sched_getaffinity(0),
        "num_threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state(legacy=True)[1].tolist(),  # type: ignore[index]  # noqa: NPY002
        "python": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "is_grad_enabled": torch.is_grad_enabled(),
        "has_cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }


State = dict[str, Any]  # of the process, before and after an engine was made


@pytest.fixture(
    scope="module",
    params=["merged", "lora_layers", pytest.param("compiled", marks=pytest.mark.long)],
)
def opened(
    model_dir: Path, vllm_installed: None, request: pytest.FixtureRequest
) -> Iterator[tuple[VllmSampler, State, State]]:
    before = _process_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_settings, "CPU_BATCHED_TOKENS", 70)  # less than the tests' prompts take
        sampler = make_sampler(
            model_dir,
            merge_adapter=request.param != "lora_layers",
            eager=request.param != "compiled",
        )
    yield sampler, before, _process_state()
    sampler.close()


@pytest.fixture
def sampler(opened: tuple[VllmSampler, State, State]) -> VllmSampler:
    opened[0].set_adapter(None)
    return opened[0]


def is_merged(sampler: VllmSampler) -> bool:
    return sampler._merged is not None


def test_memory_given_back_changes_nothing(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    """The KV cache's pages and the merged weights, dropped between calls and versions."""
    adapter = publish(model_dir, tmp_path, 50)
    results: dict[bool, list[Any]] = {False: [], True: []}
    for rests in results:
        for version in (None, adapter, adapter, None):
            sampler.set_adapter(version)
            for _ in range(2):
                results[rests].append([_ids(group) for group in sampler.sample(PROMPTS, PARAMS)])
                results[rests].append(sampler.token_logprobs([PROMPTS[0].token_ids]))
                if rests:
                    sampler.release_memory()
    assert results[False] == results[True]


def test_weights_that_were_dropped_are_not_computed_with(sampler: VllmSampler) -> None:
    if not is_merged(sampler):
        pytest.skip("only merged weights are dropped")
    sampler.release_memory()
    (model,) = sampler._engine.apply_model(lambda model: model)
    with pytest.raises(RuntimeError, match="dropped"):
        model.lm_head.cpu_linear(torch.zeros(1, 4), None, None)
    assert sampler.token_logprobs([PROMPTS[0].token_ids])


def test_an_engine_that_slept_samples_the_same(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    """vLLM's own calls in this process. A CPU's worker frees nothing in sleep, but the scheduler
    pauses and forgets its prefix cache as on a GPU."""
    sampler.set_adapter(publish(model_dir, tmp_path, 60))
    before = [_ids(group) for group in sampler.sample(PROMPTS, PARAMS)]
    engine = sampler._engine
    sums = put_to_sleep(engine)
    assert engine.is_sleeping()
    wake(engine, sums)
    assert not engine.is_sleeping()
    assert [_ids(group) for group in sampler.sample(PROMPTS, PARAMS)] == before
    if is_merged(sampler):
        return
    (model,) = engine.apply_model(lambda model: model)
    stacked = (getattr(module, "lora_b_stacked", ()) for module in model.modules())
    slot = next(slot for slots in stacked for slot in slots if slot.any())
    sums = put_to_sleep(engine)
    saved = slot.clone()
    slot.zero_()
    with pytest.raises(StaleAdapterError, match="checksums differ"):
        wake(engine, sums)
    slot.copy_(saved)


def test_an_engine_leaves_the_process_as_it_was(
    opened: tuple[VllmSampler, State, State],
) -> None:
    sampler, before, after = opened
    assert after == before
    now = _process_state()
    sampler.sample(PROMPTS, PARAMS)
    sampler.token_logprobs([PROMPTS[0].token_ids])
    assert _process_state() == now


def test_logprobs_are_those_of_transformers_and_peft(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    for adapter in (None, publish(model_dir, tmp_path, 1), publish(model_dir, tmp_path, 2)):
        sampler.set_adapter(adapter)
        groups = sampler.sample(PROMPTS, PARAMS)
        errors = differences(model_dir, adapter, groups, PARAMS.temperature)
        assert errors.mean() < 1e-5
        assert errors.max() < 1e-4
        versions = {completion.adapter_version for group in groups for completion in group}
        assert versions == {BASE_VERSION if adapter is None else adapter.version}
        scored = sampler.token_logprobs([prompt.token_ids for prompt in PROMPTS])
        for prompt, logprobs in zip(PROMPTS, scored, strict=True):
            expected = expected_logprobs(model_dir, adapter, prompt.token_ids)
            torch.testing.assert_close(torch.tensor(logprobs), expected, atol=1e-4, rtol=0)


def test_an_adapter_on_lm_head_and_the_base_after_it(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    adapter = publish(model_dir, tmp_path, 3, lm_head=True)
    assert "base_model.model.lm_head.lora_A.weight" in load_file(
        adapter.path / "adapter_model.safetensors"
    )
    ids = PROMPTS[2].token_ids
    for version in (adapter, None):
        sampler.set_adapter(version)
        groups = sampler.sample(PROMPTS, PARAMS)
        assert differences(model_dir, version, groups, PARAMS.temperature).max() < 1e-4
        scored = torch.tensor(sampler.token_logprobs([ids])[0])
        expected = expected_logprobs(model_dir, version, ids)
        torch.testing.assert_close(scored, expected, atol=1e-4, rtol=0)


def test_samples_follow_only_from_the_seed(sampler: VllmSampler) -> None:
    groups = sampler.sample(PROMPTS, PARAMS)
    torch.manual_seed(99)  # the process's own random state has no part in it
    assert [_ids(group) for group in sampler.sample(PROMPTS, PARAMS)] == [_ids(g) for g in groups]
    assert _ids(sampler.sample(PROMPTS[1:2], PARAMS)[0]) == _ids(groups[1])
    assert len(set(_ids(groups[0]))) == PARAMS.num_samples
    other = sampler.sample(PROMPTS, replace(PARAMS, seed=8))
    assert _ids(other[0]) != _ids(groups[0])
    twice = sampler.sample([PROMPTS[0], PROMPTS[1], PROMPTS[0]], PARAMS)
    assert [_ids(group) for group in twice[:2]] == [_ids(group) for group in groups[:2]]
    assert not set(_ids(twice[2])) & set(_ids(twice[0]))  # the same prompt again, other samples


@pytest.mark.faults
def test_a_signal_ends_the_sampling_between_two_passes(
    sampler: VllmSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes within a pass, which is not broken off; the engine is as before."""
    expected = [_ids(group) for group in sampler.sample(PROMPTS, PARAMS)]
    step, done = sampler._engine.step, list[Any]()

    def step_with_signal() -> Any:
        if len(done) == 3:
            signal.raise_signal(signal.SIGTERM)
        done.append(step())
        return done[-1]

    with monkeypatch.context() as patch:
        patch.setattr(sampler._engine, "step", step_with_signal)
        with pytest.raises(Interrupted, match="SIGTERM"), interruption.handled():
            sampler.sample(PROMPTS, PARAMS)
    assert len(done) == 4  # of 12 and more
    assert not sampler._engine.has_unfinished_requests()
    assert [_ids(group) for group in sampler.sample(PROMPTS, PARAMS)] == expected


def test_prompts_that_exceed_a_steps_tokens(sampler: VllmSampler) -> None:
    """24 prompts of 40 tokens, one of which fits into a step of 70 tokens at a time."""
    prompts = [replace(PROMPTS[2], prompt_id=f"p/{i}", token_ids=(i + 3,) * 40) for i in range(24)]
    params = replace(PARAMS, num_samples=2)
    groups = sampler.sample(prompts, params)
    assert [_ids(group) for group in sampler.sample(prompts[7:9], params)] == [
        _ids(group) for group in groups[7:9]
    ]


def _ids(group: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in group]


def test_many_publishes_leave_one_adapter_in_the_engine(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    policy = make_policy(model_dir)
    seen = set()
    for version in range(100, 130):
        shake(policy, seed=version, size=0.05)
        sampler.set_adapter(save_adapter(policy, tmp_path, version=version, run_name="many"))
        seen.add(tuple(sampler.token_logprobs([PROMPTS[0].token_ids])[0]))
    assert len(seen) == 30  # every version was really in use
    gc.collect()
    held = [o for o in gc.get_objects() if type(o).__name__ == "LoRAModel"]
    assert len(held) == (0 if is_merged(sampler) else 1)


def test_a_version_can_be_taken_up_again(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    first, second = publish(model_dir, tmp_path, 10), publish(model_dir, tmp_path, 11)
    scored = []
    for adapter in (first, None, first, second, first):
        sampler.set_adapter(adapter)
        scored.append(sampler.token_logprobs([PROMPTS[0].token_ids])[0])
    assert scored[0] == scored[2] == scored[4]
    assert scored[0] != scored[1]
    assert scored[0] != scored[3]


@pytest.mark.faults
def test_a_version_whose_files_were_changed_is_refused_and_the_one_before_stays(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    before, adapter = publish(model_dir, tmp_path, 1), publish(model_dir, tmp_path, 2)
    ids = [PROMPTS[2].token_ids]
    sampler.set_adapter(before)
    expected = sampler.token_logprobs(ids)
    kept = shutil.copytree(adapter.path, tmp_path / "kept")
    for fault, told in FILE_FAULTS.values():
        fault(adapter.path)
        with pytest.raises((StaleAdapterError, UserError), match=told):
            sampler.set_adapter(adapter)
        assert sampler.token_logprobs(ids) == expected
        shutil.rmtree(adapter.path, ignore_errors=True)
        shutil.copytree(kept, adapter.path)
    sampler.set_adapter(adapter)
    assert sampler.token_logprobs(ids) != expected


@pytest.mark.faults
def test_a_wrong_adapter_that_is_loaded_all_the_same_shows_in_the_rollouts(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a defect of the engine: the files are not checked, and are half as large."""
    policy = make_policy(model_dir)
    check = VersionCheck(policy, PARAMS.temperature)

    def serve(version: int) -> list[RolloutGroup]:
        shake(policy, seed=version, size=0.01)
        adapter = save_adapter(policy, tmp_path, version=version, run_name="test")
        if version == 71:
            change_tensors(adapter.path, lambda tensor: tensor / 2)
            monkeypatch.setattr(vllm_sampler, "check_files", lambda *_, **__: None)
            monkeypatch.setattr(merged_weights, "fingerprint", lambda _: adapter.fingerprint)
        sampler.set_adapter(adapter)
        return score_groups(PROMPTS, sampler.sample(PROMPTS, PARAMS), FakeReward())

    check.check(serve(70), 70)
    with pytest.raises(StaleAdapterError, match="not of version 71: of the tokens"):
        check.check(serve(71), 71)


def test_a_name_used_for_other_weights_is_refused(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    adapter = publish(model_dir, tmp_path, 30)
    sampler.set_adapter(adapter)
    other = publish(model_dir, tmp_path, 31)
    with pytest.raises(StaleAdapterError, match=r"test-v000030.*used before"):
        sampler.set_adapter(replace(other, name=adapter.name))


def test_an_answer_under_another_adapter_is_refused() -> None:
    third = SimpleNamespace(lora_name="run-v3", lora_int_id=4)
    second = SimpleNamespace(lora_name="run-v2", lora_int_id=3)
    check_adapter(None, None)
    check_adapter(third, third)
    for answered, wanted in ((second, third), (None, third), (third, None)):
        with pytest.raises(StaleAdapterError, match="run-v3"):
            check_adapter(answered, wanted)


def test_ends_caps_stops_and_progress(sampler: VllmSampler) -> None:
    calls: list[tuple[int, int, int]] = []
    sampler.on_progress = lambda *call: calls.append(call)
    params = SampleParams(num_samples=40, max_tokens=20, temperature=1.5, seed=1)
    (group,) = sampler.sample(PROMPTS[:1], params)
    sampler.on_progress = None
    ended = [c for c in group if not c.is_truncated]
    capped = [c for c in group if c.is_truncated]
    assert ended
    assert capped
    for completion in ended:
        assert completion.token_ids.index(END) == len(completion.token_ids) - 1
        assert f"t{END}" not in completion.text.split()  # a special token
    for completion in capped:
        assert len(completion.token_ids) == 20
        assert END not in completion.token_ids
        words = [f"t{i}" for i in completion.token_ids if i != 0]  # t0 is special
        assert completion.text == " ".join(words)
    assert [call[0] for call in calls] == list(range(1, 41))
    assert calls[-1] == (40, 40, sum(len(c.token_ids) for c in group))

    word = f"t{capped[0].token_ids[3]}"
    index = group.index(capped[0])
    stopped = sampler.sample(PROMPTS[:1], replace(params, stop=(f"{word} ", word)))[0][index]
    assert not stopped.is_truncated
    assert len(stopped.token_ids) <= 5
    assert capped[0].token_ids[: len(stopped.token_ids)] == stopped.token_ids


class TwoWords:
    """Answers each of two turns with a word."""

    is_graded: ClassVar[bool] = False

    def reset(self, prompt: Prompt, seed: int) -> None:
        self.words = iter([f"t{seed % 50 + 7}", "t8", None])

    def step(self, turn: Turn) -> Step:
        return Step(next(self.words))


@pytest.mark.slow
def test_episodes_of_several_turns(sampler: VllmSampler, model_dir: Path, tmp_path: Path) -> None:
    """Their log-probs are those of transformers on the whole episode; each turn has its cap."""
    adapter = publish(model_dir, tmp_path, 80)
    sampler.set_adapter(adapter)
    bridge = Bridge(sampler._tokenizer, "base")
    episodes = EpisodeSampler(sampler, TwoWords, bridge)
    params = replace(PARAMS, max_tokens=20, stop=tuple(f"t{n}" for n in range(3, 97, 9)))
    groups = episodes.sample(PROMPTS, params)
    assert [_ids(group) for group in episodes.sample(PROMPTS, params)] == list(map(_ids, groups))
    assert any(one.episode and one.episode.num_turns == 3 for group in groups for one in group)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            assert len(one.token_ids) <= 20
            ids = [*prompt.token_ids, *one.token_ids]
            expected = expected_logprobs(model_dir, adapter, ids, params.temperature)
            off = expected[len(prompt.token_ids) - 1 :] - torch.tensor(one.sampler_logprobs_T)
            assert off[torch.tensor(one.is_sampled_T)].abs().max() < 1e-4


def test_special_tokens_stop_by_their_id(sampler: VllmSampler) -> None:
    """t0 is special, and so no part of the text that stops are looked for in."""
    params = SampleParams(num_samples=40, max_tokens=20, temperature=1.5, seed=1)
    (free_G,) = sampler.sample(PROMPTS[:1], params)
    index, place = next(
        (index, one.token_ids.index(0))
        for index, one in enumerate(free_G)
        if 0 in one.token_ids[:-2]
    )
    token_ids = free_G[index].token_ids
    following = f"t0 t{token_ids[place + 1]}"
    for stop, length in (("t0", place + 1), (following, place + 2)):
        stopped = sampler.sample(PROMPTS[:1], replace(params, stop=(stop,)))[0][index]
        assert stopped.token_ids == token_ids[:length]
        assert not stopped.is_truncated
        assert "t0" not in stopped.text.split()


def test_temperature_0_takes_the_likeliest_token(sampler: VllmSampler, model_dir: Path) -> None:
    params = SampleParams(num_samples=1, max_tokens=1, temperature=0.0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for prompt, (completion,) in zip(PROMPTS, sampler.sample(PROMPTS, params), strict=True):
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([prompt.token_ids])).logits[0, -1]
        assert completion.token_ids == (int(logits_V.argmax()),)
        expected = logits_V.log_softmax(-1).max().item()
        assert completion.sampler_logprobs_T[0] == pytest.approx(expected, abs=1e-4)


def test_nothing_to_do(sampler: VllmSampler) -> None:
    assert sampler.sample([], PARAMS) == []
    assert sampler.token_logprobs([[5], [5, 6]])[0] == []


def test_requests_out_of_bounds(sampler: VllmSampler) -> None:
    with pytest.raises(UserError, match=r"'p/2' has 40 tokens.*max_tokens=30.*context of 64"):
        sampler.sample(PROMPTS, replace(PARAMS, max_tokens=30))
    with pytest.raises(UserError, match=r"65 tokens.*64"):
        sampler.token_logprobs([[5] * 65])
    assert len(sampler.token_logprobs([[5] * 64])[0]) == 63
    with pytest.raises(UserError, match=r"temperature 0\.001"):
        sampler.sample(PROMPTS, replace(PARAMS, temperature=0.001))
    assert len(sampler.sample(PROMPTS, PARAMS)) == 3  # and it still works


def test_missing_adapters(sampler: VllmSampler, model_dir: Path, tmp_path: Path) -> None:
    adapter = publish(model_dir, tmp_path, 40)
    with pytest.raises(UserError, match="nowhere does not exist"):
        sampler.set_adapter(replace(adapter, path=tmp_path / "nowhere"))
    (adapter.path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        sampler.set_adapter(adapter)


def test_an_adapter_that_does_not_fit(
    sampler: VllmSampler, model_dir: Path, tmp_path: Path
) -> None:
    right, wrong = publish(model_dir, tmp_path, 41), publish(model_dir, tmp_path, 42, rank=4)
    sampler.set_adapter(right)
    before = sampler.token_logprobs([PROMPTS[0].token_ids])
    if is_merged(sampler):  # of any rank, but of this model
        tensors = load_file(wrong.path / "adapter_model.safetensors")
        name = next(name for name in tensors if "o_proj.lora_A" in name)
        tensors[name] = tensors[name][:, 1:].contiguous()
        save_file(tensors, wrong.path / "adapter_model.safetensors")
        (wrong.path / "rl_lora.json").unlink()
        wrong = replace(wrong, fingerprint=fingerprint(tensors))
        complaint = r"o_proj' is for \[\d+, \d+\] weights, not \[\d+, \d+\]"
    else:
        complaint = r"v000042: LoRA rank 4 is greater than max_lora_rank 1"
    with pytest.raises(UserError, match=complaint):
        sampler.set_adapter(wrong)
    assert sampler.token_logprobs([PROMPTS[0].token_ids]) == before


def test_vllm_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"not installed.*rl_lora\[cpu\].*sampling\.backend=torch"):
        import_vllm(CPU)
    with pytest.raises(UserError, match=r"rl_lora\[gpu\]"):
        import_vllm(torch.device("cuda"))


@pytest.mark.usefixtures("vllm_installed")
def test_vllm_of_another_device() -> None:
    with pytest.raises(UserError, match=r"built for cpu.*model\.device is cuda.*rl_lora\[gpu\]"):
        import_vllm(torch.device("cuda"))


def test_bad_model_directories(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        make_sampler(tmp_path)
    with pytest.raises(UserError, match="500 tokens exceed the model's context of 128"):
        make_sampler(model_dir, max_model_len=500)


def test_settings_that_gpus_do_not_take(model_dir: Path) -> None:
    bad = (("cuda:1", False, "CUDA_VISIBLE_DEVICES=1"), ("cuda", True, r"lora\.lm_head=false"))
    for device, lm_head, message in bad:
        with pytest.raises(UserError, match=message):
            VllmSampler(
                served(model_dir, LoraSection(lm_head=lm_head), torch.device(device)),
                max_model_len=CONTEXT,
            )


def test_process_kept_restores_after_an_error() -> None:
    before = _process_state()
    with pytest.raises(KeyError), process_kept():  # noqa: PT012
        os.environ["LD_PRELOAD"] = "libx.so"
        del os.environ["PATH"]
        torch.backends.cuda.enable_cudnn_sdp(not torch.backends.cuda.cudnn_sdp_enabled())
        torch.set_num_threads(1)
        torch.set_num_threads = lambda _: None  # type: ignore[assignment]
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002
        random.seed(1)
        raise KeyError
    assert _process_state() == before


def settings_of(
    model_dir: Path, device: str, rank: int, *, max_num_seqs: int | None = None, **options: Any
) -> dict[str, Any]:
    return engine_settings(
        model_dir,
        EngineOptions(**options),
        dtype=torch.bfloat16,
        device=torch.device(device),
        max_model_len=CONTEXT,
        max_num_seqs=max_num_seqs,
    ) | lora_settings(LoraSection(rank=rank), torch.bfloat16)


@pytest.mark.parametrize(
    ("device", "dtype", "asked", "expected"),
    [
        ("cpu", torch.float32, None, True),
        ("cpu", torch.float32, False, False),
        ("cpu", torch.bfloat16, None, False),
        ("cuda", torch.float32, None, True),
        ("cuda", torch.float32, True, True),
        ("cuda", torch.bfloat16, None, False),
    ],
)
def test_where_adapters_are_merged(
    device: str, dtype: torch.dtype, asked: bool | None, expected: bool
) -> None:
    merges = merges_adapter(
        asked,
        LoraSection(),
        dtype=dtype,
        device=torch.device(device),
    )
    assert merges is expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_merge_that_would_round_is_refused(device: str) -> None:
    with pytest.raises(UserError, match=r"merge_adapter=true with torch.bfloat16: the sum"):
        merges_adapter(True, LoraSection(), dtype=torch.bfloat16, device=torch.device(device))
    full = LoraSection(mode="full")
    assert not merges_adapter(True, full, dtype=torch.bfloat16, device=torch.device(device))


@pytest.mark.parametrize(
    ("num_seqs", "expected"),
    [
        (1, [1, 2]),
        (6, [1, 2, 4, 6, 8, 12]),
        (100, [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 100, 112, 128, 160, 192, 200]),
    ],
)
def test_sizes_of_cuda_graphs(num_seqs: int, expected: list[int]) -> None:
    assert graph_sizes(num_seqs) == expected


@pytest.mark.parametrize("num_seqs", [256, 1024])
def test_a_batch_is_not_filled_up_by_much(num_seqs: int) -> None:
    sizes = graph_sizes(num_seqs)
    assert len(sizes) == 21  # vLLM's own list has 51
    assert sizes[-1] == 512
    for low, high in itertools.pairwise(sizes):
        assert high - low <= max(1, low if low < 16 else low / 2 if low < 64 else low / 4)


def test_engine_settings(model_dir: Path) -> None:
    ranks = {rank: settings_of(model_dir, "cpu", rank)["max_lora_rank"] for rank in (1, 2, 8, 300)}
    assert ranks == {1: 1, 2: 8, 8: 8, 300: 320}
    cpu = settings_of(model_dir, "cpu", 1)
    assert cpu["enforce_eager"]
    assert cpu["lora_dtype"] == torch.bfloat16
    assert cpu["dtype"] == "bfloat16"
    gpu = settings_of(model_dir, "cuda", 1, memory_fraction=0.3)
    assert not gpu["enforce_eager"]
    assert gpu["gpu_memory_utilization"] == 0.3
    assert "kv_cache_memory_bytes" not in gpu
    fixed = settings_of(model_dir, "cuda", 1, cache_bytes=2**30)
    assert fixed["kv_cache_memory_bytes"] == 2**30
    assert gpu["compilation_config"] == {
        "cudagraph_specialize_lora": True,
        "cudagraph_capture_sizes": graph_sizes(256),
    }
    assert gpu["enable_sleep_mode"]
    assert "enable_sleep_mode" not in cpu  # which vLLM refuses there
    assert (gpu["max_loras"], gpu["enable_prefix_caching"]) == (1, True)
    assert "attention_backend" not in gpu
    asked = settings_of(model_dir, "cuda", 1, attention_backend="TRITON_ATTN")
    assert asked["attention_backend"] == "TRITON_ATTN"
    assert "compilation_config" not in cpu
    assert settings_of(model_dir, "cuda", 1, eager=True, max_num_seqs=7)["max_num_seqs"] == 7
    assert "max_num_batched_tokens" not in gpu
    # vLLM refuses more sequences than tokens in a step.
    many = settings_of(model_dir, "cuda", 1, max_num_seqs=5000)
    assert many["max_num_batched_tokens"] == 5000


@pytest.fixture
def able_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler, and a folder with Python's headers, whatever this machine has."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setenv("CXX", sys.executable)  # a program that is there
    monkeypatch.setattr(vllm_settings.sysconfig, "get_path", lambda name: str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("num_steps", "options", "expected"),
    [
        (20, {"max_tokens": 48}, False),  # the quickstart: 960 decoding steps
        (199, {"max_tokens": 100}, False),
        (200, {"max_tokens": 100}, True),
        (100, {"max_tokens": 100, "num_prompts": 17}, True),  # two batches a step
        (100, {"max_tokens": 100, "num_prompts": 17, "max_num_seqs": 256}, False),
    ],
)
def test_long_jobs_are_worth_compiling(
    num_steps: int,
    options: dict[str, int],
    expected: bool,
    able_to_compile: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = SamplingSection(**options)
    assert vllm_settings.is_worth_compiling(section, num_steps) is expected
    (able_to_compile / "Python.h").rename(able_to_compile / "other.h")
    assert not vllm_settings.is_worth_compiling(section, num_steps)
    (able_to_compile / "other.h").rename(able_to_compile / "Python.h")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not vllm_settings.is_worth_compiling(section, num_steps)


@pytest.mark.usefixtures("able_to_compile")
def test_a_job_asks_for_compilation_once_and_only_where_the_config_leaves_it_open() -> None:
    notes: list[str] = []
    long = SamplingSection(max_tokens=1000)

    def eager(section: SamplingSection, device: str, num_steps: int = 1000) -> bool | None:
        job = RunConfig(sampling=section)
        return with_compilation(job, torch.device(device), num_steps, notes.append).eager

    assert eager(long, "cpu") is False
    assert len(notes) == 1
    assert "sampling.eager=true" in notes[0]
    assert eager(long, "cpu", num_steps=0) is None  # an evaluation
    assert eager(long, "cuda") is None
    assert eager(long.model_copy(update={"eager": True}), "cpu") is True
    assert eager(long.model_copy(update={"backend": "torch"}), "cpu") is None
    elsewhere = RunConfig(sampling=long, resources=ResourcesSection(servers=("http://one",)))
    assert with_compilation(elsewhere, torch.device("cpu"), 1000, notes.append).eager is None
    assert len(notes) == 1


@pytest.mark.usefixtures("vllm_installed")
def test_rank_slots_are_vllms() -> None:
    with process_kept():
        from vllm.config.lora import MaxLoRARanks
    assert get_args(MaxLoRARanks) == RANK_SLOTS


def test_cpu_cache_bytes() -> None:
    config = GPT2Config(n_layer=2, n_head=4, n_embd=64)  # whose names are not the usual ones
    # A token: keys and values x 2 layers x 4 heads x 16 x 4 bytes = 1024. 64 tokens are 2 blocks of
    # 32, and a third is vLLM's own: 96 x 1024 bytes a sequence.
    size: Callable[[int], int] = lambda free: cpu_cache_bytes(  # noqa: E731
        config, dtype=torch.float32, max_model_len=64, num_seqs=10, free_bytes=free
    )
    assert size(1 << 40) == 10 * 96 * 1024
    assert size(1 << 20) == 1 << 18
    with pytest.raises(UserError, match="one sequence of 64 tokens"):
        size(1 << 18)
