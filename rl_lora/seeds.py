"""Seeds that are the same on every machine and distinct for every sample."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl_lora.types import Prompt, SampleParams


def mix_seed(*parts: int | str) -> int:
    """A 63-bit hash of the parts."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def sample_seed(batch_seed: int, prompt_id: str, sample_index: int, occurrence: int = 0) -> int:
    """The seed of one sample; one seed for a whole group would make its samples identical.

    Args:
        batch_seed: seed of the sampler's call.
        prompt_id: the prompt's.
        sample_index: 0 to G - 1 within the group.
        occurrence: how often the prompt occurs in the batch before this group.
    """
    return mix_seed(batch_seed, prompt_id, sample_index, *([occurrence] if occurrence else []))


def sample_seeds(prompts_N: Sequence[Prompt], params: SampleParams) -> list[list[int]]:
    """[N][G] seeds of a whole batch. A prompt that occurs twice gets other samples the second time;
    apart from that, a prompt's seeds do not depend on the rest of the batch. Those of
    `types.SeededParams` are given."""
    if given := getattr(params, "seeds_N_G", ()):
        return [list(seeds_G) for _, seeds_G in zip(prompts_N, given, strict=True)]
    seen: Counter[str] = Counter()
    seeds_N_G = []
    for prompt in prompts_N:
        seeds_N_G.append(
            [
                sample_seed(params.seed, prompt.prompt_id, index, seen[prompt.prompt_id])
                for index in range(params.num_samples)
            ]
        )
        seen[prompt.prompt_id] += 1
    return seeds_N_G
