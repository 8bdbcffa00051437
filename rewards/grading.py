"""Verdicts and scores: the fast tiers run in this process, the rest in the worker pool."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rewards.equality.tiers import decide
from rewards.extraction.extract import Extraction, extract
from rewards.extraction.thinking import ExtraTags
from rewards.rules import RULES, GradingRules, load_rules, split_tolerance
from rewards.types import Reward, Score, Verdict
from rewards.workers.pool import WorkerPool

DEFAULT = RULES["default"]
MAX_RECENT = 64


class Grader(Reward):
    """Grading rules, an engine and its worker pool. Thread-safe.

    The reward is 1.0 for a correct answer plus `format_weight` for a balanced ``\\boxed{}``.
    `engine` decides what the fast tiers leave open: "verify" or "math_verify".
    """

    def __init__(
        self,
        rules: GradingRules = DEFAULT,
        *,
        engine: str = "verify",
        num_workers: int = 1,
        timeout_s: float = 5.0,
        thinking_tags: ExtraTags = (),
        format_weight: float = 0.0,
    ) -> None:
        self.rules = rules
        self.engine = engine
        self.thinking_tags = thinking_tags
        self.format_weight = format_weight
        self.pool = WorkerPool(num_workers, timeout_s, engine=engine)

    def score_batch(
        self, completions: Sequence[str], references: Sequence[str | None]
    ) -> list[Score]:
        """One Score per completion, in order. Raises ValueError if the lengths differ.

        An empty reference, or one that is not a string, gets status "bad_reference". One that ends
        in "[tolerance 0.1]" accepts values that differ by up to 0.1 (ignored by Math-Verify).
        """
        if len(completions) != len(references):
            raise ValueError(
                f"{len(completions)} completions but {len(references)} references: "
                "give one reference per completion"
            )
        extractions = [extract(completion, self.thinking_tags) for completion in completions]
        verdicts = self.verify_batch(references, extractions)
        return [
            Score(
                reward=float(verdict.correct) + self.format_weight * extraction.has_format,
                correct=verdict.correct,
                status=verdict.status,
                answer=extraction.answer,
                has_format=extraction.has_format,
            )
            for extraction, verdict in zip(extractions, verdicts, strict=True)
        ]

    def verify_batch(
        self, references: Sequence[str | None], extractions: Sequence[Extraction]
    ) -> list[Verdict]:
        """One Verdict per pair; the undecided ones go to the workers together."""
        verdicts: list[Verdict] = []
        requests: list[dict[str, Any]] = []
        waiting: list[int] = []
        for reference, extraction in zip(references, extractions, strict=True):
            gold, rules = reference, self.rules
            if isinstance(gold, str) and gold.endswith("]"):
                gold, rules = split_tolerance(gold, rules)
            if not isinstance(gold, str) or not gold.strip():
                verdicts.append(Verdict(False, "bad_reference"))
                continue
            if extraction.answer is None:
                verdicts.append(Verdict(False, "no_answer"))
                continue
            if self.engine == "verify":
                outcome = decide(gold, extraction.answer, rules, extraction.joined)
                if extraction.listed and not outcome.verdict.correct:
                    listed = decide(gold, ", ".join(extraction.listed), rules)
                    outcome = listed if listed.verdict.correct else outcome
                verdicts.append(outcome.verdict)
                if not outcome.is_open:
                    continue
            else:
                verdicts.append(Verdict(False, "crashed"))
            waiting.append(len(verdicts) - 1)
            requests.append(self._request(gold, extraction.answer, rules))
        if requests:
            for index, response in zip(waiting, self.pool.map(requests), strict=True):
                verdicts[index] = _read_verdict(response)
        return verdicts

    def verify(self, gold: str, answer: str) -> Verdict:
        """Compare one extracted answer with one gold."""
        rules = self.rules
        if gold.endswith("]"):
            gold, rules = split_tolerance(gold, rules)
        outcome = decide(gold, answer, rules)
        if outcome.is_open:
            return _read_verdict(self.pool.request(self._request(gold, answer, rules)))
        return outcome.verdict

    def _request(self, gold: str, answer: str, rules: GradingRules) -> dict[str, Any]:
        return {"op": self.engine, "gold": gold, "answer": answer, "rules": asdict(rules)}

    def close(self) -> None:
        """End the worker processes."""
        self.pool.close()


class FormatReward(Reward):
    """1.0 for a final answer in a balanced, non-empty ``\\boxed{}``, right or wrong; else 0.0."""

    def __init__(self, thinking_tags: ExtraTags = ()) -> None:
        self._thinking_tags = thinking_tags

    def score_batch(
        self, completions: Sequence[str], references: Sequence[str | None]
    ) -> list[Score]:
        """One Score per completion, in order; `correct` says whether the format is right."""
        return [
            Score(
                reward=float(found.has_format),
                correct=found.has_format,
                status="no_answer" if found.answer is None else "ok",
                answer=found.answer,
                has_format=found.has_format,
            )
            for found in (extract(text, self._thinking_tags) for text in completions)
        ]

    def close(self) -> None:
        """Nothing is open."""


def _read_verdict(response: dict[str, Any]) -> Verdict:
    if "error" in response:
        raise RuntimeError(f"reward worker: {response['error']}")
    return Verdict(response["correct"], response["status"], response["tier"])


_SHARED: dict[GradingRules, Grader] = {}
_RECENT: dict[int, Grader] = {}  # by id(rules): hashing the rules takes a microsecond
_SHARED_LOCK = threading.Lock()


def _shared_grader(rules: GradingRules | str) -> Grader:
    """One grader per set of rules; its worker starts when first needed."""
    grader = _RECENT.get(id(rules))
    if grader is not None and grader.rules is rules:
        return grader
    known = load_rules(rules) if isinstance(rules, str) else rules
    with _SHARED_LOCK:
        grader = _SHARED.get(known) or _SHARED.setdefault(known, Grader(known))
        if len(_RECENT) < MAX_RECENT:
            _RECENT[id(grader.rules)] = grader
    return grader


def verify(gold: str, answer: str, rules: GradingRules | str = DEFAULT) -> Verdict:
    """Is the extracted `answer` equal to `gold`? Example: verify("1/2", "0.5").correct."""
    return _shared_grader(rules).verify(gold, answer)


def score(completion: str, reference: str, rules: GradingRules | str = DEFAULT) -> Score:
    """Extract the final answer of a completion and grade it."""
    return score_batch([completion], [reference], rules)[0]


def score_batch(
    completions: Sequence[str],
    references: Sequence[str | None],
    rules: GradingRules | str = DEFAULT,
) -> list[Score]:
    """`score` for a batch, in order. Raises ValueError if the lengths differ."""
    return _shared_grader(rules).score_batch(completions, references)
