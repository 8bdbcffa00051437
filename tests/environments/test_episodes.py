"""The sampler of episodes: on scripted answers, on the learner's own model, and in whole jobs."""

from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rewards import Score
from rl_lora.adapters.files import save_adapter
from rl_lora.batches import whole_sequence
from rl_lora.cli import main
from rl_lora.config import load_config
from rl_lora.environments.bridge import Bridge
from rl_lora.environments.calculator import Calculator
from rl_lora.environments.episodes import EpisodeSampler
from rl_lora.environments.protocol import Step, Turn
from rl_lora.environments.retry import Retry
from rl_lora.errors import EngineError, StaleAdapterError, UserError
from rl_lora.rollouts import score_groups
from rl_lora.sampler import OnGroup, max_tokens_of
from rl_lora.samplers.restarts import RestartingSampler
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.seeds import mix_seed, sample_seeds
from rl_lora.train import train
from rl_lora.types import Adapter, Completion, Prompt, SampleParams, SeededParams
from tests.data.test_chat_template import byte_tokenizer
from tests.helpers.fakes import FakeReward, make_prompt
from tests.helpers.kills import kill_9_at_line
from tests.helpers.tiny_models import make_policy, random_llama, shake
from tests.test_train import ROOT, SMOKE, metrics_of

TOKENIZER = byte_tokenizer()
END = 258  # <|im_end|>
PARAMS = SampleParams(num_samples=2, max_tokens=200, temperature=1.0, seed=3)
PROMPTS = [make_prompt("a", "7"), make_prompt("b", "8")]


class Scripted:
    """Answers by a function of (prompt id, sample, turn); one token a byte, then the end token."""

    def __init__(self, answer: Callable[[str, int, int], str]) -> None:
        self.answer, self.version = answer, 4
        self.calls: list[tuple[list[Prompt], SampleParams]] = []
        self.sample_of: dict[int, tuple[str, int]] = {}  # by the seed of a first turn

    def sample(
        self, prompts_N: Sequence[Prompt], params: SampleParams, on_group: OnGroup | None = None
    ) -> list[list[Completion]]:
        self.calls.append((list(prompts_N), params))
        caps_N, seeds_N_G = max_tokens_of(prompts_N, params), sample_seeds(prompts_N, params)
        if len(self.calls) == 1:
            pairs = zip(prompts_N, seeds_N_G, strict=True)
            self.sample_of = {s: (p.prompt_id, g) for p, G in pairs for g, s in enumerate(G)}
        return [
            [self._completion(seed, cap) for seed in seeds_G]
            for seeds_G, cap in zip(seeds_N_G, caps_N, strict=True)
        ]

    def _completion(self, seed: int, cap: int) -> Completion:
        turn = len(self.calls) - 1
        known = {
            mix_seed(first, "turn", turn) if turn else first: first for first in self.sample_of
        }
        text = self.answer(*self.sample_of[known[seed]], turn)
        ids = [*TOKENIZER.encode(text), END][:cap]
        is_cut = ids[-1] != END
        logprobs = (-0.5 - turn,) * len(ids)
        return Completion(tuple(ids), text[:cap], logprobs, is_cut, self.version)

    def set_adapter(self, adapter: Adapter | None) -> None:
        self.version = -1 if adapter is None else adapter.version

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[0.0] * (len(ids) - 1) for ids in token_ids_N]

    def release_memory(self) -> None: ...

    def close(self) -> None: ...


def calling(prompt_id: str, sample: int, turn: int) -> str:
    """Sample 0 of a answers at once; the others call a calculator once, sample 1 of b twice."""
    num_calls = {("a", 0): 0, ("b", 1): 2}.get((prompt_id, sample), 1)
    return f"<calc>3+{turn}</calc>" if turn < num_calls else "So \\boxed{7}."


def test_later_turns_continue_what_was_sampled() -> None:
    sampler = Scripted(calling)
    delivered: list[tuple[int, list[Completion]]] = []
    episodes = EpisodeSampler(sampler, Calculator, Bridge(TOKENIZER))
    groups = episodes.sample(PROMPTS, PARAMS, lambda n, group: delivered.append((n, group)))
    assert [number for number, _ in delivered] == [0, 1]  # once each, when all have ended
    assert [group for _, group in delivered] == groups
    turns = [[one.episode.num_turns for one in group if one.episode] for group in groups]
    assert turns == [[1, 2], [2, 3]]
    # The first call is that of a job without an environment; the later ones continue.
    (_, first), (second, later), (third, last) = sampler.calls
    assert first == PARAMS
    assert [prompt.prompt_id for prompt in second] == ["a", "b", "b"]
    assert [prompt.prompt_id for prompt in third] == ["b"]
    bridge = Bridge(TOKENIZER).token_ids("<result>3</result>", END)
    said = (*TOKENIZER.encode("<calc>3+0</calc>"), END, *bridge)
    assert second[0].token_ids == (*PROMPTS[0].token_ids, *said)
    assert isinstance(later, SeededParams)
    assert isinstance(last, SeededParams)
    assert later.max_tokens_N == (200 - len(said),) * 3
    seeds = sample_seeds(PROMPTS, PARAMS)
    assert later.seeds_N_G[0] == (mix_seed(seeds[0][1], "turn", 1),)
    assert last.seeds_N_G == ((mix_seed(seeds[1][1], "turn", 2),),)


