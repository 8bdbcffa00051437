"""Required accuracy on labelled public cases; skipped if the data is absent."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench_verifier import accuracy, our_judge, read_cases

from rewards import verify

# A gold is repaired and trusted where an answer is not, so these are not symmetric.
ONE_WAY = (
    r"$1 = \zzz = x = 0$",  # a false chain
    r"$\boxed{1}\boxed{2}$",  # two adjacent boxes are two values in a gold
    r"\rho\sin\theta = \sqrt{3}",  # a solution answers an equation, but not conversely
    "$10$",  # 9 + 1 does not answer 10, but 10 answers 9 + 1
    # A gold may be a task, but an unevaluated sum or product does not answer its value.
    r"\sum_{k=1}^{n} k",
    r"\prod_{k=1}^n k",
    r"\\boxed{W(n) = 1 \\text{ and } W(n) = -1",  # an unclosed box
)
LEFT_TO_DO = (r"3 \cdot 4", "10+2", r"\frac{24}{2}+0", r"\max(3,12)", r"12 \pmod{100}")


@pytest.mark.parametrize("name", ["gsm8k_model_solutions.jsonl", "tora_gsm8k.jsonl"])
def test_gsm8k_is_perfect(shared_dir: Path, name: str) -> None:
    assert accuracy(read_cases(shared_dir / "cases" / name), our_judge)["accuracy"] == 1.0


def test_published_gsm8k_solutions_are_perfect(shared_dir: Path) -> None:
    path = shared_dir / "data" / "outputs" / "openai_gsm8k" / "example_model_solutions.jsonl"
    assert accuracy(read_cases(path), our_judge)["accuracy"] == 1.0


def test_math_verify_suite(shared_dir: Path) -> None:
    figures = accuracy(read_cases(shared_dir / "cases" / "math_verify.jsonl"), our_judge)
    assert figures["accuracy"] >= 0.97
    assert figures["false_positives"] == 0


def test_hardverify(shared_dir: Path) -> None:
    figures = accuracy(read_cases(shared_dir / "cases" / "hardverify_math.jsonl"), our_judge)
    assert figures["accuracy"] >= 0.935
    assert figures["false_positives"] == 0


def test_second_round(shared_dir: Path) -> None:
    figures = accuracy(read_cases(shared_dir / "cases" / "round2.jsonl"), our_judge)
    assert figures["accuracy"] >= 0.99
    assert figures["false_positives"] <= 1


def test_swapping_the_sides_changes_no_verdict(shared_dir: Path) -> None:
    changed = []
    for path in sorted((shared_dir / "cases").glob("*.jsonl")):
        for case in read_cases(path):
            gold, answer = case["gold"], case["answer"]
            if case.get("form") == "completion" or gold in ONE_WAY or answer in LEFT_TO_DO:
                continue
            if verify(gold, answer).correct != verify(answer, gold).correct:
                changed.append((gold, answer))
    assert changed == []
