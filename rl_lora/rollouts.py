"""Prompts x sampler x reward -> groups of scored rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rewards import Reward
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.sampler import Sampler
from rl_lora.types import Completion, Prompt, Rollout, RolloutGroup, SampleParams


def sample_groups(
    sampler: Sampler, prompts_N: Sequence[Prompt], params: SampleParams, *, version: int
) -> list[list[Completion]]:
    """[N][G] completions, every one of the adapter version asked for.

    Raises:
        StaleAdapterError: a completion came from another version.
    """
    completions_N_G = sampler.sample(prompts_N, params)
    found = {c.adapter_version for completions_G in completions_N_G for c in completions_G}
    if found != {version}:
        raise StaleAdapterError(
            f"the sampler answered with adapter version {sorted(found)}, the learner is at "
            f"{version}; the run stops, for its importance ratios would be wrong"
        )
    return completions_N_G


def score_groups(
    prompts_N: Sequence[Prompt],
    completions_N_G: Sequence[Sequence[Completion]],
    reward: Reward,
) -> list[RolloutGroup]:
    """Scores a whole step in one call, so that the verifier's workers are used together.

    Raises:
        UserError: the reward gave a number that is not finite.
    """
    texts = [c.text for completions_G in completions_N_G for c in completions_G]
    references = [
        prompt.reference
        for prompt, completions_G in zip(prompts_N, completions_N_G, strict=True)
        for _ in completions_G
    ]
    scored = reward.score_batch(texts, references)
    for score, reference in zip(scored, references, strict=True):
        if not math.isfinite(score.reward):
            raise UserError(
                f"the reward gave {score.reward} for an answer to reference {reference!r}; it must "
                "give a finite number"
            )
    scores = iter(scored)
    return [
        RolloutGroup(prompt, tuple(Rollout(c, next(scores)) for c in completions_G))
        for prompt, completions_G in zip(prompts_N, completions_N_G, strict=True)
    ]
