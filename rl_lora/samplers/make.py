"""Samplers as [sampling] describes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rl_lora.config import SamplingSection
from rl_lora.config.algorithm import imported
from rl_lora.config.checks import SAMPLERS
from rl_lora.sampler import OnProgress, Sampler

if TYPE_CHECKING:
    from rl_lora.policy import Policy
    from rl_lora.samplers.vllm.settings import ServedPolicy


def load_sampler_class(backend: str) -> Callable[..., Sampler]:
    """The class of `sampling.backend`: a row of SAMPLERS, or the user's own "module:Class".

    Raises:
        UserError: no such module, or no such class in it.
    """
    return imported(SAMPLERS.get(backend, backend), "sampling.backend")


def has_own_weights(backend: str) -> bool:
    """Whether the class of `sampling.backend` has an engine with its own copy of the weights."""
    return bool(getattr(load_sampler_class(backend), "has_own_weights", False))


def sampler_maker(
    section: SamplingSection,
    policy: Policy | ServedPolicy,
    *,
    end_token_ids: tuple[int, ...],
    max_model_len: int,
    on_progress: OnProgress | None = None,
    learner_bytes: int = 0,
) -> Callable[[], Sampler]:
    """What makes the sampler of `sampling.backend`, once or several times. Arguments: see
    `rl_lora.build.make_sampler`."""
    from rl_lora.samplers.vllm.settings import engine_options

    sampler_class = load_sampler_class(section.backend)
    options: dict[str, Any] = {}
    if "engine" in inspect.signature(sampler_class).parameters:
        options["engine"] = engine_options(section, policy.device, learner_bytes)

    def make() -> Sampler:
        return sampler_class(
            policy,
            end_token_ids=end_token_ids,
            max_model_len=max_model_len,
            max_num_seqs=section.max_num_seqs,
            on_progress=on_progress,
            **options,
        )

    return make
