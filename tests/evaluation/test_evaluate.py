"""Intervals on published and hand-computed numbers; the evaluation on a scripted sampler."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rewards import load_reward
from rl_lora.config import EvalSection
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.evaluation.evaluate import problem_record, remove_results_after
from rl_lora.evaluation.files import read_evaluation
from rl_lora.evaluation.intervals import (
    bootstrap_interval,
    clustered_interval,
    exact_interval,
    pass_at,
)
from rl_lora.evaluation.scores import EvalResult, EvaluationScores, evaluation_scores, load_result
from rl_lora.storage.jsonl import read_lines
from rl_lora.types import Prompt, RolloutGroup
from tests.helpers.evaluations import evaluate
from tests.helpers.fakes import FakeReward, FakeSampler, make_group, make_prompt, make_rollout

GREEDY = EvalSection()
BOXED = r"\boxed{7}"


def run_evaluation(
    texts: list[str], section: EvalSection = GREEDY, folder: Path | None = None
) -> EvalResult:
    """An evaluation with one problem per text; the reference is 7."""
    prompts = [make_prompt(f"sum/{index}") for index in range(len(texts))]
    script = {f"sum/{index}": [text] for index, text in enumerate(texts)}
    return evaluate(
        FakeSampler(script), prompts, FakeReward(), section, max_tokens=64, seed=0, folder=folder
    )


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_correct", "num_total", "confidence"),
    [(0, 0, 0.95), (-1, 10, 0.95), (11, 10, 0.95), (1, 10, 1.0), (1, 10, 0.0)],
)
def test_exact_interval_refuses(num_correct: int, num_total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="no interval"):
        exact_interval(num_correct, num_total, confidence)


@pytest.mark.parametrize(("num_correct", "num_total"), [(0, 30), (1, 30), (13, 200), (30, 30)])
def test_exact_interval_is_scipys_clopper_pearson(num_correct: int, num_total: int) -> None:
    for confidence in (0.9, 0.95):
        expected = stats.binomtest(num_correct, num_total).proportion_ci(confidence, "exact")
        found = exact_interval(num_correct, num_total, confidence)
        assert found == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_exact_interval_of_nothing_is_the_closed_form() -> None:
    # By hand: the upper limit for 0 of n is 1 - 0.025^(1/n).
    assert exact_interval(0, 30) == pytest.approx((0.0, 1 - 0.025 ** (1 / 30)))


def test_exact_interval_is_that_of_statsmodels() -> None:
    module = pytest.importorskip("statsmodels.stats.proportion", reason="needs statsmodels")
    expected = module.proportion_confint(13, 200, alpha=0.05, method="beta")
    assert exact_interval(13, 200) == pytest.approx(expected, abs=1e-9)


def test_clustered_interval_of_single_samples_is_exact() -> None:
    assert clustered_interval([1, 0, 0, 1, 0], 1) == pytest.approx(exact_interval(2, 5))


def test_clustered_interval_counts_repeated_samples_once() -> None:
    # Samples of a problem agree: 4 samples each tell no more than one.
    assert clustered_interval([1, 0, 0, 1, 0], 4) == pytest.approx(exact_interval(2, 5))
    assert clustered_interval([0.0] * 20, 4) == exact_interval(0, 20)
    assert clustered_interval([1.0] * 20, 4) == exact_interval(20, 20)


def test_clustered_interval_counts_independent_samples_separately() -> None:
    # Every problem has half its samples right: no variance between problems, so N k samples.
    assert clustered_interval([0.5, 0.5, 0.5], 4) == pytest.approx(exact_interval(6, 12))


def test_clustered_interval_by_hand() -> None:
    # Shares 1, 0.5, 0.5, 0: mean 0.5, variance 0.5 / 4 = 0.125, so n = 4 * 0.25 / 0.125 = 8.
    assert clustered_interval([1, 0.5, 0.5, 0], 2) == pytest.approx(exact_interval(4, 8))


def test_clustered_interval_covers_the_truth_where_plain_counting_does_not() -> None:
    """30 problems of very different difficulty, 8 samples each, 300 evaluations."""
    rng = np.random.default_rng(0)
    clustered = plain = 0
    for _ in range(300):
        num_correct_N = rng.binomial(8, rng.beta(0.5, 0.5, 30)).tolist()
        low, high = clustered_interval([num / 8 for num in num_correct_N], 8)
        clustered += low <= 0.5 <= high
        low, high = exact_interval(sum(num_correct_N), 240)
        plain += low <= 0.5 <= high
    assert clustered / 300 > 0.93
    assert plain / 300 < 0.8


@pytest.mark.parametrize("shares_N", [[], [1.5], [-0.5]])
def test_clustered_interval_refuses(shares_N: list[float]) -> None:
    with pytest.raises(ValueError, match="no interval"):
        clustered_interval(shares_N, 2)


def test_bootstrap_interval_draws_problems_by_numpys_generator() -> None:
    """Digits in the documentation depend on these draws: they must survive a change of scipy."""
    values_N = np.random.default_rng(1).normal(size=60)
    draws = np.random.default_rng(3).integers(60, size=(10_000, 60))
    expected = np.quantile(values_N[draws].mean(axis=1), [0.025, 0.975])
    assert bootstrap_interval(values_N.tolist(), seed=3) == pytest.approx(expected, abs=1e-12)
    assert bootstrap_interval([2.0, 2.0]) == bootstrap_interval([2.0]) == (2.0, 2.0)


def test_pass_at_by_hand() -> None:
    # 2 of 4 right: pass@1 1/2; pass@2 1 - C(2,2)/C(4,2) = 5/6; pass@3 and pass@4 certain.
    assert [pass_at(2, 4, k) for k in (1, 2, 3, 4)] == pytest.approx([1 / 2, 5 / 6, 1, 1])
    assert pass_at(0, 4, 4) == 0
    for c, k in ((5, 1), (1, 0), (1, 5)):
        with pytest.raises(ValueError, match="no pass@"):
            pass_at(c, 4, k)


# --- scores ---------------------------------------------------------------------------------------


def scores_of(groups: Sequence[RolloutGroup]) -> EvaluationScores:
    return evaluation_scores([problem_record(group) for group in groups])


def test_evaluation_scores_by_hand() -> None:
    groups = [
        RolloutGroup(
            make_prompt("a"),
            (
                make_rollout(1.0, num_tokens=4, has_format=True),
                make_rollout(0.0, num_tokens=8, has_format=True, is_truncated=True),
            ),
        ),
        RolloutGroup(
            make_prompt("b"),
            (
                make_rollout(0.0, num_tokens=2, text="", status="no_answer"),
                make_rollout(0.0, num_tokens=2, status="timeout", has_format=True),
            ),
        ),
    ]
    scores = scores_of(groups)
    assert (scores.num_problems, scores.num_samples, scores.num_correct) == (2, 2, 1)
    assert scores.accuracy == 0.25
    assert scores.format_rate == 0.75
    assert scores.accuracy_formatted == pytest.approx(1 / 3)
    assert scores.pass_at_k == 0.5
    assert scores.tokens_mean == 4.0
    assert scores.truncated_rate == 0.25
    assert scores.statuses == {"no_answer": 1, "ok": 2, "timeout": 1}
    assert (scores.no_answer_rate, scores.timeout_rate) == (0.25, 0.25)
    assert scores.pass_at is not None
    assert {k: e.value for k, e in scores.pass_at.items()} == {"1": 0.25, "2": 0.5}
    # The first problem's answers tie at one vote each, and the earlier one is right.
    assert (scores.majority_low, scores.majority_high) == pytest.approx(exact_interval(1, 2))
    assert scores.correct is not None
    assert scores.wrong is not None
    assert (scores.correct.num, scores.correct.tokens_mean) == (1, 4.0)
    assert (scores.correct.truncated_rate, scores.correct.no_answer_rate) == (0.0, 0.0)
    assert (scores.wrong.num, scores.wrong.tokens_mean, scores.wrong.tokens_p50) == (3, 4.0, 2.0)
    assert scores.wrong.truncated_rate == pytest.approx(1 / 3)
    assert scores.wrong.timeout_rate == pytest.approx(1 / 3)


def test_majority_takes_the_most_frequent_answer() -> None:
    def group(*answers: str) -> RolloutGroup:
        return RolloutGroup(
            make_prompt(), tuple(make_rollout(float(a == "7"), text=a) for a in answers)
        )

    assert scores_of([group("7", "8", "7")]).majority_accuracy == 1.0
    assert scores_of([group("7", "8", "8")]).majority_accuracy == 0.0
    assert scores_of([group("8", "7")]).majority_accuracy == 0.0  # a tie: the earlier answer
    assert scores_of([group("", "", "7")]).majority_accuracy == 1.0  # no answer, no vote
    assert scores_of([group("", "", "")]).majority_accuracy == 0.0


def test_formatted_accuracy_without_formatted_completions_is_none() -> None:
    scores = scores_of([make_group([1.0])])
    assert scores.accuracy_formatted is None
    assert scores.format_rate == 0.0


@pytest.mark.parametrize("groups", [[], [make_group([])], [make_group([1]), make_group([1, 0])]])
def test_evaluation_scores_refuses_uneven_groups(groups: list[RolloutGroup]) -> None:
    with pytest.raises(ValueError, match="same number of samples"):
        scores_of(groups)


# --- the evaluation
# -------------------------------------------------------------------------------------


def test_evaluate_scores_and_writes(tmp_path: Path) -> None:
    result = run_evaluation([BOXED, "7", "8", r"\boxed{8}"], folder=tmp_path)
    assert result.accuracy == 0.5
    assert (result.total.accuracy_low, result.total.accuracy_high) == exact_interval(2, 4)
    assert result.total.format_rate == 0.5
    assert result.total.accuracy_formatted == 0.5
    assert result.interval == "exact"
    assert load_result(tmp_path / "eval.json") == result
    rows = read_lines(tmp_path / "eval.jsonl.gz")
    assert [row["prompt_id"] for row in rows] == ["sum/0", "sum/1", "sum/2", "sum/3"]
    assert [row["num_correct"] for row in rows] == [1, 1, 0, 0]
    assert rows[0]["samples"][0]["completion"] == BOXED


def test_evaluate_samples_with_its_settings() -> None:
    sampler = FakeSampler(lambda prompt, index: "7")
    section = EvalSection(num_samples=4, temperature=0.6, top_p=0.95, max_tokens=10)
    result = evaluate(
        sampler, [make_prompt()], FakeReward(), section, max_tokens=64, seed=5, stop=("\n\n",)
    )
    params = sampler.calls[0][1]
    assert (params.num_samples, params.temperature, params.top_p) == (4, 0.6, 0.95)
    assert (params.max_tokens, params.seed, params.stop) == (10, 5, ("\n\n",))
    assert result.interval == "clustered_exact"
    evaluate(sampler, [make_prompt()], FakeReward(), GREEDY, max_tokens=64, seed=5)
    assert sampler.calls[1][1].max_tokens == 64


def test_evaluate_in_chunks_gives_the_same_result_and_shows_progress() -> None:
    prompts = [make_prompt(f"sum/{index}") for index in range(7)]

    def script(prompt: Prompt, index: int) -> str:
        return "7" if (len(prompt.prompt_id) + int(prompt.prompt_id[4:]) + index) % 3 else "8"

    seen: list[tuple[int, int, int]] = []
    results = []
    for chunk_samples in (6, 1, 1000):
        section = EvalSection(num_samples=2, temperature=1.0, chunk_samples=chunk_samples)
        sampler = FakeSampler(script)
        results.append(
            evaluate(
                sampler,
                prompts,
                FakeReward(),
                section,
                max_tokens=64,
                seed=0,
                on_progress=lambda *now: seen.append(now),
            )
        )
        assert {call[1].seed for call in sampler.calls} == {0}
    assert results[0].total == results[1].total == results[2].total
    assert seen[:4] == [(0, 7, 3), (3, 7, 3), (6, 7, 1), (7, 7, 0)]
    assert seen[-2:] == [(0, 7, 7), (7, 7, 0)]


def test_evaluate_by_source() -> None:
    prompts = [make_prompt("a/0", source="aime24"), make_prompt("b/0", source="data/gsm8k.jsonl")]
    sampler = FakeSampler({"a/0": ["8"], "b/0": ["7"]})
    result = evaluate(sampler, prompts, FakeReward(), GREEDY, max_tokens=64, seed=0)
    assert {source: scores.accuracy for source, scores in result.by_source.items()} == {
        "aime24": 0.0,
        "data/gsm8k.jsonl": 1.0,
    }
    metrics = result.metrics()
    assert metrics["eval/accuracy"] == 0.5
    assert metrics["eval/accuracy/aime24"] == 0.0
    assert metrics["eval/accuracy/data_gsm8k.jsonl"] == 1.0
    assert "eval/accuracy_formatted" not in metrics


SAMPLED = EvalSection(num_samples=2, temperature=1.0, chunk_samples=4)


def sampled_evaluation(
    folder: Path, *, last: int = 9, seed: int = 0, restart: bool = False
) -> EvalResult:
    """Seven problems in chunks of two; the engine dies at problem `last`."""

    def script(prompt: Prompt, index: int) -> str:
        number = int(prompt.prompt_id[4:])
        if number >= last:
            raise RuntimeError("the engine died")
        return "7" if (number + index) % 3 else "8"

    return evaluate(
        FakeSampler(script, adapter_version=5),
        [make_prompt(f"sum/{index}") for index in range(7)],
        FakeReward(),
        SAMPLED,
        max_tokens=64,
        seed=seed,
        folder=folder,
        identity={"policy": "abc"},
        restart=restart,
    )


def unlike_seconds(folder: Path) -> tuple[list[dict[str, object]], dict[str, object]]:
    """(rows, result) of an evaluation without its times."""
    rows = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_lines(folder / "eval.jsonl.gz")
    ]
    result = json.loads((folder / "eval.json").read_text())
    return rows, {key: value for key, value in result.items() if key != "seconds"}


def test_a_killed_evaluation_resumes_and_has_equal_results(tmp_path: Path) -> None:
    sampled_evaluation(tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(RuntimeError, match="the engine died"):
        sampled_evaluation(broken, last=5)
    assert len(read_lines(broken / "eval.jsonl.gz")) == 4
    assert not (broken / "eval.json").exists()
    sampled_evaluation(broken)
    assert unlike_seconds(broken) == unlike_seconds(tmp_path / "whole")


def test_an_evaluation_resumes_from_a_file_torn_at_any_byte(tmp_path: Path) -> None:
    sampled_evaluation(tmp_path / "whole")
    whole = (tmp_path / "whole" / "eval.jsonl.gz").read_bytes()
    torn = tmp_path / "torn"
    torn.mkdir()
    for size in range(0, len(whole), 97):
        (torn / "eval.jsonl.gz").write_bytes(whole[:size])
        sampled_evaluation(torn)
        assert unlike_seconds(torn) == unlike_seconds(tmp_path / "whole")
    assert len(gzip.decompress((torn / "eval.jsonl.gz").read_bytes()).splitlines()) == 7


def test_an_evaluation_of_other_settings_is_refused_or_started_over(tmp_path: Path) -> None:
    first = sampled_evaluation(tmp_path)
    with pytest.raises(
        UserError, match=r"holds an evaluation with seed = 0, not 1; choose another"
    ):
        sampled_evaluation(tmp_path, seed=1)
    assert load_result(tmp_path / "eval.json") == first
    assert sampled_evaluation(tmp_path, seed=1, restart=True).seed == 1
    settings, problems = read_evaluation(tmp_path / "eval.jsonl.gz")
    assert (settings["seed"], settings["policy"], settings["adapter_version"]) == (1, "abc", 5)
    assert len(problems) == 7


def test_hostile_completions_break_no_row(tmp_path: Path) -> None:
    hostile = "\x00\x1b[2J\ud800\u2028\r\n\x9b31m" + r"\boxed{7}"
    result = run_evaluation([hostile], folder=tmp_path)
    text = gzip.decompress((tmp_path / "eval.jsonl.gz").read_bytes()).decode("ascii")
    assert text.count("\n") == 1
    assert "\x1b" not in text
    completion = json.loads(text)["samples"][0]["completion"]
    assert completion == hostile.replace("\ud800", "\\ud800")
    assert result.accuracy == 1.0


def test_evaluate_refuses_bad_evaluations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no problem"):
        run_evaluation([])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_evaluation(["7"], folder=tmp_path / "file")


def test_a_change_of_adapter_during_the_evaluation_is_an_error() -> None:
    sampler = FakeSampler(lambda prompt, index: "7", adapter_version=3)

    def change(done: int, total: int, now: int) -> None:
        sampler.adapter_version += done

    prompts = [make_prompt("sum/0"), make_prompt("sum/1")]
    with pytest.raises(StaleAdapterError, match=r"\[3, 4\]"):
        evaluate(
            sampler,
            prompts,
            FakeReward(),
            EvalSection(chunk_samples=1),
            max_tokens=64,
            seed=0,
            on_progress=change,
        )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"total": {}}', '{"total": 3, "by_source": {}}'])
def test_load_result_refuses_other_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "eval.json").write_text(text)
    with pytest.raises(UserError, match=r"eval\.json is not an evaluation result"):
        load_result(tmp_path / "eval.json")


def test_results_of_steps_that_are_run_again_are_removed(tmp_path: Path) -> None:
    for name in ("base", "step_000000", "step_000004", "step_000008", "step_000008_by_hand"):
        (tmp_path / f"{name}.json").touch()
        (tmp_path / f"{name}.jsonl").touch()
    removed = remove_results_after(tmp_path, 4)
    assert [path.name for path in removed] == ["step_000008.json"]
    assert len(list(tmp_path.iterdir())) == 9
    assert remove_results_after(tmp_path / "absent", 0) == []


def test_an_evaluation_with_the_real_verifier(tmp_path: Path) -> None:
    prompts = [make_prompt(f"sum/{index}") for index in range(4)]
    texts = [r"so \boxed{\frac{14}{2}}", "the answer is 7", "#### 8", "no idea"]
    sampler = FakeSampler({f"sum/{index}": [text] for index, text in enumerate(texts)})
    with load_reward("math") as reward:
        result = evaluate(sampler, prompts, reward, GREEDY, max_tokens=64, seed=0, folder=tmp_path)
    rows = read_lines(tmp_path / "eval.jsonl.gz")
    assert [row["num_correct"] for row in rows] == [1, 1, 0, 0]
    assert result.total.format_rate == 0.25
    assert result.total.accuracy_formatted == 1.0
    assert load_result(tmp_path / "eval.json") == result
