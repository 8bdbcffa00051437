"""The shipped environments, and a job's environment by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rl_lora as rl
from rewards import Score
from rl_lora.config import RunConfig, parse_config
from rl_lora.config.algorithm import user_code
from rl_lora.environments.calculator import Calculator
from rl_lora.environments.load import environment_maker
from rl_lora.environments.protocol import Step, Turn
from rl_lora.environments.retry import Retry
from rl_lora.errors import UserError
from rl_lora.runs.metrics import rollout_metrics
from rl_lora.types import Completion, Episode, Rollout, RolloutGroup
from tests.helpers.fakes import make_group, make_prompt


def config(**environment: Any) -> RunConfig:
    return parse_config({"environment": environment})


@pytest.mark.parametrize(
    ("text", "observation"),
    [
        ("I need <calc>12*37</calc>", "<result>444</result>"),
        ("<calc>1</calc> and <calc>1/3", "<result>1/3</result>"),  # the last one, also without end
        ("<calc>9^9^9^9</calc>", "<result>error: too large</result>"),
        ("<calc>__import__('os')</calc>", "<result>error: not arithmetic</result>"),
        ("<calc>" * 100_000 + "1</calc>", "<result>1</result>"),
        ("<calc>" + "(" * 1_000_000, "<result>error: more than 200 characters</result>"),
        ("The answer is \\boxed{7}.", None),
        ("<calc>3+4</calc> is \\boxed{7}.", None),
        ("\\boxed{0}? No: <calc>3+4</calc>", "<result>7</result>"),
        ("", None),
        ("</calc>", None),
    ],
)
def test_a_calculator(text: str, observation: str | None) -> None:
    environment = Calculator()
    environment.reset(make_prompt(), 0)
    assert environment.step(Turn(text, None, is_truncated=False)) == Step(observation)


def test_retry_tells_wrong_from_missing_and_discounts() -> None:
    environment = Retry(discount=0.5)
    for _ in range(2):  # reset forgets
        environment.reset(make_prompt(), 0)
        wrong = Score(0.1, False, "ok", "8", True, {"math": 0.0, "format": 1.0})
        assert environment.step(Turn("", wrong, is_truncated=False)) == Step(
            "That is not correct. Try again.", wrong
        )
        missing = Score(0.0, False, "no_answer", None, False)
        step = environment.step(Turn("", missing, is_truncated=False))
        assert step == Step("There is no answer in a \\boxed{}. Try again.", missing)
        right = Score(1.0, True, "ok", "7", True, {"math": 1.0})
        step = environment.step(Turn("", right, is_truncated=False))
        assert step == Step(None, Score(0.25, True, "ok", "7", True, {"math": 0.25}))


OWN = """
class Own:
    is_graded = False
    def __init__(self, *, words="no"):
        self.words = words
    def reset(self, prompt, seed): ...
    def step(self, turn): ...
class NoStep:
    is_graded = False
    def reset(self, prompt, seed): ...
class Silent:
    def reset(self, prompt, seed): ...
    def step(self, turn): ...
"""


def test_environments_by_name(write_module: Callable[[str, str], Path]) -> None:
    write_module("my_environments", OWN)
    made = environment_maker(config(name="retry", options={"discount": 0.9}))
    assert isinstance(made(), Retry)
    assert made() is not made()
    own = config(name="my_environments:Own", options={"words": "again"})
    assert environment_maker(own)().words == "again"  # type: ignore[attr-defined]
    assert any("environment.name=my_environments:Own runs code" in one for one in user_code(own))
    for name, options, message in (
        ("calculator", {"digits": 3}, "environment.options of 'calculator': .* takes no arg"),
        ("retry", {"discont": 0.5}, "environment.options of 'retry': .*argument 'discont'"),
        ("retry", {"discount": 0.0}, "discount=0 must be above 0"),
        ("my_environments:NoStep", {}, "has no methods reset and step"),
        ("my_environments:Silent", {}, "set is_graded in the class"),
        ("my_environments:Other", {}, "environment.name"),
    ):
        with pytest.raises(UserError, match=message):
            environment_maker(config(name=name, options=options))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"environment": {"name": "calculater"}}, "did you mean 'calculator'"),
        ({"environment": {"max_turns": 2}}, r"no effect without environment\.name"),
        ({"environment": {"name": "retry", "max_turns": 0}}, r"environment\.max_turns"),
        (
            {
                "environment": {"name": "retry"},
                "resources": {"samplers": 2},
                "sampling": {"max_staleness": 2},
            },
            r"one adapter version, .* sampling\.max_staleness=2; set it to 0",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_config(settings)


@pytest.mark.parametrize("resources", [{"samplers": 2}, {"servers": ["http://a:8000"]}])
def test_turns_may_be_sampled_elsewhere(resources: dict[str, Any]) -> None:
    assert parse_config({"environment": {"name": "retry"}, "resources": resources})


def test_a_record_without_an_environment_reads_back() -> None:
    plain = parse_config({})
    assert parse_config(plain.model_dump()) == plain


def test_metrics_count_what_was_sampled() -> None:
    def rollout(is_sampled: str, texts: tuple[str, ...]) -> Rollout:
        flags = tuple(one == "s" for one in is_sampled)
        zeros = (0.0,) * len(flags)
        episode = Episode(texts, flags, None)
        completion = Completion(tuple(range(len(flags))), "", zeros, False, 0, episode)
        return Rollout(completion, Score(1.0, True, "ok", "7", True))

    rollouts = (rollout("sss---s", ("a", "b", "c")), rollout("ss", ("a",)))
    metrics = rollout_metrics([RolloutGroup(make_prompt(), rollouts)])
    assert metrics["rollouts/completion_tokens"] == 6
    assert (metrics["cot/tokens_mean"], metrics["cot/tokens_max"]) == (3, 4)
    assert metrics["episode/turns_mean"] == 1.5
    assert metrics["episode/several_turns_rate"] == 0.5
    assert metrics["episode/observation_tokens"] == 1.5


def test_metrics_of_other_jobs_say_nothing_of_episodes() -> None:
    assert not [key for key in rollout_metrics([make_group([1.0, 0.0])]) if "episode" in key]


def test_the_public_name() -> None:
    assert rl.Environment.__name__ == "Environment"
