"""The reference sampler: distribution, seeds, log-probs, ends, and the liveness checks on it."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tokenizers import AddedToken

from rl_lora.adapters.files import save_adapter
from rl_lora.config import DataSection, ModelSection
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.models.resolve import load_tokenizer, resolve_model
from rl_lora.policy import Policy
from rl_lora.rollouts import sample_groups
from rl_lora.sampler import BASE_VERSION
from rl_lora.samplers.end_tokens import end_token_ids
from rl_lora.samplers.liveness import check_at_start, check_step, tolerances
from rl_lora.samplers.torch_sampler import TorchSampler, _draw
from rl_lora.seeds import mix_seed, sample_seed, sample_seeds
from rl_lora.types import Completion, Prompt, SampleParams, SeededParams
from tests.helpers.fakes import render_text
from tests.helpers.tiny_models import make_policy, random_llama, shake


class IdTokenizer:
    """Writes token ids as text."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(str(i) for i in ids)


TOKENIZER: Any = IdTokenizer()
PROMPTS = [
    Prompt("p/0", "s", "q", "1", (5, 6, 7)),
    Prompt("p/1", "s", "q", "1", (11,)),
    Prompt("p/2", "s", "q", "1", (3, 4, 5, 6, 7, 8)),
]


def make(tmp_path: Path, end_ids: tuple[int, ...] = (2,), **options: int) -> TorchSampler:
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy)
    sampler = TorchSampler(
        policy, tokenizer=TOKENIZER, end_token_ids=end_ids, max_model_len=64, **options
    )
    sampler.set_adapter(save_adapter(policy, tmp_path / "adapters", version=4, run_name="r"))
    return sampler


@pytest.mark.faults
def test_where_memory_runs_out_fewer_sequences_are_decoded_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, params = make(tmp_path), SampleParams(2, max_tokens=6, temperature=1.0, seed=5)
    prompts_N = [replace(PROMPTS[n % 3], prompt_id=f"p/{n}") for n in range(7)]
    expected = sampler.sample(prompts_N, params)
    model, sizes = sampler.policy.model, list[int]()
    forward = model.forward

    def limited(input_ids: torch.Tensor, **options: Any) -> Any:
        sizes.append(len(input_ids))
        if len(input_ids) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", limited)
    fits, indices = 4, list[int]()  # the second call, with two samples of each prompt, is too large
    found = sampler.sample(prompts_N, params, lambda index, _: indices.append(index))
    assert indices == list(range(7))
    assert sizes[:3] == [7, 3, 6]
    assert sampler.max_num_seqs == 2  # one prompt at a time
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert one.token_ids == other.token_ids
        assert one.sampler_logprobs_T == pytest.approx(other.sampler_logprobs_T, abs=1e-5)
    fits = 1
    with pytest.raises(torch.OutOfMemoryError):
        sampler.sample(prompts_N[:1], params)


