"""Rewards of several terms: weights, sources, and what of a score comes from where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rewards import CombinedReward, FunctionReward, Reward, RewardError, Score, Term, load_reward
from rl_lora.config import load_config
from rl_lora.config.algorithm import user_code
from rl_lora.errors import UserError
from rl_lora.rollouts import check_reward, score_groups
from rl_lora.runs.metrics import rollout_metrics
from rl_lora.scoring import check_sources, make_reward, score_best
from rl_lora.types import Prompt
from tests.helpers.fakes import FakeReward, make_completion


def brevity(completion: str, reference: str) -> float:
    return -float(len(completion))


def levels(completions: list[str], level: list[float | None], **columns: Any) -> list[float]:
    return [float(one or 0) for one in level]


def combined(*terms: tuple[str, Reward, float, tuple[str, ...]]) -> CombinedReward:
    return CombinedReward([Term(*one) for one in terms])


BOTH = combined(
    ("fake", FakeReward(), 1.0, ()), ("brevity", FunctionReward("f", brevity), 0.125, ())
)


def prompt_of(source: str, **columns: Any) -> Prompt:
    return Prompt(f"{source}/0", source, "q", "7", (1, 2), columns=columns)


def test_the_reward_is_the_weighted_sum_and_the_first_term_judges() -> None:
    right, wrong = BOTH.score_batch(["7", "12"], ["7", "7"])
    assert right == Score(0.875, True, "ok", "7", False, terms={"fake": 1.0, "brevity": -1.0})
    assert wrong == Score(-0.25, False, "ok", "12", False, terms={"fake": 0.0, "brevity": -2.0})


def test_of_several_references_the_best_counts() -> None:
    (score,) = score_best(BOTH, ["8"], ["7 ||| 8"])
    assert (score.correct, score.reward) == (True, 0.875)


def test_a_term_is_for_the_sources_that_it_names() -> None:
    reward = combined(
        ("fake", FakeReward(), 1.0, ("sums",)),
        ("levels", FunctionReward("g", levels), 0.5, ("codes", "sums")),
    )
    prompts = [prompt_of("sums", level=4.0), prompt_of("codes", level=2.0)]
    completions = [[make_completion("7", 2), make_completion("8", 2)]] * 2
    sums, codes = score_groups(prompts, completions, reward)
    assert sums.rewards_G == [3.0, 2.0]
    assert sums.terms_G() == {"fake": [1.0, 0.0], "levels": [4.0, 4.0]}
    assert codes.rewards_G == [1.0, 1.0]
    assert codes.terms_G() == {"levels": [2.0, 2.0]}
    assert codes.rollouts_G[0].score.correct  # by its only term, from 1 upwards
    with pytest.raises(ValueError, match="no term of the reward applies to 'other'"):
        score_groups([prompt_of("other", level=1.0)], completions[:1], reward)


def test_every_term_has_its_metrics_by_source() -> None:
    reward = combined(
        ("fake", FakeReward(), 1.0, ()),
        ("brevity", FunctionReward("f", brevity), 0.125, ("sums",)),
    )
    texts = [["7", "12"], ["7", "7"]]
    completions = [[make_completion(text, 2) for text in one] for one in texts]
    groups = score_groups([prompt_of("sums"), prompt_of("codes")], completions, reward)
    metrics = {k: v for k, v in rollout_metrics(groups).items() if k.startswith("reward/")}
    assert metrics["reward/mean"] == pytest.approx((0.875 - 0.25 + 1 + 1) / 4)
    assert metrics["reward/fake/mean"] == 0.75
    assert metrics["reward/fake/mean/sums"] == 0.5
    assert metrics["reward/fake/mean/codes"] == 1.0
    assert metrics["reward/fake/std_in_group"] == 0.25  # 0.5 and 0
    assert metrics["reward/brevity/mean"] == metrics["reward/brevity/mean/sums"] == -1.5
    assert metrics["reward/brevity/std_in_group"] == 0.5
    assert "reward/brevity/mean/codes" not in metrics
    plain = score_groups([prompt_of("sums")], completions[:1], FakeReward())
    assert not [key for key in rollout_metrics(plain) if "fake" in key]


def test_the_mixture_is_in_the_metrics_of_a_job_with_weights() -> None:
    groups = score_groups(
        [prompt_of("sums")] * 3 + [prompt_of("codes")], [[make_completion("7", 2)]] * 4, BOTH
    )
    state = {"epoch": 2, "position": 1, "num_prompts": 4, "owed": []}
    position = {"sources": {"sums": state, "codes": {**state, "epoch": 0}}}
    metrics = rollout_metrics(groups, position)
    assert metrics["data/share/sums"] == 0.75
    assert metrics["data/share/codes"] == 0.25
    assert metrics["data/epochs/sums"] == 2.25
    assert metrics["data/epochs/codes"] == 0.25
    assert not [key for key in rollout_metrics(groups, state) if key.startswith("data/")]


def test_the_format_reward_does_not_look_at_the_answer() -> None:
    with load_reward("format") as reward:
        scores = reward.score_batch([r"so \boxed{8}", "the answer is 7", ""], ["7", "7", "7"])
    assert [score.reward for score in scores] == [1.0, 0.0, 0.0]
    assert [score.status for score in scores] == ["ok", "ok", "no_answer"]


def test_terms_of_a_users_own_score_are_refused() -> None:
    def own(completion: str, reference: str) -> Score:
        return Score(1.0, True, "ok", None, False, terms={"a": 1.0})

    with pytest.raises(RewardError, match=r"list a function for each in reward\.terms"):
        FunctionReward("own", own).score_batch(["x"], ["y"])


# --- the settings ---------------------------------------------------------------------------------


def test_the_terms_of_the_settings(
    write_module: Callable[[str, str], Path], tmp_path: Path
) -> None:
    write_module("own", "def short(completion, reference):\n    return -len(completion) / 10\n")
    path = tmp_path / "job.toml"
    path.write_text(
        """
        [[reward.terms]]
        name = "math"
        [[reward.terms]]
        name = "own:short"
        weight = 0.5
        sources = ["sums"]
        [[reward.terms]]
        name = "format"
        label = "boxed"
        weight = 0
        """
    )
    config = load_config(path)
    with make_reward(config) as reward:
        prompts = [prompt_of("sums"), prompt_of("codes")]
        check_reward(reward, prompts, (5,))
        sums, codes = score_groups(prompts, [[make_completion(r"\boxed{7}", 2)]] * 2, reward)
    assert sums.rewards_G == [pytest.approx(1 - 0.45)]
    assert sums.terms_G() == {"math": [1.0], "short": [-0.9], "boxed": [1.0]}
    assert codes.terms_G() == {"math": [1.0], "boxed": [1.0]}
    (line,) = user_code(config)
    assert line.startswith("reward.terms short=own:short runs code of your own")


def test_a_users_term_is_tried_on_a_problem_of_its_source(
    write_module: Callable[[str, str], Path],
) -> None:
    write_module("broken", "def only_codes(completion, reference):\n    return {}[reference]\n")
    terms = '[{name="math"}, {name="broken:only_codes", sources=["codes"]}]'
    with make_reward(load_config(None, [f"reward.terms={terms}"])) as reward:
        check_reward(reward, [prompt_of("sums")], (5,))
        with pytest.raises(UserError, match="broken:only_codes raised KeyError"):
            check_reward(reward, [prompt_of("sums"), prompt_of("codes")], (5,))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ('[{name="math", sources=["sum"]}]', "no term applies to 'codes'"),
        (
            '[{name="math"}, {name="format", sources=["sum"]}]',
            "'format' is for the source 'sum', which no data set is called; did you mean 'sums'?",
        ),
    ],
)
def test_sources_that_do_not_match_are_refused(terms: str, message: str) -> None:
    with (
        make_reward(load_config(None, [f"reward.terms={terms}"])) as reward,
        pytest.raises(UserError, match=message),
    ):
        check_sources(reward, {"sums"}, {"codes", "sums"})


def test_a_run_may_be_evaluated_on_other_sets() -> None:
    terms = '[{name="math"}, {name="format", sources=["sums"]}]'
    with make_reward(load_config(None, [f"reward.terms={terms}"])) as reward:
        check_sources(reward, set(), {"codes"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['reward.terms=["math", "math"]'], "the name 'math' is there twice; set the term's label"),
        (['reward.terms=["math", "own:mean"]'], "'mean' is a metric of the whole reward; set the"),
        (['reward.terms=["math"]', "reward.name=format"], "has no effect with reward.terms; list"),
        (['reward.terms=["math", "fromat"]'], "unknown reward 'fromat': did you mean 'format'"),
        (['reward.terms=[{name="math", wieght=1}]'], "unknown key 'reward.terms.0.wieght'; did "),
    ],
)
def test_terms_that_make_no_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_reward(load_config(None, overrides))


def test_a_record_of_one_reward_has_no_terms() -> None:
    score = Score(1.0, True, "ok", "7", has_format=True)
    assert "terms" not in score.to_row()
    assert replace(score, terms={"math": 1.0}).to_row()["terms"] == {"math": 1.0}
