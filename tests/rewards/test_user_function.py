"""A user's own reward: both forms, their return values, and the messages if they fail."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards import FunctionReward, RewardError, Score, load_reward
from rl_lora.cli import main
from rl_lora.errors import UserError
from rl_lora.rollouts import check_reward, score_groups
from rl_lora.types import Completion, Prompt

SCORE = Score(0.5, True, "ok", "7", True)


def raises(completion: str, reference: str) -> float:
    raise KeyError("boom")


async def later(completion: str, reference: str) -> float:
    await asyncio.sleep(0)
    return float(len(completion))


async def fails_later(completion: str, reference: str) -> float:
    raise KeyError("boom")


def numbers_of(function: Callable[..., Any], *texts: str) -> list[float]:
    with FunctionReward("m:f", function) as reward:
        return [s.reward for s in reward.score_batch(texts, ["7"] * len(texts))]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (1, 1.0), (0.25, 0.25), (True, 1.0), (Decimal("0.5"), 0.5), (Fraction(1, 4), 0.25),
        (np.float32(0.5), 0.5), (np.int64(2), 2.0), (np.array(0.5), 0.5), (np.bool_(True), 1.0),
        (torch.tensor(0.5), 0.5), (-1e18, -1e18),
    ],
)  # fmt: skip
def test_numbers_of_every_kind_are_rewards(given: Any, value: float) -> None:
    assert numbers_of(lambda c, r: given, "x") == [value]
    assert numbers_of(lambda completions: [given], "x") == [value]


def test_a_score_is_used_unchanged() -> None:
    for function in (lambda c, r: SCORE, lambda completions: [SCORE]):
        assert FunctionReward("m:f", function).score_batch(["x"], ["7"]) == [SCORE]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "returned None (of type NoneType)"), ([1.0], "returned [1.0] (of type list)"),
        ((1.0, {}), "returned (1.0, {}) (of type tuple)"), ({"score": 1.0}, "of type dict"),
        ("1.0", "returned '1.0' (of type str)"), (1j, "of type complex"),
        (float("nan"), "returned nan"), (float("inf"), "returned inf"),
        (-1e308, "returned -1e+308"),
        (10**400, "returned inf"), (torch.tensor(float("nan")), "returned nan"),
        (Score(float("nan"), False, "ok", None, False), "returned nan"),
        (Score(None, False, "ok", None, False), "returned Score("),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_an_unusable_return_value_is_named(given: Any, message: str) -> None:
    for function in (lambda c, r: given, lambda completions: [given]):
        with pytest.raises(RewardError) as caught:
            numbers_of(function, "so\n7")
        error = str(caught.value)
        assert "\n" not in error
        assert error.startswith("reward m:f returned ")
        assert message in error
        assert "for completion 'so\\n7' and reference '7'; it must return a" in error


@pytest.mark.parametrize("function", [raises, fails_later])
def test_an_exception_is_reported_with_its_line(function: Callable[..., Any]) -> None:
    with pytest.raises(RewardError) as caught:
        numbers_of(function, "a", "b")
    assert str(caught.value).startswith("reward m:f raised KeyError: 'boom' (")
    assert "test_user_function.py, line " in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_coroutines_run_concurrently_and_in_one_loop() -> None:
    loops: set[int] = set()
    running = 0
    most = 0

    async def judge(completion: str, reference: str) -> float:
        nonlocal running, most
        loops.add(id(asyncio.get_running_loop()))
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return float(completion)

    with FunctionReward("m:f", judge) as reward:
        for _ in range(2):
            scores = reward.score_batch(["1", "2", "3"], ["7"] * 3)
            assert [score.reward for score in scores] == [1.0, 2.0, 3.0]
    assert most == 3
    assert len(loops) == 1
    assert numbers_of(later, "ab", "c") == [2.0, 1.0]

    async def batch(completions: list[str]) -> list[float]:
        return [float(text) for text in completions]

    assert numbers_of(batch, "1", "2") == [1.0, 2.0]


# --- TRL's form -----------------------------------------------------------------------------------


def trl(prompts: Any, completions: Any, completion_ids: Any, level: Any, **columns: Any) -> Any:
    assert completions == ["a", "bb"]
    assert completion_ids == [[1], [2, 3]]
    assert prompts == ["q", "q"]
    assert level == [3, 3]
    assert columns["topic"] == ["sums", "sums"]
    assert columns["reference"] == ["7", "7"]
    return np.array([len(text) for text in completions], dtype=np.float32)


def conversation(completions: Any, prompts: Any, answer: Any) -> list[float]:
    assert prompts[0][-1]["content"] == "q"
    assert answer == ["7", "7"]
    return [float(len(turns[0]["content"])) for turns in completions]


def prompt_of(**columns: Any) -> Prompt:
    return Prompt("p/0", "s", "q", "7", (1,), columns=columns)


def completions_of(*texts: str) -> list[Completion]:
    ids = {"a": (1,), "bb": (2, 3)}
    return [Completion(ids[text], text, (0.0,), False, 0) for text in texts]


def test_two_threads_call_the_function_one_after_the_other() -> None:
    """Calls at the same time would meet."""
    meeting = threading.Barrier(2)

    async def judge(completion: str, reference: str) -> float:
        with pytest.raises(threading.BrokenBarrierError):
            meeting.wait(0.05)
        meeting.reset()
        return 1.0

    with FunctionReward("m:f", judge) as reward, ThreadPoolExecutor(2) as threads:
        scored = list(threads.map(reward.score_batch, [["a"], ["b"]], [["7"], ["7"]]))
    assert [score.reward for scores in scored for score in scores] == [1.0, 1.0]


def test_the_data_sets_columns_reach_a_function_of_the_batch() -> None:
    plain = prompt_of(question="q", level=3, topic="sums")
    chat = prompt_of(prompt=[{"role": "user", "content": "q"}], ground_truth="7")
    for function, prompt in ((trl, plain), (conversation, chat)):
        reward = FunctionReward("m:f", function)
        assert reward.is_batch
        (group,) = score_groups([prompt], [completions_of("a", "bb")], reward)
        assert group.rewards_G == [1.0, 2.0]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, levels: [1.0], "asks for the column 'levels'; available: answer, "),
        (lambda completions, **_: 1.0, "returned 1.0 for 2 completions, the first 'a', with "),
        (lambda completions, **_: None, "returned None for 2 completions"),
        (lambda completions, **_: [1.0], "returned 1 rewards for 2 completions"),
        (lambda completions, **_: [1.0, None], "returned None (of type NoneType)"),
        (lambda completions, **_: dict[str, float]()["x"], "raised KeyError: 'x'"),
    ],
)
def test_a_failing_batch_is_reported(function: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        score_groups([prompt_of()], [completions_of("a", "bb")], FunctionReward("m:f", function))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_arguments_are_refused_when_the_function_is_loaded() -> None:
    def verl(data_source: str, solution_str: str, ground_truth: str) -> float:
        return 1.0

    with pytest.raises(ValueError, match=r"takes \(data_source, solution_str, ground_truth\): wri"):
        FunctionReward("m:f", verl)
    with pytest.raises(ValueError, match="fn\\(completion, reference\\)"):
        FunctionReward("m:f", lambda completion: 1.0)


# --- the job --------------------------------------------------------------------------------------


def test_only_a_users_function_is_checked_with_a_sample_completion() -> None:
    seen: list[tuple[str, str]] = []

    def keep(completion: str, reference: str) -> float:
        seen.append((completion, reference))
        return 0.0

    check_reward(FunctionReward("m:f", keep), [prompt_of()], (1, 2))
    assert set(seen) == {("The answer is \\boxed{0}.", "7")}
    with load_reward("math") as reward:
        check_reward(reward, [prompt_of()], (1, 2))


FUNCTIONS = """
def none(completion, reference):
    return None

def trl(completions, level, **columns):
    assert columns["topic"] == ["sums"] * len(completions)
    return [float(one) for one in level]
"""


def test_a_job_rejects_a_wrong_reward_before_sampling_and_passes_columns(
    tmp_path: Path,
    write_module: Callable[[str, str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_module("functions_of_mine", FUNCTIONS)
    rows = [
        {"question": f"{n} + 1?", "answer": n + 1, "level": n, "topic": "sums"} for n in range(9)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = [
        "train", "configs/smoke.toml", f"data={data}", "data.held_out=2", "run.num_steps=1",
        f"run.output_dir={tmp_path}", "sampling.backend=torch", "sampling.max_tokens=4",
        "sampling.num_prompts=2", "sampling.num_samples=2", "model.device=cpu",
    ]  # fmt: skip
    assert main([*job, "run.name=a", "reward.name=functions_of_mine:none"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: reward functions_of_mine:none returned None (of type NoneType)" in message
    assert not (tmp_path / "a" / "eval").exists()
    assert main([*job, "run.name=b", "reward.name=functions_of_mine:trl"]) == 0
    lines = (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()
    reward = json.loads(lines[-1])["reward/mean"]
    assert reward in {(a + b) / 2 for a in range(9) for b in range(9)}