def test_logprobs_are_the_policys_own(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    params = SampleParams(num_samples=4, max_tokens=12, temperature=0.8, seed=3)
    groups = sampler.sample(PROMPTS, params)
    for prompt, completions in zip(PROMPTS, groups, strict=True):
        for completion in completions:
            ids = [*prompt.token_ids, *completion.token_ids]
            with torch.no_grad():
                logits = sampler.policy.model(input_ids=torch.tensor([ids])).logits[0] / 0.8
            start = len(prompt.token_ids) - 1
            logprobs = logits.log_softmax(-1)[start:-1].gather(
                -1, torch.tensor(completion.token_ids).unsqueeze(-1)
            )
            expected = logprobs.squeeze(-1).tolist()
            assert completion.sampler_logprobs_T == pytest.approx(expected, abs=1e-5)
            assert completion.adapter_version == 4


def test_one_seed_one_result_and_samples_of_a_group_differ(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    params = SampleParams(num_samples=6, max_tokens=10, temperature=1.0, seed=3)
    first, again = sampler.sample(PROMPTS, params), sampler.sample(PROMPTS, params)
    assert first == again
    assert len({c.token_ids for c in first[0]}) > 1
    other = sampler.sample(PROMPTS, replace(params, seed=4))
    assert [c.token_ids for c in other[0]] != [c.token_ids for c in first[0]]


def test_samples_do_not_depend_on_the_batch_they_are_in(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    params = SampleParams(num_samples=2, max_tokens=10, temperature=1.0, seed=3)
    together = sampler.sample(PROMPTS, params)
    one_by_one = [sampler.sample([p], params)[0] for p in PROMPTS]
    small = make(tmp_path / "again", max_num_seqs=2).sample(PROMPTS, params)
    ids = [[c.token_ids for c in group] for group in together]
    assert [[c.token_ids for c in group] for group in one_by_one] == ids
    assert [[c.token_ids for c in group] for group in small] == ids


def test_a_prompts_own_limit_cuts_the_same_samples(tmp_path: Path) -> None:
    params = SampleParams(num_samples=2, max_tokens=10, temperature=1.0, seed=3)
    sampler = make(tmp_path, end_ids=())
    free = sampler.sample(PROMPTS, params)
    seeds_N_G = tuple(tuple(seeds_G) for seeds_G in sample_seeds(PROMPTS, params))
    limited = SeededParams(2, 10, 1.0, seeds_N_G=seeds_N_G, max_tokens_N=(3, 7, 1))
    small = make(tmp_path / "again", end_ids=(), max_num_seqs=2)  # a prompt at a time
    for found in (sampler.sample(PROMPTS, limited), small.sample(PROMPTS, limited)):
        for group, whole, cap in zip(found, free, (3, 7, 1), strict=True):
            for one, all_of_it in zip(group, whole, strict=True):
                assert one.token_ids == all_of_it.token_ids[:cap]
                assert one.is_truncated
    room = 64 - len(PROMPTS[2].token_ids)
    sampler.sample(PROMPTS, replace(limited, max_tokens=99, max_tokens_N=(3, 7, room)))
    with pytest.raises(UserError, match=r"'p/2' has 6 tokens, and with sampling\.max_tokens=59"):
        sampler.sample(PROMPTS, replace(limited, max_tokens_N=(3, 7, room + 1)))


def test_a_prompt_that_is_twice_in_a_batch_gets_other_samples(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    params = SampleParams(num_samples=2, max_tokens=10, temperature=1.0, seed=3)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]]
    groups = sampler.sample(prompts, params)
    ids = [tuple(c.token_ids for c in group) for group in groups]
    assert len({ids[0], ids[2], ids[3]}) == 3
    assert list(ids[0]) == [c.token_ids for c in sampler.sample(PROMPTS[:1], params)[0]]
    small = make(tmp_path / "again", max_num_seqs=2).sample(prompts, params)  # a prompt at a time
    assert [tuple(c.token_ids for c in group) for group in small] == ids


def test_greedy_takes_the_most_probable_token(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    params = SampleParams(num_samples=1, max_tokens=3, temperature=0.0)
    (completion,) = sampler.sample(PROMPTS[:1], params)[0]
    ids = list(PROMPTS[0].token_ids)
    for token in completion.token_ids:
        with torch.no_grad():
            assert token == int(sampler.policy.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)


def test_the_draw_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.7])
    params = SampleParams(num_samples=1, max_tokens=1, temperature=0.5)
    logits = (probabilities.log() * 0.5).expand(3000, 3)
    uniform = torch.rand(3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    token_S, logprob_S = _draw(logits, uniform, params)
    share = Counter(token_S.tolist())
    for token, probability in enumerate(probabilities.tolist()):
        assert share[token] / 3000 == pytest.approx(probability, abs=0.03)
    assert logprob_S.exp().tolist() == pytest.approx(probabilities[token_S].tolist(), abs=1e-6)


def test_top_p_leaves_the_tail_out() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(200, 3)
    uniform = torch.linspace(0, 0.999, 200, dtype=torch.float64)
    params = SampleParams(num_samples=1, max_tokens=1, temperature=1.0, top_p=0.7)
    token_S, logprob_S = _draw(logits, uniform, params)
    assert set(token_S.tolist()) == {0, 1}
    assert float(logprob_S[0].exp()) == pytest.approx(0.5 / 0.8)


def test_ends_and_truncation(tmp_path: Path) -> None:
    every = tuple(range(97))
    done = make(tmp_path / "a", end_ids=every).sample(PROMPTS, SampleParams(1, 5, 1.0))[0][0]
    assert (len(done.token_ids), done.is_truncated) == (1, False)
    never = make(tmp_path / "b", end_ids=()).sample(PROMPTS, SampleParams(1, 5, 1.0))[0][0]
    assert (len(never.token_ids), never.is_truncated) == (5, True)
    token = never.token_ids[1]
    params = SampleParams(1, 5, 1.0, stop=(f" {token}",))
    stopped = make(tmp_path / "c", end_ids=()).sample(PROMPTS, params)[0][0]
    assert stopped.token_ids == never.token_ids[:2]
    assert not stopped.is_truncated


def test_special_tokens_stop_by_their_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SampleParams(1, 8, 1.0)
    free = make(tmp_path / "a", end_ids=()).sample(PROMPTS, params)[0][0]
    token, next_token = free.token_ids[2:4]
    # Special tokens are no part of the text, as in a tokenizer that skips them.
    special = {token: AddedToken("<end>", special=True)}
    monkeypatch.setattr(IdTokenizer, "added_tokens_decoder", special)

    def decode(self: IdTokenizer, ids: list[int], skip_special_tokens: bool = True) -> str:
        words = ["<end>" if i == token else str(i) for i in ids]
        return " ".join(w for w in words if w != "<end>" or not skip_special_tokens)

    monkeypatch.setattr(IdTokenizer, "decode", decode)
    for name, stop, length in (("b", "<end>", 3), ("c", f"<end> {next_token}", 4)):
        sampler = make(tmp_path / name, end_ids=())
        stopped = sampler.sample(PROMPTS, replace(params, stop=(stop,)))[0][0]
        assert stopped.token_ids == free.token_ids[:length]
        assert not stopped.is_truncated
        assert "<end>" not in stopped.text


def test_a_models_turns_end_where_its_template_ends_them(tmp_path: Path) -> None:
    """As Qwen's base models: the tokenizer's end token is another one."""
    model_dir = tmp_path / "model"
    shutil.copytree(resolve_model(ModelSection(name="tiny-fast")), model_dir)
    for name, key, value in (
        ("tokenizer_config.json", "eos_token", "<|pad|>"),
        ("generation_config.json", "eos_token_id", 0),
    ):
        settings = json.loads((model_dir / name).read_text())
        (model_dir / name).write_text(json.dumps(settings | {key: value}))
    tokenizer = load_tokenizer(model_dir)
    policy = make_policy(model_dir)
    text = render_text("What is 4 + 3?", DataSection(), tokenizer)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    prompt = Prompt("p/0", "s", "q", "7", ids)

    def sample(template: str | None, stop: tuple[str, ...] = ()) -> Completion:
        ends = end_token_ids(model_dir, tokenizer, template)
        sampler = TorchSampler(policy, tokenizer=tokenizer, end_token_ids=ends, max_model_len=96)
        return sampler.sample([prompt], SampleParams(1, 40, 0.0, stop=stop))[0][0]

    answer = sample(None)
    assert re.fullmatch(r"4 \+ \d = (\d+)\n\\boxed\{\1\}", answer.text)
    assert not answer.is_truncated
    assert tokenizer.convert_ids_to_tokens(answer.token_ids[-1]) == "<|end|>"
    assert sample("base").is_truncated
    assert sample("base", ("<|end|>",)) == answer


def test_base_is_sampled_with_the_adapter_off(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    with_adapter = sampler.token_logprobs([PROMPTS[2].token_ids])
    sampler.set_adapter(None)
    base = sampler.token_logprobs([PROMPTS[2].token_ids])
    assert base != with_adapter
    completion = sampler.sample(PROMPTS, SampleParams(1, 4, 1.0))[2][0]
    assert completion.adapter_version == BASE_VERSION
    with sampler.policy.adapter_off(), torch.no_grad():
        ids = [*PROMPTS[2].token_ids, *completion.token_ids]
        logprobs = sampler.policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert completion.sampler_logprobs_T[0] == pytest.approx(
        float(logprobs[5, completion.token_ids[0]]), abs=1e-5
    )


def test_a_prompt_without_room_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompt 'p/0' has 3 tokens"):
        make(tmp_path).sample(PROMPTS, SampleParams(1, 62, 1.0))


def test_seeds_are_distinct_and_fixed() -> None:
    seeds = {sample_seed(7, prompt, i) for prompt in ("a", "b") for i in range(50)}
    assert len(seeds) == 100
    batch = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0], PROMPTS[2]]
    seeds_N_G = sample_seeds(
        batch, SampleParams(num_samples=50, max_tokens=1, temperature=1, seed=7)
    )
    assert len({seed for seeds_G in seeds_N_G for seed in seeds_G}) == 250
    for index in (0, 1, 4):  # a prompt's first place has the samples that it gets by itself
        assert seeds_N_G[index] == [sample_seed(7, batch[index].prompt_id, i) for i in range(50)]
    assert sample_seed(7, "p/0", 3) == mix_seed(7, "p/0", 3) == 6261876295977938468
    assert mix_seed("a", "b") != mix_seed("ab")
    assert mix_seed(1, "x") == mix_seed(1, "x") < 2**63


# --- liveness -------------------------------------------------------------------------------------


def test_a_stale_handle_is_refused(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    old = save_adapter(sampler.policy, tmp_path / "old", version=5, run_name="r")
    shake(sampler.policy)
    with pytest.raises(StaleAdapterError, match="not those of r-v000005"):
        sampler.set_adapter(old)


def test_completions_of_another_version_stop_the_run(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    params = SampleParams(num_samples=1, max_tokens=2, temperature=1.0)
    assert sample_groups(sampler, PROMPTS, params, version=4)
    with pytest.raises(StaleAdapterError, match=r"version \[4\], and version 5 was asked for"):
        sample_groups(sampler, PROMPTS, params, version=5)


class StuckSampler(TorchSampler):
    """Claims to use each version it is given, and keeps sampling from the first."""

    frozen: Policy | None = None

    def token_logprobs(self, token_ids_N):  # type: ignore[no-untyped-def]
        assert self.frozen is not None
        own, self.policy = self.policy, self.frozen
        try:
            return super().token_logprobs(token_ids_N)
        finally:
            self.policy = own


def test_check_at_start_passes_a_live_sampler_and_leaves_no_trace(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    before = {n: t.clone() for n, t in sampler.policy.published_tensors().items()}
    found = check_at_start(sampler.policy, sampler, PROMPTS[::2], tmp_path / "probe", None)
    assert found["probe"] < 1e-5
    assert found["base"] < 1e-5
    assert found["control"] > 0.01
    assert not list((tmp_path / "probe").glob("v*"))
    assert all(torch.equal(before[n], t) for n, t in sampler.policy.published_tensors().items())


def test_check_at_start_catches_a_sampler_that_ignores_its_adapter(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    sampler = StuckSampler(policy, tokenizer=TOKENIZER, end_token_ids=(2,), max_model_len=64)
    sampler.frozen = make_policy(tmp_path / "model")
    with pytest.raises(StaleAdapterError, match="does not serve the learner's weights"):
        check_at_start(policy, sampler, PROMPTS[::2], tmp_path / "probe", None)


def test_check_step_has_limits_by_dtype() -> None:
    check_step({"mismatch/kl": 1e-9, "mismatch/abs_mean": 1e-6}, torch.float32, None)
    with pytest.raises(StaleAdapterError, match=r"KL 5.00e-04"):
        check_step({"mismatch/kl": 5e-4, "mismatch/abs_mean": 1e-6}, torch.float32, None)
    with pytest.raises(StaleAdapterError, match="stale or wrong adapter"):
        check_step({"mismatch/kl": 1e-9, "mismatch/abs_mean": 0.01}, torch.float32, None)
    with pytest.raises(StaleAdapterError, match="nan"):
        check_step({"mismatch/kl": float("nan"), "mismatch/abs_mean": 0.0}, torch.float32, None)
    check_step({"mismatch/kl": 5e-4, "mismatch/abs_mean": 0.01}, torch.bfloat16, None)
    assert tolerances(torch.float32, 4e-4) == pytest.approx((4e-4, 4e-3))
