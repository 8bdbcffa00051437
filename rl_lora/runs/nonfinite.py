"""Steps whose gradient is not finite: their batches are kept, and too many in a row end the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rl_lora import distributed
from rl_lora.config import OptimSection
from rl_lora.runs.log import METRICS_FILE
from rl_lora.storage import jsonl
from rl_lora.types import RolloutGroup

FOLDER = "nonfinite"


class NonfiniteSteps:
    """Keeps such steps' rollouts, and counts such steps in a row, before a resumption too.

    Args:
        run_folder: RUN/nonfinite/step_000012.jsonl gets the rollouts of step 12, one a line.
        optim: how many in a row end the run, and the learning rate, for the message.
    """

    def __init__(self, run_folder: Path, optim: OptimSection) -> None:
        self._folder, self._optim = run_folder / FOLDER, optim
        self._metrics = run_folder / METRICS_FILE

    def keep(
        self, step: int, metrics: Mapping[str, float], groups_N: Sequence[RolloutGroup]
    ) -> None:
        """Keeps the rollouts of a step whose gradient was not finite."""
        path = self._folder / f"step_{step:06d}.jsonl"
        if metrics["learn/nonfinite_updates"] and distributed.is_main():
            self._folder.mkdir(exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.writelines(
                    jsonl.to_line(
                        {
                            "prompt_id": group.prompt.prompt_id,
                            "prompt_ids": group.prompt.token_ids,
                            "completion_ids": rollout.completion.token_ids,
                            "sampler_logprobs": rollout.completion.sampler_logprobs_T,
                            "completion": rollout.completion.text,
                            "reward": rollout.score.reward,
                        }
                    )
                    for group in groups_N
                    for rollout in group.rollouts_G
                )

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raises FloatingPointError if the last step, whose line is written, is one of too many in
        a row."""
        if not metrics["learn/nonfinite_updates"]:
            return
        num = distributed.from_main(lambda: _num_at_end(self._metrics), "a step's end")
        if num >= self._optim.max_nonfinite_steps:
            raise FloatingPointError(
                f"the gradient of {num} steps in a row was not finite (their rollouts "
                f"are in {self._folder}): start again under another run.name with a lower optim.lr "
                f"(now {self._optim.lr:g}), or with algorithm.loss='truncated_importance_sampling'"
            )


def _num_at_end(metrics: Path) -> int:
    """Steps whose gradient was not finite since the last one that had a finite gradient; a step
    without any, as all its groups are tied, is neither."""
    num = 0
    for row in reversed(jsonl.read_lines(metrics)):
        if row.get("learn/nonfinite_updates"):
            num += 1
        elif row.get("learn/updates"):
            break
    return num
