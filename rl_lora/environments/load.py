"""The environment of a job, as [environment] describes it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from rewards import Reward
from rl_lora.config import RunConfig
from rl_lora.config.algorithm import imported
from rl_lora.config.checks import ENVIRONMENTS
from rl_lora.environments.bridge import Bridge
from rl_lora.environments.episodes import EpisodeSampler
from rl_lora.environments.protocol import Environment
from rl_lora.errors import UserError
from rl_lora.sampler import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def environment_maker(config: RunConfig) -> Callable[[], Environment]:
    """What makes the job's environment, tried once.

    Raises:
        UserError: no such module or class, or options that it does not take.
    """
    section = config.environment
    name = section.name or ""
    make = partial(imported(ENVIRONMENTS.get(name, name), "environment.name"), **section.options)
    try:
        made = make()
    except (TypeError, ValueError) as error:
        raise UserError(f"environment.options of {name!r}: {error}") from error
    if not all(callable(getattr(made, method, None)) for method in ("reset", "step")):
        raise UserError(
            f"environment.name={name!r} has no methods reset and step; see "
            "rl_lora.environments.protocol.Environment"
        )
    if not isinstance(getattr(made, "is_graded", None), bool):
        raise UserError(
            f"environment.name={name!r}: set is_graded in the class: True if the job's reward "
            "scores each turn before its step, else False"
        )
    return make


def episodes_by(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, reward: Reward
) -> Callable[[Sampler], EpisodeSampler] | None:
    """What makes the job's sampler one of episodes; None: the job has no environment.

    Raises:
        UserError: as `environment_maker`; or the chat template cannot render an observation.
    """
    section, data = config.environment, config.data
    if section.name is None:
        return None
    make = environment_maker(config)
    bridge = Bridge(tokenizer, data.template, data.chat_template_kwargs, section.role)
    max_turns = section.max_turns
    return lambda sampler: EpisodeSampler(sampler, make, bridge, max_turns=max_turns, reward=reward)