def test_an_episodes_record() -> None:
    episodes = EpisodeSampler(Scripted(calling), Calculator, Bridge(TOKENIZER))
    done = episodes.sample(PROMPTS[:1], PARAMS)[0][1]
    call, answer = (*TOKENIZER.encode("<calc>3+0</calc>"), END), TOKENIZER.encode("So \\boxed{7}.")
    bridge = Bridge(TOKENIZER).token_ids("<result>3</result>", END)
    assert done.token_ids == (*call, *bridge, *answer, END)
    assert done.is_sampled_T == (
        (True,) * len(call) + (False,) * len(bridge) + (True,) * (len(answer) + 1)
    )
    assert done.num_sampled == len(call) + len(answer) + 1
    assert done.sampler_logprobs_T == (
        (-0.5,) * len(call) + (0.0,) * len(bridge) + (-1.5,) * (len(answer) + 1)
    )
    assert done.text == "So \\boxed{7}."  # what is graded, and not the calculator's words
    assert done.episode is not None
    assert done.episode.texts == ("<calc>3+0</calc>", "<result>3</result>", "So \\boxed{7}.")
    assert (done.adapter_version, done.is_truncated, done.own_score) == (4, False, None)


@pytest.mark.parametrize(
    ("left", "num_turns", "is_truncated"),
    [
        (1000, 2, False),
        (3, 2, True),  # the answer is cut
        (1, 2, True),
        (0, 1, True),  # the observation would leave no room for a turn
    ],
)
def test_all_tokens_of_an_episode_are_within_the_limit(
    left: int, num_turns: int, *, is_truncated: bool
) -> None:
    bridge = Bridge(TOKENIZER)
    before = len(TOKENIZER.encode("<calc>3+0</calc>")) + 1
    limit = before + len(bridge.token_ids("<result>3</result>", END)) + left
    params = dataclasses.replace(PARAMS, max_tokens=limit)
    (_, done), _ = EpisodeSampler(Scripted(calling), Calculator, bridge).sample(PROMPTS, params)
    assert done.episode is not None
    assert (done.episode.num_turns, done.is_truncated) == (num_turns, is_truncated)
    assert len(done.token_ids) <= limit
    assert done.is_sampled_T[-1]
    if left == 0:
        assert len(done.token_ids) == before


def test_the_last_turn_is_not_answered() -> None:
    episodes = EpisodeSampler(Scripted(calling), Calculator, Bridge(TOKENIZER), max_turns=1)
    groups = episodes.sample(PROMPTS, PARAMS)
    for one in (one for group in groups for one in group):
        assert one.episode is not None
        assert one.episode.num_turns == 1
        assert not one.is_truncated
        assert all(one.is_sampled_T)


def trying(prompt_id: str, sample: int, turn: int) -> str:
    """Sample 0 is right at the second try, sample 1 never."""
    return "\\boxed{7}" if (sample, turn) == (0, 1) else "Hm." if turn == 2 else "\\boxed{0}"


def test_retry_scores_each_turn_and_the_last_one_counts() -> None:
    reward = FakeReward()
    episodes = EpisodeSampler(
        Scripted(trying),
        lambda: Retry(discount=0.5),
        Bridge(TOKENIZER),
        max_turns=3,
        reward=reward,
    )
    groups = episodes.sample(PROMPTS[:1], PARAMS)
    assert reward.num_scored == 2 + 2 + 1
    (right, wrong) = groups[0]
    assert right.episode is not None
    assert wrong.episode is not None
    assert right.episode.texts[1::2] == ("That is not correct. Try again.",)
    assert right.own_score == Score(0.5, True, "ok", "7", True)
    assert wrong.episode.num_turns == 3
    (scored,) = score_groups(PROMPTS[:1], groups, reward)
    assert scored.rewards_G == [0.5, 0.0]
    assert reward.num_scored == 5  # not again


