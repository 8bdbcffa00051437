"""Dynamic sampling: which groups have signal, how many rounds there are, and what a run keeps."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import Score
from rl_lora.adapters.files import load_tensors
from rl_lora.advantages import AdvantageFn, gdpo, group_mean, reinforce_pp
from rl_lora.config import RunConfig, load_config
from rl_lora.config.dynamic import round_size
from rl_lora.data.curriculum import PassRates
from rl_lora.data.stream import PromptStream
from rl_lora.errors import UserError
from rl_lora.overlap import RolloutWorker, make_request, requests, step_params
from rl_lora.penalties import have_signal
from rl_lora.runs.log import RunLog
from rl_lora.samplers.dynamic import StepRollouts, StepSampler, added_up, marked
from rl_lora.seeds import sample_seeds
from rl_lora.state import State
from rl_lora.train import train
from rl_lora.types import Rollout, RolloutGroup
from tests.helpers.fakes import FakeReward, FakeSampler, make_completion, make_group, make_prompt
from tests.test_overlap import adapter
from tests.test_train import metrics_of, smoke

SETTINGS = ["sampling.num_prompts=3", "sampling.num_samples=2"]
DYNAMIC = ["sampling.max_rounds=3", "sampling.oversample=1.5"]


# --- signal ---------------------------------------------------------------------------------------


def signals(
    groups_N: Sequence[RolloutGroup], *settings: str, advantage: AdvantageFn = group_mean
) -> list[bool]:
    return have_signal(advantage, load_config(None, list(settings)), groups_N)


def test_a_group_has_signal_if_its_rewards_differ() -> None:
    groups = [make_group(rewards_G) for rewards_G in ([1, 0], [1, 1], [0, 0], [0.1, 0.1], [0, 2])]
    for advantage in (group_mean, reinforce_pp):
        assert signals(groups, advantage=advantage) == [True, False, False, False, True]


def test_the_penalty_of_length_makes_a_signal() -> None:
    settings = ["sampling.max_tokens=20", "reward.overlong_tokens=8"]
    groups = [make_group([1, 1], lengths_G=lengths) for lengths in ([4, 16], [4, 12], [16, 16])]
    assert signals(groups, *settings) == [True, False, False]
    assert signals(groups) == [False] * 3


def test_a_group_has_no_signal_where_only_what_is_cut_off_differs() -> None:
    def group(*lengths: int) -> RolloutGroup:
        """Right but for those that are cut off."""
        rollouts_G = [
            Rollout(
                make_completion(num_tokens=n, is_truncated=n == 9),
                Score(float(n < 9), n < 9, "ok", "7", has_format=True),
            )
            for n in lengths
        ]
        return RolloutGroup(make_prompt(), tuple(rollouts_G))

    groups = [group(9, 9, 9), group(4, 9, 9), group(4, 5, 6), group(0, 9, 9)]
    assert signals(groups) == [False, True, False, True]
    # The empty completion of the last group is right, and there is no token to learn from.
    assert signals(groups, "algorithm.mask_truncated=true") == [False, True, False, False]


def test_several_rewards_have_signal_although_their_sums_tie() -> None:
    def group(*values: tuple[float, float]) -> RolloutGroup:
        scores = [
            Score(math + form, False, "ok", "7", True, terms={"math": math, "format": form})
            for math, form in values
        ]
        return RolloutGroup(make_prompt(), tuple(Rollout(make_completion(), s) for s in scores))

    groups = [group((1, 0), (0, 1)), group((1, 0), (1, 0)), group((1, 0), (0, 0))]
    settings = ['reward.terms=["math", "format"]', "algorithm.advantage=gdpo"]
    # The first: equal weights cancel out. With others they do not.
    assert signals(groups, *settings, advantage=gdpo) == [False, False, True]
    half = 'reward.terms=["math", {name="format", weight=0.5}]'
    assert signals(groups, half, settings[1], advantage=gdpo) == [True, False, True]
    assert signals(groups, settings[0]) == [False, False, True]


def test_an_advantage_without_a_baseline_says_itself_what_has_signal() -> None:
    def plain(rewards_N_G: list[list[float]]) -> list[list[float]]:
        return rewards_N_G

    groups = [make_group(rewards_G) for rewards_G in ([1, 1], [0, 0], [1, 0])]
    assert signals(groups, advantage=plain) == [True, False, True]


def test_the_first_groups_with_signal_are_learned_from() -> None:
    groups = [make_group([1, 0], prompt_id=str(n)) for n in range(5)]

    def left_out(*has_signal_N: bool, num_prompts: int = 2) -> list[str]:
        return [one.left_out for one in marked(groups, has_signal_N, num_prompts)]

    yes, no = True, False
    assert left_out(no, yes, no, yes, yes) == ["rejected", "", "rejected", "", "surplus"]
    assert left_out(no, no, no, yes, no) == ["rejected", "rejected", "rejected", "", "rejected"]
    assert left_out(no, no, no, no, no) == ["", "", "rejected", "rejected", "rejected"]
    assert left_out(yes, yes, yes, yes, yes, num_prompts=5) == [""] * 5


# --- rounds ---------------------------------------------------------------------------------------


def texts(prompt_id: str, index: int) -> str:
    """Prompts with even numbers are solved by every second sample, the others never."""
    return "7" if int(prompt_id) % 2 == 0 and index % 2 else "8"


class Steps:
    """The steps of a made-up job on numbered prompts, and what was done for them."""

    def __init__(self, *settings: str, num: int = 100, curriculum: PassRates | None = None) -> None:
        self.config = load_config(None, [*SETTINGS, *settings])
        self.sampler = FakeSampler(lambda prompt, index: texts(prompt.prompt_id, index))
        prompts = [make_prompt(str(n)) for n in range(num)]
        self.stream = PromptStream(prompts, seed=0, curriculum=curriculum)
        self.state = State(self.stream, self.stream.state_dict())
        self.phases: list[str] = []
        self.totals: list[int] = []

    def __enter__(self) -> Steps:
        progress = lambda done, total, tokens: self.totals.append(total)  # noqa: E731
        draw = partial(make_request, self.config, self.stream, progress)
        worker = RolloutWorker(
            self.sampler,
            FakeReward(),
            requests(draw, self.state.step, 10),
            max_staleness=self.config.sampling.max_staleness,
        )
        self._rounds = StepSampler(self.config, group_mean, worker, draw, self._phase)
        worker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._rounds.worker.__exit__()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        yield

    def next(self) -> StepRollouts:
        found = self._rounds.sample(self.state.step + 1, adapter(self.state.step))
        self.state.advance(found.groups_N, found.position)
        return found

    def sizes(self) -> list[int]:
        return [len(prompts_N) for prompts_N, _ in self.sampler.calls]


def ids(groups_N: Sequence[RolloutGroup]) -> list[str]:
    return [group.prompt.prompt_id for group in groups_N]


def test_without_it_a_step_is_one_round_and_all_groups_are_learned_from() -> None:
    with Steps() as steps:
        for number in (1, 2):
            found = steps.next()
            assert found.learned_N == found.groups_N
            assert found.own == [0, 1, 2]
            assert found.metrics.keys() == {"system/sampler_s", "system/scorer_s"}
            assert steps.sampler.num_releases == number
    assert (steps.sizes(), steps.totals) == ([3, 3], [6, 6])
    assert steps.phases == ["sample", "score"] * 2


def test_rounds_follow_until_enough_groups_have_signal() -> None:
    with Steps("sampling.max_rounds=20") as steps:
        found = steps.next()
        num_rounds = len(steps.sizes())
        order = [p.prompt_id for prompts_N, _ in steps.sampler.calls for p in prompts_N]
        assert ids(found.groups_N) == order
        assert len(set(order)) == len(order)
        even = [one for one in order if int(one) % 2 == 0]
        assert ids(found.learned_N) == even
        assert len(even) == 3
        assert order[-1] == even[-1]  # a round asks for what is missing, no more
        assert 1 < num_rounds < 20
        assert steps.sampler.num_releases == 1
        assert steps.phases == ["sample", "score"] * num_rounds
        assert steps.totals == [2 * size for size in steps.sizes()]
        assert found.own == list(range(len(order)))
        assert found.position == steps.stream.state_dict()
        assert found.metrics["rollouts/rounds"] == num_rounds
        assert found.metrics["rollouts/rejected_groups"] == len(order) - 3
        assert found.metrics["rollouts/surplus_groups"] == 0
        assert found.metrics["reward/learned_mean"] == 0.5
        seeds = [params.seed for _, params in steps.sampler.calls]
        assert len(set(seeds)) == num_rounds
        assert seeds[0] == step_params(steps.config, 1).seed
        again = steps.next()
        assert not set(ids(again.groups_N)) & set(order)


def test_what_one_round_has_too_many_of_is_surplus() -> None:
    with Steps("sampling.oversample=5") as steps:
        found = steps.next()
    assert steps.sizes() == [15]
    even = [one for one in ids(found.groups_N) if int(one) % 2 == 0]
    assert len(even) > 3
    assert ids(found.learned_N) == even[:3]
    assert found.metrics["rollouts/surplus_groups"] == len(even) - 3
    assert found.metrics["rollouts/rejected_groups"] == 15 - len(even)
    assert steps.sampler.num_releases == 1


def test_rounds_are_limited_and_a_step_learns_from_what_there_is() -> None:
    with Steps("sampling.max_rounds=2") as steps:
        found = [steps.next() for _ in range(10)]
    num_signals = []
    for step in found:
        even = [one for one in ids(step.groups_N) if int(one) % 2 == 0]
        num_signals.append(len(even))
        assert ids(step.learned_N) == (even or ids(step.groups_N))[:3]
        assert step.metrics["rollouts/rounds"] <= 2
    assert min(num_signals) < 3
    with Steps("sampling.max_rounds=2") as steps:
        steps.sampler._script = lambda prompt, index: "8"
        step = steps.next()
    assert steps.sizes() == [3, 3]
    assert ids(step.learned_N) == ids(step.groups_N)[:3]  # none has signal, as without it
    assert step.metrics["rollouts/rejected_groups"] == 3
    assert steps.sampler.num_releases == 1


def test_a_prompt_that_comes_up_again_in_a_step_gets_other_samples() -> None:
    with Steps("sampling.max_rounds=3", num=3) as steps:
        steps.next()
    (first, one), (second, other) = steps.sampler.calls[:2]
    seeds = [
        {p.prompt_id: seeds_G for p, seeds_G in zip(*pair, strict=True)}
        for pair in ((first, sample_seeds(first, one)), (second, sample_seeds(second, other)))
    ]
    shared = seeds[0].keys() & seeds[1].keys()
    assert shared
    assert all(not set(seeds[0][key]) & set(seeds[1][key]) for key in shared)


def test_a_curriculum_counts_steps_and_learns_from_all_groups() -> None:
    rates = PassRates()
    with Steps("sampling.max_rounds=20", "data.curriculum=pass_rate", curriculum=rates) as steps:
        found = [steps.next() for _ in range(3)]
        steps.stream.take(1)  # brings the rates up to date
    saved = rates.state_dict()
    assert (saved["draws"], saved["used"]) == (4, 3)
    sampled = {one for step in found for one in ids(step.groups_N)}
    assert saved["rates"] == {one: 0.0 if int(one) % 2 else 0.5 for one in sampled}


@pytest.mark.parametrize("num", [100, 7])
def test_a_step_that_was_interrupted_or_resumed_is_sampled_again(num: int) -> None:
    settings = (*DYNAMIC, "data.curriculum=pass_rate")
    with Steps(*settings, num=num, curriculum=PassRates()) as whole:
        expected = [ids(whole.next().groups_N) for _ in range(5)]
    with Steps(*settings, num=num, curriculum=PassRates()) as first:
        assert [ids(first.next().groups_N) for _ in range(2)] == expected[:2]
        saved = json.loads(json.dumps(first.state.position))
        first.next()  # is lost
    rest = Steps(*settings, num=num, curriculum=PassRates())
    rest.stream.load_state_dict(saved)
    rest.state = State(rest.stream, rest.stream.state_dict(), step=2)
    with rest:
        assert [ids(rest.next().groups_N) for _ in range(3)] == expected[2:]
    assert rest.sampler.calls == whole.sampler.calls[-len(rest.sampler.calls) :]


def test_sampling_ahead_oversamples() -> None:
    settings = ["sampling.oversample=2", "sampling.max_staleness=2", "sampling.backend=vllm"]
    with Steps(*settings) as steps:
        found = [steps.next() for _ in range(10)]
    assert steps.sizes() == [6] * 10
    for step in found:
        even = [one for one in ids(step.groups_N) if int(one) % 2 == 0]
        assert ids(step.learned_N) == (even or ids(step.groups_N))[:3]
        assert step.metrics["rollouts/rounds"] == 1


def test_seconds_and_counts_of_rounds_are_added_up() -> None:
    assert added_up([{"a": 1.5, "b": 2.0}]) == {"a": 1.5, "b": 2.0}
    assert added_up([{"a": 1.5}, {"a": 2.0, "c": 1.0}, {"a": 0.5}]) == {"a": 4.0, "c": 1.0}


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("oversample", "num_missing", "expected"),
    [(1, None, 20), (1.1, None, 22), (1.5, 3, 5), (1, 1, 1), (1.01, None, 21), (2, 4, 8)],
)
def test_the_size_of_a_round(oversample: float, num_missing: int | None, expected: int) -> None:
    config = load_config(None, ["sampling.num_prompts=20", f"sampling.oversample={oversample}"])
    assert round_size(config.sampling, num_missing) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["sampling.max_rounds=2", "sampling.max_staleness=1"],
            r"sampling.max_rounds=2 .* sampling.max_staleness=1 .*; set sampling.max_staleness=0, "
            "or .* sampling.max_rounds=1 and sampling.oversample=1.5",
        ),
        (["sampling.max_rounds=0"], "sampling.max_rounds = 0: .* greater than or equal to 1"),
        (["sampling.oversample=0.5"], "sampling.oversample = 0.5: .* greater than or equal to 1"),
        (["sampling.oversample=1e9"], "sampling.oversample = .*: .* less than or equal to 100"),
        (["sampling.oversample=nan"], "sampling.oversample = nan: .* finite"),
    ],
)
def test_settings_that_make_no_sense(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, settings)


# --- a run ----------------------------------------------------------------------------------------


def test_transcripts_say_what_was_left_out(tmp_path: Path) -> None:
    groups = [make_group([1, 0]), replace(make_group([1, 1]), left_out="rejected")]
    with RunLog(tmp_path, transcripts_per_step=4) as log:
        log.transcripts(1, groups)
    rows = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").open()]
    assert [row.get("left_out") for row in rows] == [None, None, "rejected", "rejected"]


def run(folder: Path, name: str, num_steps: int, *settings: str, **options: Any) -> None:
    config: RunConfig = smoke(
        folder, f"run.name={name}", f"run.num_steps={num_steps}", *DYNAMIC, *settings
    )
    train(config, quiet=True, **options)


@pytest.mark.slow
def test_a_run_resumes_to_the_same_end_and_counts_its_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl_lora.train.draw_figures", lambda folder: None)
    settings = ["sampling.temperature=0.5", "data.curriculum=pass_rate", "data.train.num_rows=40"]
    settings += ["run.transcripts_per_step=1000"]
    run(tmp_path, "whole", 4, *settings)
    run(tmp_path, "parts", 2, *settings)
    run(tmp_path, "parts", 4, *settings, resume=True)
    rows = metrics_of(tmp_path / "whole")
    assert rows == metrics_of(tmp_path / "parts")
    whole, parts = (load_tensors(tmp_path / name / "adapter") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [(tmp_path / name / "transcripts.jsonl").read_text() for name in ("whole", "parts")]
    assert lines[0] == lines[1]
    marks = Counter(
        (row["step"], row.get("left_out", "")) for row in map(json.loads, lines[0].splitlines())
    )
    for row in rows:
        step = row["step"]
        assert marks[step, "rejected"] == 8 * row["rollouts/rejected_groups"]
        assert marks[step, "surplus"] == 8 * row["rollouts/surplus_groups"]
        assert marks.total() == sum(one["rollouts/num"] for one in rows)
        assert row["learn/updates"] == 1
    assert max(row["rollouts/rounds"] for row in rows) > 1
    assert max(row["rollouts/rejected_groups"] for row in rows) > 1
