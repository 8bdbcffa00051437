"""Evaluations by a scripted sampler, from a section of settings as in a config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards import Reward
from rl_lora.config import EvalSection
from rl_lora.evaluation import evaluate as product
from rl_lora.evaluation.scores import EvalResult
from rl_lora.sampler import Sampler
from rl_lora.types import Prompt, SampleParams


# limits: a test names what it varies
def evaluate(
    sampler: Sampler,
    prompts_N: Sequence[Prompt],
    reward: Reward,
    section: EvalSection,
    *,
    max_tokens: int = 64,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    folder: Path | None = None,
    name: str = "eval",
    identity: Mapping[str, Any] | None = None,
    step: int | None = None,
    restart: bool = False,
    **more: Any,
) -> EvalResult:
    """The product's `evaluate`; `more` goes to its `Evaluation`."""
    identity = dict(identity or {})
    policy = identity.pop("policy", "")
    params = SampleParams(
        num_samples=section.num_samples,
        max_tokens=section.max_tokens or max_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        stop=stop,
        seed=seed,
    )
    evaluation = product.Evaluation(
        prompts_N, reward, params, section.chunk_samples, identity=identity, **more
    )
    path = None if folder is None else folder / name
    return product.evaluate(sampler, evaluation, path, policy=policy, step=step, restart=restart)
