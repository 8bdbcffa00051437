"""Fuzz the verifier with random and mutated answers for a given time.

    python scripts/fuzz_verifier.py --minutes 10

Exits with 1 if there was an exception, a verdict that took too much CPU time in this process, an
unknown status, a text that does not equal itself, or a text accepted for a gold that it does not
contain. Worker time is limited by the pool.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards import STATUSES
from rewards.equality.tiers import decide
from rewards.grading import Grader
from tests.helpers.hostile import hostile_inputs
from tests.helpers.verifier_cases import EQUAL, TRICKS, UNEQUAL, pairs

GOLD = "7919820481.5"  # no mutation produces it
MAX_CPU_S = 0.5  # per comparison, in this process
PIECES = (
    r"\frac \sqrt \boxed{ { } [ ] ( ) ^ _ 0 1 23 4.5 x y n k e i \pi + - * / = < > \le \ne , ; \pm"
    r" \{ \} \begin{pmatrix} \end{pmatrix} \begin{cases} \end{cases} & \\ \text{ \mathrm{ \% % ! |"
    r" \int \sum_ \prod \lim \infty \in \cup \cap \setminus . $ \circ ^\circ \log \sin f( \binom"
    r" \overline \mathbb{R} and or where not answer is cm \left( \right) 10^ 999999999 \mid : '"
    r" \lfloor \rfloor \vec \hat \dots \angle °  ∞ √ ½ ² ① π 。 <think> </think> ####"
).split(" ")


def mutate(text: str, rng: random.Random) -> str:
    """A few random edits: cut, repeat, rotate, insert a piece, change a character."""
    for _ in range(rng.randrange(1, 5)):
        kind = rng.randrange(6)
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.randrange(1, 12))
        if kind == 0:
            text = text[:start] + text[end:]
        elif kind == 1:
            text = text[:end] + text[start:end] * rng.randrange(1, 20) + text[end:]
        elif kind == 2:
            text = text[:start] + rng.choice(PIECES) + text[start:]
        elif kind == 3:
            text = (
                text[:start]
                + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000))))
                + text[end:]
            )
        elif kind == 4:
            text = text[start:] + text[:start]
        else:
            text = f"{text}{rng.choice((',', ' and ', '=', '^', '+', ' '))}{text[start:end]}"
    return text[:3000]


def random_text(rng: random.Random, seeds: list[str]) -> str:
    if rng.random() < 0.7:
        return mutate(rng.choice(seeds), rng)
    return " ".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 40)))


def check(text: str, other: str, grader: Grader, counts: Counter[str]) -> list[str]:
    """Problems with the verdicts on one text, for a fixed gold and for another answer."""
    problems = []
    start_cpu = time.thread_time()
    outcome = decide(GOLD, text, grader.rules)
    # CPU time of this thread: other processes may use the machine for longer than the limit.
    decide_s = time.thread_time() - start_cpu
    counts["slow in process"] += decide_s > 0.1
    if decide_s > MAX_CPU_S:
        problems.append(f"{decide_s:.2f} s in process")
    counts[outcome.verdict.status] += 1
    if outcome.verdict.status not in STATUSES:
        problems.append(f"status {outcome.verdict.status}")
    if outcome.verdict.correct:
        problems.append("accepted for a gold that it does not contain")
    score = grader.score_batch([text], ["42"])[0]
    counts["open"] += outcome.is_open
    decide_s = time.thread_time() - start_cpu
    if decide_s > 2 * MAX_CPU_S:
        problems.append(f"{decide_s:.2f} s of CPU time, also against 42")
    if score.status not in STATUSES:
        problems.append(f"status {score.status}")
    if text.strip():
        if not decide(text, text, grader.rules).verdict.correct:
            problems.append("not equal to itself")
        start_cpu = time.thread_time()
        decide(other, text, grader.rules)
        decide(text, other, grader.rules)
        decide_s = time.thread_time() - start_cpu
        counts["slow in process"] += decide_s > 0.2
        if decide_s > 2 * MAX_CPU_S:
            problems.append(f"{decide_s:.2f} s in process with {other!r}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    seeds = [text for table in (EQUAL, UNEQUAL, TRICKS) for pair in pairs(table) for text in pair]
    seeds += [text[:2000] for text in hostile_inputs().values() if text[:2000].strip()]
    counts: Counter[str] = Counter()
    num_problems = num_texts = 0
    deadline = time.monotonic() + 60 * args.minutes
    with Grader(timeout_s=2.0) as grader:
        while time.monotonic() < deadline:
            text = random_text(rng, seeds)
            num_texts += 1
            try:
                problems = check(text, rng.choice(seeds), grader, counts)
            except Exception as error:  # noqa: BLE001  # the script looks for these
                problems = [f"{type(error).__name__}: {error}"]
            for problem in problems:
                num_problems += 1
                print(f"{problem}: {text!r}", flush=True)
    print(f"{num_texts} texts, {num_problems} problems, {dict(counts)}")
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main())
