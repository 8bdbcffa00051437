"""Run folders for the tests of the report, written as the trainer writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rl_lora.config import RunConfig
from rl_lora.storage import jsonl

SCRIPT = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


def step_metrics(step: int) -> dict[str, Any]:
    share = min(1.0, step / 100)
    return {
        "step": step,
        "rollouts/num": 128,
        "reward/mean": 0.1 + 0.5 * share,
        "reward/correct_mean": 0.5 * share,
        "reward/format_mean": 0.9,
        "reward/mean/sums": 0.2,
        "reward/mean/words": 0.3,
        "groups/solved_all_rate": 0.25,
        "groups/solved_none_rate": 0.25,
        "groups/mixed_rate": 0.5,
        "groups/tied_rate": 0.5,
        "cot/tokens_mean": 40.0,
        "cot/tokens_correct_mean": 35.0,
        "cot/tokens_wrong_mean": 45.0,
        "cot/truncated_rate": 0.1,
        "score/ok": 120,
        "score/no_answer": 8,
        "ratio/p01": 0.999,
        "ratio/p50": 1.0,
        "ratio/p99": 1.001,
        "ratio/mean": 1.0,
        "mismatch/kl": 1e-9 * step,
        "entropy/mean": 0.6,
        "grad/norm": 0.2,
        "time/sample_s": 3.0,
        "time/learn_s": 2.0,
        "time/step_s": 5.5,
        "memory/peak_resident_mb": 5000.0 + step,
        "speed/sample_tokens_per_s": 170.0,
    }


def transcript(step: int, index: int, completion: str, **more: Any) -> dict[str, Any]:
    correct = index % 4 == 0
    return {
        "step": step,
        "prompt_id": f"sums/{index % 10}",
        "source": ("sums", "words")[index % 2],
        "question": "What is $1 + 2$?",
        "reference": "3",
        "completion": completion,
        "reward": float(correct),
        "correct": correct,
        "has_format": True,
        "status": "ok",
        "answer": "3" if correct else "4",
        "tokens": 10 + index,
        "truncated": False,
        "adapter_version": step - 1,
        **more,
    }


def evaluation_scores(
    num_correct: int, num_problems: int = 100, num_samples: int = 1
) -> dict[str, Any]:
    accuracy = num_correct / num_problems
    return {
        "num_problems": num_problems,
        "num_samples": num_samples,
        "num_correct": num_correct * num_samples,
        "accuracy": accuracy,
        "accuracy_low": max(0.0, accuracy - 0.05),
        "accuracy_high": min(1.0, accuracy + 0.05),
        "format_rate": 0.9,
        "accuracy_formatted": accuracy,
        "pass_at_k": accuracy,
        "majority_accuracy": accuracy,
        "tokens_mean": 30.0,
        "truncated_rate": 0.1,
        "statuses": {"ok": num_problems},
    }


def write_evaluation(folder: Path, name: str, step: int | None, num_correct: int) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    result = {
        "total": evaluation_scores(num_correct),
        "by_source": {
            "sums": evaluation_scores(num_correct),
            "words": evaluation_scores(num_correct),
        },
        "step": step,
        "adapter_version": -1 if step is None else step,
        "confidence": 0.95,
        "interval": "wilson",
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 48,
        "seed": 0,
        "seconds": 1.0,
    }
    (folder / "eval" / f"{name}.json").write_text(json.dumps(result))


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(jsonl.to_line(record) for record in records)


def write_run(folder: Path, num_steps: int = 12, **settings: Any) -> Path:
    """A run with settings, steps and transcripts of which some are hostile; evaluations at 0 and
    10."""
    folder.mkdir(parents=True)
    raw = {"run": {"name": folder.name, "num_steps": 20}, "lora": {"rank": 8}, **settings}
    config = RunConfig.model_validate(raw).model_dump(mode="json")
    facts = {"config": config, "dtype": "torch.float32", "trainable_parameters": 305_280}
    (folder / "run.json").write_text(json.dumps(facts))
    write_lines(folder / "metrics.jsonl", (step_metrics(s) for s in range(1, num_steps + 1)))
    texts = [
        r"So \(\frac{1}{2} < x\), hence \boxed{3}",
        SCRIPT + r" $\text{<script>window.hacked = 1</script>}$",
        "nul \x00\x00\x00 bell \x07 override \u202egnirts\u202c surrogate \ud800",
        r"$\href{javascript:window.hacked=1}{x}$ costs $5 and $6",
    ]
    write_lines(
        folder / "transcripts.jsonl",
        (
            transcript(step, index, texts[(step + index // 2) % 4])
            for step in range(1, num_steps + 1)
            for index in range(8)
        ),
    )
    write_evaluation(folder, "base", None, 5)
    for step, num_correct in ((0, 10), (10, 40)):
        if step <= num_steps:
            write_evaluation(folder, f"step_{step:06d}", step, num_correct)
    return folder
