"""Intervals on published and hand-computed numbers; the exam on a scripted sampler."""

import json
from pathlib import Path

import numpy as np
import pytest

from rewards import load_reward
from rl_lora.config import EvalSection
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.evaluate import (
    EvalResult,
    compare,
    evaluate,
    exam_scores,
    load_result,
    remove_results_after,
)
from rl_lora.intervals import clustered_wilson_interval, wilson_interval
from rl_lora.types import Prompt, RolloutGroup
from tests.fakes import FakeReward, FakeSampler, make_group, make_prompt, make_rollout

GREEDY = EvalSection()
BOXED = r"\boxed{7}"


def run_exam(
    texts: list[str], section: EvalSection = GREEDY, folder: Path | None = None
) -> EvalResult:
    """An exam of one problem a text; the reference is 7."""
    prompts = [make_prompt(f"sum/{index}") for index in range(len(texts))]
    script = {f"sum/{index}": [text] for index, text in enumerate(texts)}
    return evaluate(
        FakeSampler(script), prompts, FakeReward(), section, max_tokens=64, seed=0, folder=folder
    )


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_correct", "num_total", "low", "high"),
    [
        # Newcombe 1998, 'Two-sided confidence intervals for the single proportion', table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # By hand: z = 1.95996, (0.5 + 0.19207 -+ z sqrt(0.025 + 0.0096036)) / 1.38415.
        (5, 10, 0.2366, 0.7634),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval(num_correct: int, num_total: int, low: float, high: float) -> None:
    assert wilson_interval(num_correct, num_total) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_at_another_confidence() -> None:
    # By hand at 50 %: z = 0.67449, z^2 = 0.45494, p = 0.5, n = 4:
    # half = 0.67449 sqrt(0.0625 + 0.0071084) / 1.113735 = 0.159782.
    low, high = wilson_interval(2, 4, confidence=0.5)
    assert (low, high) == pytest.approx((0.340218, 0.659782), abs=1e-5)


def test_wilson_interval_is_symmetric_and_bounded() -> None:
    for num_correct in range(13):
        low, high = wilson_interval(num_correct, 12)
        mirrored_low, mirrored_high = wilson_interval(12 - num_correct, 12)
        assert 0.0 <= low <= num_correct / 12 <= high <= 1.0
        assert (low, high) == pytest.approx((1 - mirrored_high, 1 - mirrored_low))


@pytest.mark.parametrize(
    ("num_correct", "num_total", "confidence"),
    [(0, 0, 0.95), (-1, 10, 0.95), (11, 10, 0.95), (1, 10, 1.0), (1, 10, 0.0)],
)
def test_wilson_interval_refuses(num_correct: int, num_total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(num_correct, num_total, confidence)


def test_clustered_interval_of_single_samples_is_wilsons() -> None:
    assert clustered_wilson_interval([1, 0, 0, 1, 0], 1) == pytest.approx(wilson_interval(2, 5))


def test_clustered_interval_counts_repeated_samples_once() -> None:
    # Samples of a problem agree: 4 samples each tell no more than one.
    assert clustered_wilson_interval([4, 0, 0, 4, 0], 4) == pytest.approx(wilson_interval(2, 5))
    assert clustered_wilson_interval([0] * 20, 4) == wilson_interval(0, 20)
    assert clustered_wilson_interval([4] * 20, 4) == wilson_interval(20, 20)


def test_clustered_interval_counts_unlike_samples_each() -> None:
    # Every problem has half its samples right: no variance between problems, so N k samples.
    assert clustered_wilson_interval([2, 2, 2], 4) == pytest.approx(wilson_interval(6, 12))


def test_clustered_interval_by_hand() -> None:
    # Shares 1, 0.5, 0.5, 0: mean 0.5, variance 0.5 / 4 = 0.125, so n = 4 * 0.25 / 0.125 = 8.
    assert clustered_wilson_interval([2, 1, 1, 0], 2) == pytest.approx(wilson_interval(4, 8))


def test_clustered_interval_covers_the_truth_where_plain_wilson_does_not() -> None:
    """30 problems of very different difficulty, 8 samples each, 300 exams."""
    rng = np.random.default_rng(0)
    clustered = plain = 0
    for _ in range(300):
        num_correct_N = rng.binomial(8, rng.beta(0.5, 0.5, 30)).tolist()
        low, high = clustered_wilson_interval(num_correct_N, 8)
        clustered += low <= 0.5 <= high
        low, high = wilson_interval(sum(num_correct_N), 240)
        plain += low <= 0.5 <= high
    assert clustered / 300 > 0.91
    assert plain / 300 < 0.75


@pytest.mark.parametrize("num_correct_N", [[], [3], [-1]])
def test_clustered_interval_refuses(num_correct_N: list[int]) -> None:
    with pytest.raises(ValueError, match="no interval"):
        clustered_wilson_interval(num_correct_N, 2)


# --- scores ---------------------------------------------------------------------------------------


def test_exam_scores_by_hand() -> None:
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
    scores = exam_scores(groups)
    assert (scores.num_problems, scores.num_samples, scores.num_correct) == (2, 2, 1)
    assert scores.accuracy == 0.25
    assert scores.format_rate == 0.75
    assert scores.accuracy_formatted == pytest.approx(1 / 3)
    assert scores.pass_at_k == 0.5
    assert scores.tokens_mean == 4.0
    assert scores.truncated_rate == 0.25
    assert scores.statuses == {"no_answer": 1, "ok": 2, "timeout": 1}


def test_majority_takes_the_most_frequent_answer() -> None:
    def group(*answers: str) -> RolloutGroup:
        return RolloutGroup(
            make_prompt(), tuple(make_rollout(float(a == "7"), text=a) for a in answers)
        )

    assert exam_scores([group("7", "8", "7")]).majority_accuracy == 1.0
    assert exam_scores([group("7", "8", "8")]).majority_accuracy == 0.0
    assert exam_scores([group("8", "7")]).majority_accuracy == 0.0  # a tie: the earlier answer
    assert exam_scores([group("", "", "7")]).majority_accuracy == 1.0  # no answer, no vote
    assert exam_scores([group("", "", "")]).majority_accuracy == 0.0


def test_formatted_accuracy_without_formatted_completions_is_none() -> None:
    scores = exam_scores([make_group([1.0])])
    assert scores.accuracy_formatted is None
    assert scores.format_rate == 0.0


@pytest.mark.parametrize("groups", [[], [make_group([])], [make_group([1]), make_group([1, 0])]])
def test_exam_scores_refuses_uneven_groups(groups: list[RolloutGroup]) -> None:
    with pytest.raises(ValueError, match="same number of rollouts"):
        exam_scores(groups)


# --- the exam -------------------------------------------------------------------------------------


def test_evaluate_scores_and_writes(tmp_path: Path) -> None:
    result = run_exam([BOXED, "7", "8", r"\boxed{8}"], folder=tmp_path)
    assert result.accuracy == 0.5
    assert (result.total.accuracy_low, result.total.accuracy_high) == wilson_interval(2, 4)
    assert result.total.format_rate == 0.5
    assert result.total.accuracy_formatted == 0.5
    assert result.interval == "wilson"
    assert load_result(tmp_path / "eval.json") == result
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [row["prompt_id"] for row in rows] == ["sum/0", "sum/1", "sum/2", "sum/3"]
    assert [row["num_correct"] for row in rows] == [1, 1, 0, 0]
    assert rows[0]["samples"][0]["completion"] == BOXED


def test_evaluate_passes_the_sections_settings_on() -> None:
    sampler = FakeSampler(lambda prompt, index: "7")
    section = EvalSection(num_samples=4, temperature=0.6, top_p=0.95, max_tokens=10)
    result = evaluate(
        sampler, [make_prompt()], FakeReward(), section, max_tokens=64, seed=5, stop=("\n\n",)
    )
    params = sampler.calls[0][1]
    assert (params.num_samples, params.temperature, params.top_p) == (4, 0.6, 0.95)
    assert (params.max_tokens, params.seed, params.stop) == (10, 5, ("\n\n",))
    assert result.interval == "clustered_wilson"
    evaluate(sampler, [make_prompt()], FakeReward(), GREEDY, max_tokens=64, seed=5)
    assert sampler.calls[1][1].max_tokens == 64


def test_evaluate_in_chunks_gives_the_same_result_and_shows_progress() -> None:
    prompts = [make_prompt(f"sum/{index}") for index in range(7)]

    def script(prompt: Prompt, index: int) -> str:
        return "7" if (len(prompt.prompt_id) + int(prompt.prompt_id[4:]) + index) % 3 else "8"

    section = EvalSection(num_samples=2, temperature=1.0)
    seen: list[tuple[int, int]] = []
    results = []
    for chunk_samples in (6, 1, 1000):
        sampler = FakeSampler(script)
        results.append(
            evaluate(
                sampler,
                prompts,
                FakeReward(),
                section,
                max_tokens=64,
                seed=0,
                chunk_samples=chunk_samples,
                on_progress=lambda done, total: seen.append((done, total)),
            )
        )
        assert {call[1].seed for call in sampler.calls} == {0}
    assert results[0].total == results[1].total == results[2].total
    assert seen[:4] == [(0, 7), (3, 7), (6, 7), (7, 7)]
    assert seen[-2:] == [(0, 7), (7, 7)]


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


def test_rows_of_finished_chunks_survive_a_crash(tmp_path: Path) -> None:
    def script(prompt: Prompt, index: int) -> str:
        if prompt.prompt_id == "sum/2":
            raise RuntimeError("the engine died")
        return "7"

    prompts = [make_prompt(f"sum/{index}") for index in range(4)]
    with pytest.raises(RuntimeError, match="the engine died"):
        evaluate(
            FakeSampler(script),
            prompts,
            FakeReward(),
            GREEDY,
            max_tokens=64,
            seed=0,
            folder=tmp_path,
            chunk_samples=1,
        )
    assert len((tmp_path / "eval.jsonl").read_text().splitlines()) == 2
    assert not (tmp_path / "eval.json").exists()


def test_hostile_completions_break_no_row(tmp_path: Path) -> None:
    hostile = "\x00\x1b[2J\ud800\u2028\r\n\x9b31m" + r"\boxed{7}"
    result = run_exam([hostile], folder=tmp_path)
    text = (tmp_path / "eval.jsonl").read_text(encoding="ascii")
    assert text.count("\n") == 1
    assert "\x1b" not in text
    completion = json.loads(text)["samples"][0]["completion"]
    assert completion == hostile.replace("\ud800", "\\ud800")
    assert result.accuracy == 1.0


def test_evaluate_refuses_bad_exams(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no problem"):
        run_exam([])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run_exam(["7"], folder=tmp_path / "file")


def test_a_change_of_adapter_during_the_exam_is_an_error() -> None:
    sampler = FakeSampler(lambda prompt, index: "7", adapter_version=3)

    def change(done: int, total: int) -> None:
        sampler.adapter_version += done

    prompts = [make_prompt("sum/0"), make_prompt("sum/1")]
    with pytest.raises(StaleAdapterError, match=r"\[3, 4\]"):
        evaluate(
            sampler,
            prompts,
            FakeReward(),
            GREEDY,
            max_tokens=64,
            seed=0,
            chunk_samples=1,
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
    assert [path.name for path in removed] == ["step_000008.json", "step_000008.jsonl"]
    assert len(list(tmp_path.iterdir())) == 8
    assert remove_results_after(tmp_path / "absent", 0) == []


def test_an_exam_with_the_real_verifier(tmp_path: Path) -> None:
    prompts = [make_prompt(f"sum/{index}") for index in range(4)]
    texts = [r"so \boxed{\frac{14}{2}}", "the answer is 7", "#### 8", "no idea"]
    sampler = FakeSampler({f"sum/{index}": [text] for index, text in enumerate(texts)})
    with load_reward("math") as reward:
        result = evaluate(sampler, prompts, reward, GREEDY, max_tokens=64, seed=0, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert [row["num_correct"] for row in rows] == [1, 1, 0, 0]
    assert result.total.format_rate == 0.25
    assert result.total.accuracy_formatted == 1.0
    assert load_result(tmp_path / "eval.json") == result


# --- before and after -----------------------------------------------------------------------------


def exam_of(num_correct: int, num_total: int) -> EvalResult:
    return run_exam(["7"] * num_correct + ["8"] * (num_total - num_correct))


def test_compare_by_newcombes_table() -> None:
    # Newcombe 1998, 'Interval estimation for the difference', table II, method 10:
    # 56/70 - 48/80 gives 0.0524 to 0.3339; 9/10 - 3/10 gives 0.1705 to 0.8090.
    result = compare(exam_of(48, 80), exam_of(56, 70))
    assert result.difference == pytest.approx(0.2)
    assert (result.difference_low, result.difference_high) == pytest.approx(
        (0.0524, 0.3339), abs=5e-5
    )
    assert result.ratio == pytest.approx(0.8 / 0.6)
    assert not result.are_disjoint
    result = compare(exam_of(3, 10), exam_of(9, 10))
    assert (result.difference_low, result.difference_high) == pytest.approx(
        (0.1705, 0.8090), abs=5e-5
    )


def test_compare_tells_disjoint_intervals_in_both_directions() -> None:
    low, high = exam_of(4, 40), exam_of(20, 40)
    assert compare(low, high).are_disjoint
    assert compare(high, low).are_disjoint
    assert compare(high, low).difference == pytest.approx(-0.4)
    assert compare(exam_of(0, 40), high).ratio is None


def test_compare_refuses_unlike_intervals() -> None:
    before = exam_of(1, 2)
    after = evaluate(
        FakeSampler(lambda prompt, index: "7"),
        [make_prompt()],
        FakeReward(),
        GREEDY,
        max_tokens=64,
        seed=0,
        confidence=0.9,
    )
    with pytest.raises(ValueError, match="do not compare"):
        compare(before, after)
