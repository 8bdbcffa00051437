"""The held-out evaluation: samples and grades every problem under the adapter in use, and can go
on.

Accuracy is the mean over problems of the share of correct samples (avg@k, the mean pass@1). The
records and the scores are `results`', the file is `evaluation_files`'.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards import Reward
from rl_lora.config import EvalSection
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.evaluation.files import EvaluationFile, problems_key
from rl_lora.evaluation.scores import (
    EvalResult,
    EvaluationScores,
    ProblemRecord,
    evaluation_scores,
    load_result,
    scores_by_source,
)
from rl_lora.rollouts import Scoring, sample_and_score, scoring_thread
from rl_lora.sampler import Sampler
from rl_lora.storage import jsonl
from rl_lora.types import Prompt, RolloutGroup, SampleParams

__all__ = [
    "EvalResult",
    "EvaluationScores",
    "evaluate",
    "load_result",
    "problem_record",
    "remove_results_after",
]

Progress = Callable[[int, int, int], None]  # (problems done, in all, being sampled now)


def evaluate(
    sampler: Sampler,
    prompts_N: Sequence[Prompt],
    reward: Reward,
    section: EvalSection,
    *,
    max_tokens: int,
    seed: int,
    stop: tuple[str, ...] = (),
    step: int | None = None,
    folder: Path | None = None,
    name: str = "eval",
    confidence: float = 0.95,
    identity: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    restart: bool = False,
    on_progress: Progress | None = None,
) -> EvalResult:
    """Samples and grades every problem that the evaluation's file does not have yet.

    Args:
        sampler: anything that keeps the Sampler protocol.
        prompts_N: the problems; their sources may differ.
        reward: scores completions against references.
        section: samples a problem, temperature, top_p, cap, and completions asked for in one call.
        max_tokens: cap of a completion where section.max_tokens is None.
        seed: of the evaluation; the same seed gives the same samples whatever the chunks, as far as
        the
            sampler seeds each sample by `sample_seed`.
        stop: strings that end a completion.
        step: training steps done, for the record.
        folder: where NAME.jsonl.gz (a line a problem, written chunk by chunk) and NAME.json (the
            result, written at the end) go; None: nowhere.
        name: of the files. A file of a killed evaluation with the same settings is gone on with.
        confidence: of the intervals.
        identity: what else the samples and verdicts depend on: "policy" (the adapter's fingerprint
            or "base"), the base model, the reward, ...
        notes: for the result.
        restart: start over where the file is of other settings; else that is an error.
        on_progress: called with (problems done, problems in all, problems being sampled).

    Raises:
        UserError: no problem, a folder that cannot be written, or an evaluation of other settings
        in it. StaleAdapterError: completions of more than one adapter version.
    """
    if not prompts_N:
        raise UserError("evaluation: there is no problem to evaluate on; check data.eval")
    params = SampleParams(
        num_samples=section.num_samples,
        max_tokens=section.max_tokens or max_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        stop=stop,
        seed=seed,
    )
    file = None
    if folder is not None:
        settings = evaluation_settings(prompts_N, params, identity or {})
        file = EvaluationFile(folder, name, settings, restart=restart)
    evaluation = _Exam(sampler, reward, params, file)
    chunk = max(1, section.chunk_samples // section.num_samples)
    problems_N = evaluation.run(prompts_N, chunk, on_progress or (lambda done, total, now: None))
    result = EvalResult(
        total=evaluation_scores(problems_N, confidence),
        by_source=scores_by_source(problems_N, confidence),
        step=step,
        adapter_version=evaluation.version,
        confidence=confidence,
        interval="exact" if section.num_samples == 1 else "clustered_exact",
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=params.max_tokens,
        seed=params.seed,
        seconds=sum(problem.seconds for problem in problems_N),
        policy=str((identity or {}).get("policy", "")),
        notes=notes,
    )
    if folder is not None:
        result.save(folder / f"{name}.json")
    return result


def evaluation_settings(
    prompts_N: Sequence[Prompt], params: SampleParams, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """What an evaluation's samples and verdicts depend on; the first line of its file."""
    return {
        "problems": problems_key(prompts_N),
        "num_problems": len(prompts_N),
        "num_samples": params.num_samples,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_tokens,
        "stop": list(params.stop),
        "seed": params.seed,
        **identity,
    }


