"""Named sets of [algorithm] settings: `algorithm.preset`.

A preset fills in the keys that are not given; what is given wins. Only [algorithm] is set: bounds
have an effect with `optim.num_updates` over 1, which is left to the job.
"""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # 'LoRA Without Regret', RL set-up: the defaults.
    "lora_without_regret": {
        "advantage": "group_mean",
        "loss": "importance_sampling",
        "denominator": "tokens",
    },
    # arXiv 2503.14476, equations 8-10 and section 4.1.
    "dapo": {
        "advantage": "grpo",
        "loss": "ppo",
        "denominator": "tokens",
        "options": {"clip_low": 0.2, "clip_high": 0.28},
    },
    # arXiv 2503.20783, section 3.2; the bounds are those of PPO.
    "dr_grpo": {
        "advantage": "group_mean",
        "loss": "ppo",
        "denominator": "max_tokens",
        "options": {"clip_low": 0.2, "clip_high": 0.2},
    },
    # arXiv 2507.18071, equations 5-7 and section 5.1.
    "gspo": {
        "advantage": "grpo",
        "loss": "gspo",
        "denominator": "sequences",
        "options": {"clip_low": 3e-4, "clip_high": 4e-4},
    },
    # arXiv 2506.13585, equations 4-5; for the upper bound see `rl_lora.losses.cispo`.
    "cispo": {
        "advantage": "grpo",
        "loss": "cispo",
        "denominator": "tokens",
        "options": {"clip_low": 1.0, "clip_high": 0.28},
    },
}


def with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of [algorithm] with those of their preset filled in.

    A preset's options are of its loss: another loss that is given does not get them.
    """
    preset = PRESETS.get(str(given.get("preset")), {})
    options = {} if given.get("loss", preset.get("loss")) != preset.get("loss") else preset
    return {
        **preset,
        **given,
        "options": {**options.get("options", {}), **given.get("options", {})},
    }
