"""Settings of a supervised job (`rl-lora sft`); [run], [model], [lora], [optim] are RL's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from rl_lora.config import (
    LoraSection,
    ModelSection,
    OptimSection,
    RunSection,
    Section,
    SourcesSection,
    parse_as,
    read_settings,
)
from rl_lora.config.checks import check_quantize, check_variant


class SftDataSection(SourcesSection):
    """Chats, or prompts with completions, and how they are rendered.

    In these sources `question` names the prompt column.
    """

    held_out: int = Field(200, ge=1)  # rows for the test loss, if data.eval is empty
    template: Literal["chat", "base"] = "chat"  # base: 'User: ...', for models without a template
    system: str | None = None  # system message for chats that have none
    instruction: str = "Put your final answer within \\boxed{}."  # appended to problems, not chats
    learn_on: Literal["all", "last"] = "all"  # assistant messages of a chat that are trained on
    max_tokens: int = Field(2048, ge=2)  # per sequence; longer completions are truncated

    @model_validator(mode="after")
    def _keys_of_rl(self) -> SftDataSection:
        for source in (*self.train, *self.eval):
            for key in ("label", "weight", "held_out"):
                if getattr(source, key) is not None:
                    raise ValueError(
                        f"{key} of {source.name} is for RL jobs, and a supervised job reads all "
                        "rows of its sets; remove it (num_rows takes a part of a set)"
                    )
        return self


class SftSection(Section):
    """Batch size and test losses."""

    batch_size: int = Field(32, ge=1)  # sequences per step
    # Approximate number of test losses, at steps equally spaced on a log scale (as in the
    # article's figure 1); run.eval_every adds equally spaced ones.
    num_tests: int = Field(10, ge=1)


class SftConfig(Section):
    """A supervised job."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: SftDataSection = SftDataSection()
    sft: SftSection = SftSection()
    optim: OptimSection = OptimSection()

    @model_validator(mode="after")
    def _consistent(self) -> SftConfig:
        check_variant(self.lora, self.optim)
        check_quantize(self.model, self.lora)
        if self.run.push_to is not None:
            raise ValueError(
                f"run.push_to={self.run.push_to!r} is for RL runs; remove it, and push the "
                "finished run by `rl-lora export`"
            )
        if self.optim.schedule == "kl":
            raise ValueError(
                "optim.schedule='kl' is for RL, where a step has tokens of the policy's own; set "
                "optim.schedule to constant, linear or cosine, and remove optim.target_kl"
            )
        return self


def load_sft_config(path: Path | None, overrides: list[str] | None = None) -> SftConfig:
    """As `load_config`, of a supervised job."""
    return parse_as(SftConfig, read_settings(path, overrides, SftConfig))
