"""Reinforcement-learning post-training whose policy is a LoRA adapter on a base model.

The public names below are loaded when they are first used: `import rl_lora` loads no PyTorch.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewards import load_reward
    from rl_lora.adapters.files import open_adapter
    from rl_lora.advantages import group_mean, grpo, reinforce_pp, rloo
    from rl_lora.batches import pack
    from rl_lora.config import RunConfig, load_config
    from rl_lora.environments.protocol import Environment
    from rl_lora.errors import UserError
    from rl_lora.evaluation.evaluate import Evaluation, evaluate
    from rl_lora.learner import Learner
    from rl_lora.losses import (
        cispo,
        gspo,
        importance_sampling,
        ppo,
        truncated_importance_sampling,
    )
    from rl_lora.policy import Policy
    from rl_lora.prompts import load_prompts
    from rl_lora.rollouts import rollout
    from rl_lora.sampler import Sampler
    from rl_lora.samplers.torch_sampler import TorchSampler
    from rl_lora.samplers.vllm.sampler import VllmSampler
    from rl_lora.train import train as run
    from rl_lora.types import Adapter, Completion, Prompt, RolloutGroup, SampleParams

__version__ = "0.1.0"

# At its import, which is PEFT's too, it warns that an optional kernel is missing; none is used.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__all__ = [
    "Adapter",
    "Completion",
    "Environment",
    "Evaluation",
    "Learner",
    "Policy",
    "Prompt",
    "RolloutGroup",
    "RunConfig",
    "SampleParams",
    "Sampler",
    "TorchSampler",
    "UserError",
    "VllmSampler",
    "cispo",
    "evaluate",
    "group_mean",
    "grpo",
    "gspo",
    "importance_sampling",
    "load_config",
    "load_prompts",
    "load_reward",
    "open_adapter",
    "pack",
    "ppo",
    "reinforce_pp",
    "rloo",
    "rollout",
    "run",
    "truncated_importance_sampling",
]

_NAMES_BY_MODULE = {
    "rewards": ("load_reward",),
    "rl_lora.adapters.files": ("open_adapter",),
    "rl_lora.advantages": ("group_mean", "grpo", "reinforce_pp", "rloo"),
    "rl_lora.batches": ("pack",),
    "rl_lora.config": ("RunConfig", "load_config"),
    "rl_lora.environments.protocol": ("Environment",),
    "rl_lora.errors": ("UserError",),
    "rl_lora.evaluation.evaluate": ("Evaluation", "evaluate"),
    "rl_lora.learner": ("Learner",),
    "rl_lora.losses": (
        *("cispo", "gspo", "importance_sampling", "ppo"),
        "truncated_importance_sampling",
    ),
    "rl_lora.policy": ("Policy",),
    "rl_lora.prompts": ("load_prompts",),
    "rl_lora.rollouts": ("rollout",),
    "rl_lora.sampler": ("Sampler",),
    "rl_lora.samplers.torch_sampler": ("TorchSampler",),
    "rl_lora.samplers.vllm.sampler": ("VllmSampler",),
    "rl_lora.train": ("run",),
    "rl_lora.types": ("Adapter", "Completion", "Prompt", "RolloutGroup", "SampleParams"),
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}
_NAME_THERE = {"run": "train"}  # `rl_lora.train` is the module


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), _NAME_THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