def problem_record(group: RolloutGroup, seconds: float = 0.0) -> ProblemRecord:
    """The record of one graded problem, exactly as it will be read from the file."""
    row = {
        "prompt_id": group.prompt.prompt_id,
        "source": group.prompt.source,
        "question": group.prompt.question,
        "reference": group.prompt.reference,
        "seconds": seconds,
        "samples": [
            {
                "completion": rollout.completion.text,
                "answer": rollout.score.answer,
                "correct": rollout.score.correct,
                "reward": rollout.score.reward,
                "status": str(rollout.score.status),
                "has_format": rollout.score.has_format,
                "tokens": len(rollout.completion.token_ids),
                "truncated": rollout.completion.is_truncated,
            }
            for rollout in group.rollouts_G
        ],
    }
    return ProblemRecord.from_row(jsonl.storable(row))


def remove_results_after(folder: Path, step: int) -> list[Path]:
    """Deletes step_N.json of later steps; returns what was deleted.

    For a run that goes on from `step`: the evaluations of steps that it runs again may be of
    another policy. Their completions stay, and are taken over if the policy turns out to be the
    same. A run that begins (step -1) may have another base than one that was killed early:
    base.json goes, too.
    """
    removed = []
    for path in sorted(folder.glob("*.json")):
        match = re.fullmatch(r"step_(\d+)\.json", path.name)
        if (match is not None and int(match[1]) > step) or (step < 0 and path.name == "base.json"):
            path.unlink()
            removed.append(path)
    return removed


def set_aside(folder: Path, step: int) -> None:
    """Renames RUN/eval to RUN/eval_until_STEP: evaluations of other problems, not to be
    compared."""
    if not folder.is_dir():
        return
    aside, number = folder.with_name(f"{folder.name}_until_{step:06d}"), 2
    while aside.exists():  # of a resumption that was killed before its first checkpoint
        aside, number = folder.with_name(f"{folder.name}_until_{step:06d}_{number}"), number + 1
    folder.rename(aside)


class _Exam:
    """The state of one evaluation: what is done, and of which adapter version."""

    def __init__(
        self, sampler: Sampler, reward: Reward, params: SampleParams, file: EvaluationFile | None
    ) -> None:
        self._sampler, self._reward, self._params, self._file = sampler, reward, params, file
        self._versions = set[int]()
        if file is not None and file.adapter_version is not None:
            self._versions.add(file.adapter_version)

    @property
    def version(self) -> int:
        """The one adapter version that all completions came from."""
        (version,) = self._versions
        return version

    def run(self, prompts_N: Sequence[Prompt], chunk: int, report: Progress) -> list[ProblemRecord]:
        """Every problem's record, in the prompts' order."""
        done = dict(self._file.done) if self._file is not None else {}
        left = [prompt for prompt in prompts_N if prompt.prompt_id not in done]
        for first in range(0, len(left), chunk):
            prompts = left[first : first + chunk]
            report(len(done), len(prompts_N), len(prompts))
            problems = self._evaluate(prompts)
            done |= {problem.prompt_id: problem for problem in problems}
        report(len(done), len(prompts_N), 0)
        return [done[prompt.prompt_id] for prompt in prompts_N]

    def _evaluate(self, prompts: Sequence[Prompt]) -> list[ProblemRecord]:
        start = time.perf_counter()
        with scoring_thread() as thread:
            scoring = Scoring(prompts, self._reward, thread)
            groups = sample_and_score(self._sampler, scoring, self._params, version=None).groups()
        self._versions |= {r.completion.adapter_version for g in groups for r in g.rollouts_G}
        if len(self._versions) > 1:
            raise StaleAdapterError(
                "the sampler changed its adapter during an evaluation: versions "
                f"{sorted(self._versions)}"
            )
        seconds = (time.perf_counter() - start) / len(prompts)
        problems = [problem_record(group, seconds) for group in groups]
        if self._file is not None:
            self._file.append(problems, self.version)
        return problems