def test_a_graded_environment_without_its_own_score_has_the_rewards() -> None:
    class Once(Calculator):
        is_graded: ClassVar[bool] = True

    reward = FakeReward()
    episodes = EpisodeSampler(Scripted(trying), Once, Bridge(TOKENIZER), reward=reward)
    groups = episodes.sample(PROMPTS[:1], PARAMS)
    assert groups[0][0].own_score == Score(0.0, False, "ok", "0", True)
    score_groups(PROMPTS[:1], groups, reward)
    assert reward.num_scored == 2  # never in the thread that scores groups


def test_a_calculators_answer_is_scored_by_the_jobs_reward() -> None:
    groups = EpisodeSampler(Scripted(calling), Calculator, Bridge(TOKENIZER)).sample(
        PROMPTS, PARAMS
    )
    scored = score_groups(PROMPTS, groups, FakeReward())
    assert [group.rewards_G for group in scored] == [[1.0, 1.0], [0.0, 0.0]]


class Broken:
    is_graded: ClassVar[bool] = False

    def reset(self, prompt: Prompt, seed: int) -> None: ...

    def step(self, turn: Turn) -> Any:
        if "boxed" in turn.text:
            raise KeyError("x")
        return "no step"


def test_what_an_environment_does_wrong_is_one_line() -> None:
    for turn, message in ((0, "Broken.step failed: KeyError: 'x'"), (1, "step returned str; it")):
        sampler = Scripted(lambda prompt, sample, _, n=turn: calling("b", sample, n - 1))  # type: ignore[misc]
        if turn == 0:
            sampler = Scripted(lambda prompt, sample, turn: "\\boxed{7}")
        with pytest.raises(UserError, match=message):
            EpisodeSampler(sampler, Broken, Bridge(TOKENIZER)).sample(PROMPTS, PARAMS)


def test_a_version_that_changes_in_between_is_noticed() -> None:
    sampler = Scripted(calling)

    class Switching(Calculator):
        def step(self, turn: Turn) -> Step:
            sampler.version = 5
            return super().step(turn)

    with pytest.raises(StaleAdapterError, match=r"during an episode: \[4, 5\]"):
        EpisodeSampler(sampler, Switching, Bridge(TOKENIZER)).sample(PROMPTS, PARAMS)


def test_a_sampler_that_ignores_the_limit_of_a_turn_is_refused() -> None:
    class Unbounded(Scripted):
        def _completion(self, seed: int, cap: int) -> Completion:
            return super()._completion(seed, 1000)

    limited = dataclasses.replace(PARAMS, max_tokens=140)
    with pytest.raises(UserError, match="must keep to the max_tokens_N"):
        EpisodeSampler(
            Unbounded(lambda *_: f"<calc>{'1+' * 20}1</calc>"), Calculator, Bridge(TOKENIZER)
        ).sample(PROMPTS, limited)


def test_all_processes_make_the_same_number_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler of sharded weights gathers them in each call."""
    monkeypatch.setattr("rl_lora.distributed.world_size", lambda: 2)
    for prompts in ([], PROMPTS):
        sampler = Scripted(calling)
        episodes = EpisodeSampler(sampler, Calculator, Bridge(TOKENIZER), max_turns=4)
        assert len(episodes.sample(prompts, PARAMS)) == len(prompts)
        assert len(sampler.calls) == 4


def test_an_engine_that_fails_in_a_later_turn_samples_the_same_again() -> None:
    """A new engine gets only what is missing of the turn, with its seeds and limits."""

    class Failing(Scripted):
        def sample(
            self, prompts_N: Sequence[Prompt], params: SampleParams, on_group: OnGroup | None = None
        ) -> list[list[Completion]]:
            groups = super().sample(prompts_N, params, on_group)
            for n, group in enumerate(groups):
                if has_failed and n == 1 and len(self.calls) == 2:
                    has_failed.pop()
                    self.calls.pop()
                    raise EngineError("the engine failed")
                if on_group is not None:
                    on_group(n, group)
            return groups

    found, warnings = [], list[str]()
    for has_failed in ([], [True]):  # noqa: B007  # what Failing reads
        engine = Failing(calling)
        restarting = RestartingSampler(
            lambda engine=engine: engine,  # type: ignore[misc]
            max_restarts=1,
            timeout_s=60,
            on_restart=warnings.append,
        )
        episodes = EpisodeSampler(restarting, Calculator, Bridge(TOKENIZER))
        found.append(episodes.sample(PROMPTS, PARAMS))
        assert episodes.num_restarts == len(warnings)
    assert len(warnings) == 1
    assert found[0] == found[1]


class Thrice:
    """Says a few words after each of three turns, other ones for each seed."""

    is_graded: ClassVar[bool] = False

    def reset(self, prompt: Prompt, seed: int) -> None:
        self.words = iter([f"t{seed % 50 + 7} t9", "t8", None])

    def step(self, turn: Turn) -> Step:
        return Step(next(self.words))


class IdTokenizer:
    """Token 5 is the text 't5'."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(f"t{i}" for i in ids)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": [[int(word.strip("t")) for word in text.split()] for text in texts]}


