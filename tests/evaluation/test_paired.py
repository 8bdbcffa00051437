"""Paired statistics by hand and against scipy and statsmodels."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rl_lora.cli import main
from rl_lora.config import EvalSection
from rl_lora.errors import UserError
from rl_lora.evaluation.paired import (
    compare_evaluations,
    difference_interval,
    mcnemar_p,
    sign_flip_p,
)
from rl_lora.storage.jsonl import append_compressed, read_lines
from tests.helpers.evaluations import evaluate
from tests.helpers.fakes import FakeReward, FakeSampler, make_prompt


def write_evaluation(folder: Path, name: str, texts: list[list[str]], num_samples: int = 1) -> Path:
    """An evaluation with one problem per list of texts; the reference is 7."""
    section = EvalSection(num_samples=num_samples, temperature=1.0)
    prompts = [make_prompt(f"s/{n}", source=("a", "b")[n % 2]) for n in range(len(texts))]
    sampler = FakeSampler({f"s/{n}": one for n, one in enumerate(texts)})
    options = {"max_tokens": 9, "seed": 0, "folder": folder, "name": name}
    evaluate(sampler, prompts, FakeReward(), section, **options)  # type: ignore[arg-type]
    return folder / f"{name}.jsonl.gz"


def test_mcnemar_by_hand() -> None:
    # 1 against 5: 2 (C(6,0) + C(6,1)) / 2^6 = 14 / 64.
    assert mcnemar_p(1, 5) == pytest.approx(14 / 64)
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(3, 3) == 1
    # 2 against 4: 2 (1 + 6 + 15) / 2^6.
    assert mcnemar_p(2, 4) == mcnemar_p(4, 2) == pytest.approx(44 / 64)


def test_mcnemar_is_that_of_statsmodels() -> None:
    module = pytest.importorskip("statsmodels.stats.contingency_tables", reason="needs statsmodels")
    expected = module.mcnemar([[100, 6], [21, 73]], exact=True).pvalue
    assert mcnemar_p(6, 21) == pytest.approx(expected)


def test_the_sign_flip_test_by_hand_by_enumeration_and_scipy() -> None:
    # Gains 2, 1, -1: sums of the 8 patterns are +-4, +-2, +-2, 0, 0; seen 2, so 6 of 8.
    assert sign_flip_p([2, 1, -1, 0]) == pytest.approx(6 / 8)
    gains = [3, -1, 2, 2, 0, 1, -2, 4]
    sums = [
        abs(sum(s * g for s, g in zip(signs, gains, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(gains))
    ]
    assert sign_flip_p(gains) == pytest.approx(np.mean([one >= abs(sum(gains)) for one in sums]))
    expected = stats.permutation_test(
        (np.array(gains, float),), np.mean, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flip_p(gains) == pytest.approx(expected)
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == 1


@pytest.mark.parametrize(("won", "lost"), [(5, 1), (47, 6), (0, 3), (4, 4)])
def test_with_one_sample_the_sign_flip_test_is_mcnemars(won: int, lost: int) -> None:
    gains = [1] * won + [-1] * lost + [0] * 10
    assert sign_flip_p(gains) == pytest.approx(mcnemar_p(lost, won))


def test_the_difference_s_interval() -> None:
    gains = [1] * 16 + [0] * 24
    low, high, method = difference_interval(gains, 1)
    # Normal approximation: 0.4 -+ 1.96 sqrt(0.4 * 0.6 / 40) = 0.248 to 0.552.
    assert (low, high) == pytest.approx((0.248, 0.552), abs=0.02)
    assert method == "bootstrap"
    low, high, method = difference_interval([0] * 30, 4)
    u = 1 - 0.025 ** (1 / 30)
    assert (low, high) == pytest.approx((-u, u))
    assert method == "exact"
    low, high, _ = difference_interval([4] * 30, 4)
    assert (low, high) == pytest.approx((1 - 2 * u, 1))


def test_two_evaluations_by_hand(tmp_path: Path) -> None:
    first = write_evaluation(tmp_path, "base", [["8", "8"], ["7", "8"], ["7", "7"], ["8", "8"]], 2)
    second = write_evaluation(
        tmp_path, "adapter", [["7", "7"], ["7", "7"], ["7", "8"], ["8", "8"]], 2
    )
    result = compare_evaluations(first, tmp_path / "adapter.json")
    total = result.total
    assert (result.first, result.second, result.has_common_seeds) == ("base", "adapter", True)
    assert (total.first, total.second, total.difference) == (3 / 8, 5 / 8, 0.25)
    assert (total.num_won, total.num_lost, total.num_tied) == (2, 1, 1)
    assert total.p_value == pytest.approx(6 / 8)
    # Majorities (a tie goes to the first answer): wrong, right, right, wrong; right x 3, wrong.
    assert (total.mcnemar.only_first, total.mcnemar.only_second) == (0, 1)
    assert total.mcnemar.verdict == "majority of 2"
    assert total.low < 0.25 < total.high
    assert {name: s.difference for name, s in result.by_source.items()} == {"a": 0.25, "b": 0.25}
    result.save(tmp_path / "paired.json")
    assert compare_evaluations(second, second).total.difference == 0


def test_evaluations_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    first = write_evaluation(tmp_path, "one", [["7"], ["7"]])
    other = write_evaluation(tmp_path, "other", [["7"]])
    with pytest.raises(UserError, match=r"not of the same problems: s/1 differs"):
        compare_evaluations(first, other)
    more = write_evaluation(tmp_path, "more", [["7", "7"], ["7", "7"]], 2)
    with pytest.raises(UserError, match="have 1 and 2 samples per problem"):
        compare_evaluations(first, more)
    with pytest.raises(UserError, match="no such evaluation"):
        compare_evaluations(first, tmp_path / "none")


def test_a_file_of_an_earlier_version_says_what_was_renamed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_evaluation(tmp_path, "one", [["7"], ["8"]])
    first, *others = read_lines(path)
    path.unlink()
    append_compressed(path, [{"exam": first.pop("evaluation"), **first}, *others])
    message = (
        f'rl-lora: error: {path} was written by an earlier version ("exam" is called "evaluation" '
        "now); evaluate again\n"
    )
    assert main(["compare", str(path), str(path)]) == 2
    assert capsys.readouterr().err == message
    assert main(["grade", str(path)]) == 2
    assert capsys.readouterr().err == message
