"""The held-out evaluation: samples and grades every problem under the sampler's adapter.

Accuracy is the mean over problems of the fraction of correct samples (avg@k, the mean pass@1).
`evaluation.scores` has the records and scores, `evaluation.files` the file that a killed evaluation
resumes from.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rewards import Reward
from rl_lora import distributed
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.evaluation.files import EvaluationFile, problems_key
from rl_lora.evaluation.intervals import CONFIDENCE
from rl_lora.evaluation.scores import (
    EvalResult,
    ProblemRecord,
    evaluation_scores,
    scores_by_source,
)
from rl_lora.rollouts import Scoring, sample_and_score, scoring_thread
from rl_lora.sampler import Sampler, is_on_rank_0
from rl_lora.storage import jsonl
from rl_lora.types import Prompt, RolloutGroup, SampleParams

Progress = Callable[[int, int, int], None]  # (problems done, in all, being sampled now)


@dataclass(frozen=True)
class Evaluation:
    """What policies are evaluated on, and how: the same for each of them.

    Example: Evaluation(prompts_N=[Prompt(...)], reward=load_reward("math"),
    params=SampleParams(num_samples=1, max_tokens=256, temperature=0.0, seed=3))
    """

    prompts_N: Sequence[Prompt]  # the problems; their sources may differ
    reward: Reward
    params: SampleParams  # the same seed gives the same samples, whatever the chunks
    chunk_samples: int = 256  # completions sampled, graded and saved at a time
    # What else samples and verdicts depend on: the base model, the reward, ...
    identity: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # for the result
    on_progress: Progress = lambda done, total, now: None

    def settings(self, policy: str) -> dict[str, Any]:
        """All that the samples and verdicts of a policy depend on; the file's first line."""
        return {
            "problems": problems_key(self.prompts_N),
            "num_problems": len(self.prompts_N),
            **asdict(self.params),
            "policy": policy,
            **self.identity,
        }


def evaluate(
    sampler: Sampler,
    evaluation: Evaluation,
    path: Path | None = None,
    *,
    policy: str = "",
    step: int | None = None,
    restart: bool = False,
) -> EvalResult:
    """Samples and grades every problem that the evaluation's file does not have yet.

    Of a job's processes each does a share, and rank 0 writes; all return the result.

    Args:
        sampler: with the adapter to evaluate already set.
        evaluation: the problems and how they are sampled and graded.
        path: FOLDER/NAME: writes NAME.jsonl.gz (one line per problem, chunk by chunk) and
            NAME.json (the result, at the end) to FOLDER. An evaluation that was killed resumes if
            its settings are the same. None: nothing is written.
        policy: which weights are evaluated: an adapter's fingerprint, or "base".
        step: training steps done, for the record.
        restart: start over if the file has other settings, which is an error otherwise.

    Raises:
        UserError: no problems, a folder that cannot be written, or a file with other settings.
        StaleAdapterError: the completions come from more than one adapter version.
    """
    params, prompts_N = evaluation.params, evaluation.prompts_N
    if not prompts_N:
        raise UserError("evaluation: there are no problems; check data.eval")
    settings = evaluation.settings(policy)
    file = None
    if path is not None and distributed.is_main():
        file = EvaluationFile(path.parent, path.name, settings, restart=restart)
    problems_N, version = _evaluate_missing(sampler, evaluation, file)
    result = EvalResult(
        total=evaluation_scores(problems_N),
        by_source=scores_by_source(problems_N),
        step=step,
        adapter_version=version,
        confidence=CONFIDENCE,
        interval="exact" if params.num_samples == 1 else "clustered_exact",
        temperature=params.temperature,
        top_p=params.top_p,
        max_tokens=params.max_tokens,
        seed=params.seed,
        seconds=sum(problem.seconds for problem in problems_N),
        policy=policy,
        notes=evaluation.notes,
    )
    if path is not None and distributed.is_main():
        result.save(path.with_name(f"{path.name}.json"))
    return result


def _evaluate_missing(
    sampler: Sampler, evaluation: Evaluation, file: EvaluationFile | None
) -> tuple[list[ProblemRecord], int]:
    """(every problem's record in the prompts' order, the one adapter version that answered)."""
    prompts_N, params = evaluation.prompts_N, evaluation.params
    done, saved_version = distributed.from_main(
        lambda: ({}, None) if file is None else (dict(file.done), file.adapter_version),
        "the evaluation",
    )
    versions = set() if saved_version is None else {saved_version}
    left = [prompt for prompt in prompts_N if prompt.prompt_id not in done]
    chunk = max(1, evaluation.chunk_samples // params.num_samples)
    for first in range(0, len(left), chunk):
        prompts = left[first : first + chunk]
        evaluation.on_progress(len(done), len(prompts_N), len(prompts))
        start = time.perf_counter()
        with scoring_thread() as thread:
            scoring = Scoring(
                prompts, evaluation.reward, thread, is_on_rank_0=is_on_rank_0(sampler)
            )
            groups = sample_and_score(sampler, scoring, params, version=None).groups()
        versions |= {r.completion.adapter_version for g in groups for r in g.rollouts_G}
        if len(versions) > 1:
            raise StaleAdapterError(
                f"the sampler changed its adapter during an evaluation: versions {sorted(versions)}"
            )
        seconds = (time.perf_counter() - start) / len(prompts)
        problems = [problem_record(group, seconds) for group in groups]
        if file is not None:
            file.append(problems, *versions)
        done |= {problem.prompt_id: problem for problem in problems}
    evaluation.on_progress(len(done), len(prompts_N), 0)
    (version,) = versions
    return [done[prompt.prompt_id] for prompt in prompts_N], version


def problem_record(group: RolloutGroup, seconds: float = 0.0) -> ProblemRecord:
    """The record of one graded problem, exactly as it will read back from the file."""
    row = {
        "prompt_id": group.prompt.prompt_id,
        "source": group.prompt.source,
        "question": group.prompt.question,
        "reference": group.prompt.reference,
        "samples": [
            {
                "completion": rollout.completion.text,
                "tokens": rollout.completion.num_sampled,
                "truncated": rollout.completion.is_truncated,
                **rollout.score.to_row(),
                "turns": () if (episode := rollout.completion.episode) is None else episode.texts,
            }
            for rollout in group.rollouts_G
        ],
        "seconds": seconds,
    }
    return ProblemRecord.from_row(jsonl.storable(row))


def remove_results_after(folder: Path, step: int) -> list[Path]:
    """Deletes step_N.json of later steps; returns what was deleted.

    A run that resumes from `step` repeats the later steps, maybe with a different result. The
    completions stay on disk and are reused if the policy turns out to be the same. A run that
    starts over (step -1) may have another base model than one that was killed early, so base.json
    is deleted as well.
    """
    removed = []
    for path in sorted(folder.glob("*.json")):
        match = re.fullmatch(r"step_(\d+)\.json", path.name)
        if (match is not None and int(match[1]) > step) or (step < 0 and path.name == "base.json"):
            path.unlink()
            removed.append(path)
    return removed


def set_aside(folder: Path, step: int) -> None:
    """Renames RUN/eval to RUN/eval_until_STEP: its problems differ, so it must not be compared."""
    if not folder.is_dir():
        return
    aside, number = folder.with_name(f"{folder.name}_until_{step:06d}"), 2
    while aside.exists():  # from a resume that was killed before its first checkpoint
        aside, number = folder.with_name(f"{folder.name}_until_{step:06d}_{number}"), number + 1
    folder.rename(aside)
