"""Settings of a supervised job (`rl-lora sft`): its own data and batch, the rest as in RL."""

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
from rl_lora.config.checks import check_full_dtype, check_variant


class SftDataSection(SourcesSection):
    """Chats or prompts with completions, and how they are rendered."""

    # SourceSection.question names a prompt column.
    held_out: int = Field(200, ge=1)  # rows
    template: Literal["chat", "base"] = "chat"  # base: 'User: ...', for models without a template
    system: str | None = None  # before chats that have no system message of their own
    instruction: str = "Put your final answer within \\boxed{}."  # follows problems, not chats
    learn_on: Literal["all", "last"] = "all"  # of a chat's assistant messages
    max_tokens: int = Field(2048, ge=2)  # of a sequence; longer completions are cut at their end


class SftSection(Section):
    """The batch and the tests along the way."""

    batch_size: int = Field(32, ge=1)  # sequences a step
    # Tests of the held-out rows: about so many, at equal ratios of steps (the article's figure 1
    # goes by log steps); run.eval_every adds those at equal distances.
    num_tests: int = Field(10, ge=1)


class SftConfig(Section):
    """A whole supervised job."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: SftDataSection = SftDataSection()
    sft: SftSection = SftSection()
    optim: OptimSection = OptimSection()

    @model_validator(mode="after")
    def _consistent(self) -> SftConfig:
        check_variant(self.lora, self.optim)
        check_full_dtype(self.lora, self.model.dtype)
        return self


def load_sft_config(path: Path | None, overrides: list[str] | None = None) -> SftConfig:
    """Reads a TOML file, applies dotted overrides (`section.key=value`), checks everything.

    Raises:
        UserError: one line that names the file or key and the fix.
    """
    return parse_as(SftConfig, read_settings(path, overrides, SftConfig))
