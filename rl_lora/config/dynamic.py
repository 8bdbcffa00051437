"""Settings of dynamic sampling (`rl_lora.samplers.dynamic`): what they mean, and their check."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rl_lora.config import SamplingSection


def is_dynamic(sampling: SamplingSection) -> bool:
    """Whether groups without signal are left out."""
    return sampling.max_rounds > 1 or sampling.oversample > 1


def round_size(sampling: SamplingSection, num_missing: int | None = None) -> int:
    """Prompts of a round that is to give so many groups with signal; None: of the first round."""
    wanted = sampling.num_prompts if num_missing is None else num_missing
    return math.ceil(round(wanted * sampling.oversample, 6))  # 20 * 1.1 is 22, not 23


def check_dynamic(sampling: SamplingSection) -> None:
    """Raises ValueError for further rounds where later steps' batches are under way already."""
    if sampling.max_rounds > 1 and sampling.max_staleness:
        oversample = max(sampling.oversample, 1.5)
        raise ValueError(
            f"sampling.max_rounds={sampling.max_rounds} draws further prompts once a step's groups "
            f"are scored, and with sampling.max_staleness={sampling.max_staleness} later steps are "
            "sampled by then; set sampling.max_staleness=0, or sample more at once: "
            f"sampling.max_rounds=1 and sampling.oversample={oversample:g}"
        )