def test_the_learner_scores_an_episode_as_it_was_sampled(tmp_path: Path) -> None:
    policy = make_policy(random_llama(tmp_path / "model"))
    shake(policy)
    tokenizer: Any = IdTokenizer()
    # Every 4th token ends a turn.
    sampler = TorchSampler(policy, tokenizer=tokenizer, end_token_ids=range(2, 97, 4))
    sampler.set_adapter(save_adapter(policy, tmp_path / "adapters", version=4, run_name="r"))
    bridge = Bridge(tokenizer, "base")
    episodes = EpisodeSampler(sampler, Thrice, bridge, max_turns=4)
    params = SampleParams(num_samples=3, max_tokens=40, temperature=0.8, seed=1)
    groups = episodes.sample(PROMPTS, params)
    assert groups == episodes.sample(PROMPTS, params)
    assert groups[0][0] != groups[0][1]
    assert any(one.episode and one.episode.num_turns == 3 for group in groups for one in group)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            ids = [*prompt.token_ids, *one.token_ids]
            expected = _scored(policy, ids, 0.8)[len(prompt.token_ids) - 1 :]
            for found, wanted, is_sampled in zip(
                one.sampler_logprobs_T, expected, one.is_sampled_T, strict=True
            ):
                assert found == pytest.approx(wanted, abs=1e-5) if is_sampled else found == 0


def _scored(policy: Any, token_ids: list[int], temperature: float) -> list[float]:
    """Of tokens 1, 2, ... by the learner's own pass."""
    return list(policy.token_logprobs(whole_sequence(token_ids), temperature)[0].tolist())


# --- whole jobs -----------------------------------------------------------------------------------

RETRY = [
    *("run.num_steps=2", "data.held_out=4", "sampling.num_prompts=2", "sampling.num_samples=4"),
    *("sampling.max_tokens=64", "environment.name=retry", "environment.max_turns=2"),
]


def test_a_job_of_episodes_is_on_policy_resumes_and_leaves_its_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)
    job = [*RETRY, f"run.output_dir={tmp_path}", "environment.options={discount=0.5}"]
    train(load_config(SMOKE, [*job, "run.name=whole"]), quiet=True)
    run = tmp_path / "whole"
    for row in metrics_of(run):
        assert 0 <= row["mismatch/kl"] < 1e-11
        assert row["episode/several_turns_rate"] > 0
        assert row["learn/completion_tokens"] <= row["rollouts/completion_tokens"]
    lines = [json.loads(line) for line in (run / "transcripts.jsonl").open()]
    assert any(len(line["turns"]) == 3 for line in lines)
    assert all(line["completion"] == line["turns"][-1] for line in lines)
    assert {line["reward"] for line in lines} <= {0.0, 0.5, 1.0}

    for num_steps in (1, 2):
        parts = [*job, "run.name=parts", f"run.num_steps={num_steps}"]
        train(load_config(SMOKE, parts), resume=num_steps > 1, quiet=True)
    assert metrics_of(tmp_path / "parts") == metrics_of(run)

    # A run is evaluated with its environment, and with another one it is another evaluation.
    assert main(["eval", str(run), "--name", "again"]) == 0
    problems = [_evaluated(run / "eval" / f"{n}.jsonl.gz") for n in ("step_000002", "again")]
    assert problems[0] == problems[1]
    settings = problems[0][0]["evaluation"]
    assert settings["environment"]["options"] == {"discount": 0.5}
    samples = [sample for problem in problems[0] for sample in problem["samples"]]
    assert {len(sample["turns"]) for sample in samples} == {1, 3}


def _evaluated(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        del row["seconds"]
    return rows


@pytest.mark.long
@pytest.mark.faults
def test_a_killed_job_of_episodes_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    job = [*RETRY, "run.num_steps=4", f"run.output_dir={tmp_path}"]
    train(load_config(SMOKE, [*job, "run.name=whole"]), quiet=True)
    command = [sys.executable, "-m", "rl_lora", "train", "smoke", "--resume", "--quiet"]
    command += [*job, "run.name=killed"]
    kill_9_at_line(command, tmp_path / "killed" / "metrics.jsonl", 2, ROOT)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    for name in ("adapter/adapter_model.safetensors", "transcripts.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
