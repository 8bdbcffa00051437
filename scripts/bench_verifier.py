"""Benchmark the verifier, next to Math-Verify (extra `math-verify`) in the same run.

    python scripts/bench_verifier.py --cases CASES.jsonl ... --math-golds TEST.jsonl --json OUT.json

A case is {"gold", "answer", "expected"}; with "form": "completion" the answer is extracted first.
Speed depends on the machine; compare the ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards import RULES, GradingRules, score, verify
from rewards.extraction.extract import extract
from tests.helpers.hostile import hostile_inputs

Case = dict[str, Any]
Judge = Callable[[Case], bool]

MIXED_PAIRS = [
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{\frac{3}{4}}"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"(-\infty, 3) \cup (5, \infty)", r"x < 3 \text{ or } x > 5"),
    (r"\left(\frac{1}{2}, -3\right)", r"(0.5, -3)"),
    (r"\begin{pmatrix}1&\frac12\\3&4\end{pmatrix}", r"\begin{bmatrix}1&0.5\\3&4\end{bmatrix}"),
    (r"3 \pm 2\sqrt{2}", r"3+2\sqrt{2}, 3-2\sqrt{2}"),
    (r"\tan^2 y + 1", r"\sec^2 y"),
    (r"2x+4y-3=0", r"y=-\frac12 x+\frac34"),
    (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
    (r"\{1, 2, 3\}", r"3, 2, 1"),
    (r"96-10\sqrt{21}", r"(5\sqrt{3}-\sqrt{7})^2 + 14"),
    (r"\frac{\pi}{6}", r"30^\circ"),
    (r"6+9i", r"9i+6"),
    (r"\log_2 8", r"3"),
    (r"15\mbox{ cm}^2", r"15"),
    (r"f(x) = 2x + 1", r"2x + 1"),
    (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}"),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
    (r"-\frac{1}{18} e^{-t} + \frac{25}{54} e^{5t}", r"\frac{25 e^{5t}}{54} - \frac{e^{-t}}{18}"),
    (r"x^2+2x+1", r"x^2+2x+2"),
    (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{3}"),
    (r"(1, 2, 3)", r"(1, 2, 4)"),
    (r"[0, 1)", r"[0, 1]"),
    (r"5\sqrt[3]{4}", r"5 \cdot 2^{2/3}"),
]  # fmt: skip


def our_judge(case: Case) -> bool:
    rules = case_rules(case)
    if case.get("form") == "completion":
        return score(case["answer"], case["gold"], rules).correct
    return verify(case["gold"], case["answer"], rules).correct


def case_rules(case: Case) -> GradingRules:
    """The arguments that a suite gives its case, as rules."""
    rules = RULES["default"]
    if "precision" in case:
        rules = replace(rules, tolerance_decimals=int(case["precision"]))
    if str(case.get("strict")) == "False":
        rules = replace(rules, rename_free=True)
    if str(case.get("allow_set_relation_comp")) == "False":
        rules = replace(rules, relations_as_sets=False)
    return rules


def math_verify_judge() -> Judge | None:
    """Math-Verify with its default timeouts; None if it is not installed."""
    try:
        from math_verify import parse as parse_answer
        from math_verify import verify as verify_answer
    except ImportError:
        return None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def boxed(text: str) -> str:
        return text if "$" in text or "\\boxed" in text else f"\\boxed{{{text}}}"

    def judge(case: Case) -> bool:
        is_completion = case.get("form") == "completion"
        answer = case["answer"] if is_completion else boxed(case["answer"])
        return bool(verify_answer(parse_answer(boxed(case["gold"])), parse_answer(answer)))

    return judge


def read_cases(path: Path) -> list[Case]:
    """Cases of a JSONL file; also reads the format of the published GSM8K model solutions."""
    rows = [
        json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()
    ]
    cases: list[Case] = []
    for row in rows:
        if "gold" in row:
            cases.append(row)
            continue
        gold = row["ground_truth"].rsplit("A:", 1)[-1].strip()
        cases += [
            {
                "gold": gold,
                "answer": value["solution"],
                "expected": value["is_correct"],
                "form": "completion",
            }
            for value in row.values()
            if isinstance(value, dict)
        ]
    return cases


def accuracy(cases: list[Case], judge: Judge) -> dict[str, Any]:
    outcomes = [(bool(case["expected"]), judge(case)) for case in cases]
    false_positives = sum(got and not expected for expected, got in outcomes)
    false_negatives = sum(expected and not got for expected, got in outcomes)
    num_positive = sum(expected for expected, _ in outcomes)
    return {
        "num": len(outcomes),
        "accuracy": 1 - (false_positives + false_negatives) / len(outcomes),
        "false_positives": false_positives,
        "false_negatives": false_negatives,
        "recall": 1 - false_negatives / max(num_positive, 1),
    }


def throughput(cases: Iterable[Case], judge: Judge, seconds: float) -> dict[str, float]:
    """Verifications per second, cycling through the cases until the time is up."""
    cases = list(cases)
    times_s: list[float] = []
    start = time.perf_counter()
    for case in itertools.cycle(cases):
        begin = time.perf_counter()
        judge(case)
        end = time.perf_counter()
        times_s.append(end - begin)
        if end - start > seconds and len(times_s) >= min(len(cases), 20):
            break
    ordered = sorted(times_s)
    return {
        "per_second": len(times_s) / sum(times_s),
        "p50_ms": 1000 * statistics.median(ordered),
        "p99_ms": 1000 * ordered[int(0.99 * (len(ordered) - 1))],
    }


def speed_cases(math_golds: Path | None) -> dict[str, list[Case]]:
    rng = random.Random(0)
    prose = "We compute the next term and see that it grows. " * 170
    numbers = [rng.randrange(10**6) for _ in range(3000)]
    kinds: dict[str, list[Case]] = {
        "integers": [{"gold": str(n), "answer": str(n + (n % 3 == 0))} for n in numbers],
        "boxed integers": [
            {"gold": str(n), "answer": f"so \\boxed{{{n}}}", "form": "completion"} for n in numbers
        ],
        "decimals and fractions": [
            {"gold": f"\\frac{{{n}}}{{{8}}}", "answer": str(n / 8)} for n in numbers
        ],
        "mixed LaTeX": [{"gold": gold, "answer": answer} for gold, answer in MIXED_PAIRS],
        "8k characters, boxed": [
            {"gold": str(n), "answer": f"{prose}\\boxed{{{n}}}", "form": "completion"}
            for n in numbers[:200]
        ],
        "8k characters, no answer": [
            {"gold": str(n), "answer": prose + str(n), "form": "completion"} for n in numbers[:200]
        ],
    }
    if math_golds is not None:
        rows = [
            json.loads(line)
            for line in math_golds.read_text(encoding="utf-8").split("\n")
            if line.strip()
        ]
        found = [row.get("answer") or extract(row["solution"]).answer for row in rows]
        golds = [str(gold) for gold in found if gold]
        kinds["MATH golds"] = [{"gold": gold, "answer": gold} for gold in golds]
        kinds["MATH golds, rewritten"] = [
            {"gold": gold, "answer": gold.replace("\\frac", "\\dfrac").replace("+", " + ") + " "}
            for gold in golds
        ]
    return kinds


def hostile_times(judge: Judge, seconds: float) -> dict[str, Any]:
    """The slowest hostile input, and those that the judge accepted for the gold 42."""
    times_s: dict[str, float] = {}
    accepted, failed = [], []
    for name, text in hostile_inputs().items():
        begin = time.perf_counter()
        try:
            if judge({"gold": "42", "answer": text, "form": "completion"}):
                accepted.append(name)
        except Exception as error:  # noqa: BLE001  # an exception is part of the result
            failed.append(f"{name}: {type(error).__name__}")
        times_s[name] = time.perf_counter() - begin
        if sum(times_s.values()) > seconds:
            break
    slowest = max(times_s, key=lambda name: times_s[name])
    return {
        "num": len(times_s),
        "slowest": slowest,
        "slowest_s": times_s[slowest],
        "total_s": sum(times_s.values()),
        "accepted": accepted,
        "raised": failed,
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    judges: dict[str, Judge] = {"ours": our_judge}
    other = None if args.only_ours else math_verify_judge()
    if other is not None:
        judges["math_verify"] = other
    report: dict[str, Any] = {"accuracy": {}, "speed": {}, "hostile": {}}
    for path in args.cases:
        cases = read_cases(path)
        report["accuracy"][path.name] = {
            name: accuracy(cases, judge) for name, judge in judges.items()
        }
        print_row(path.name, report["accuracy"][path.name], "accuracy", "false_positives")
    for kind, cases in speed_cases(args.math_golds).items():
        rows = {name: throughput(cases, judge, args.seconds) for name, judge in judges.items()}
        report["speed"][kind] = rows
        if "math_verify" in rows:
            rows["ratio"] = rows["ours"]["per_second"] / rows["math_verify"]["per_second"]  # type: ignore[assignment]
        print_row(kind, rows, "per_second", "p99_ms")
    for name, judge in judges.items():
        report["hostile"][name] = hostile_times(judge, args.hostile_seconds)
        print(f"hostile, {name}: {report['hostile'][name]}")
    return report


def print_row(title: str, rows: dict[str, Any], *keys: str) -> None:
    parts = []
    for name, row in rows.items():
        if isinstance(row, dict):
            parts.append(f"{name}: " + ", ".join(f"{key} {row[key]:.4g}" for key in keys))
        else:
            parts.append(f"{name} {row:.1f}")
    print(f"{title:28s} " + " | ".join(parts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=Path, nargs="*", default=[], help="JSONL files of cases")
    parser.add_argument("--math-golds", type=Path, help="JSONL with an 'answer' field")
    parser.add_argument("--seconds", type=float, default=3.0, help="per speed measurement")
    parser.add_argument("--hostile-seconds", type=float, default=300.0)
    parser.add_argument("--only-ours", action="store_true", help="skip Math-Verify")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    report = compare(args)
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
