"""Settings of the data: sources, the split, and how problems are rendered."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rl_lora.config.section import Section

HELD_OUT = "held_out"  # in data.eval: rows held out from the training sources

# Arguments of `apply_chat_template` that prompt rendering sets.
_TEMPLATE_ARGUMENTS = (
    "conversation messages add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs"
).split()


_LABEL = r"^[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?$"


def _is_none(value: object) -> bool:
    """Of fields that records of earlier versions lack."""
    return value is None


class SourceSection(Section):
    """One data set: a known name, a file, a folder, a hub id or a generator."""

    name: str  # e.g. gsm8k, math500, aime24, a path, or reasoning_gym:chain_sum
    split: str | None = None  # of a hub data set; none: the known set's own, else train or test
    question: str | None = None  # column of the question; none: recognized by the columns
    answer: str | None = None  # column of the gold answer; `a.b`: field b of column a
    # Meaning of a list of answers: any of them is right, or all are required. none: all in rows
    # with is_multiple_answer = true, else any.
    list_answers: Literal["any", "all"] | None = Field(None, exclude_if=_is_none)
    num_rows: int | None = Field(None, ge=1)  # only the first rows; for a generator, rows made
    # Name in metrics and prompt ids; none: made from the source's name.
    label: str | None = Field(None, pattern=_LABEL, exclude_if=_is_none)
    # Share of each step's prompts, relative to the other training sets' (1 for those without one).
    # none in all sets: they are shuffled together.
    weight: float | None = Field(None, gt=0, exclude_if=_is_none)
    # Rows of a training set held out for the evaluation; none: its share of data.held_out.
    held_out: int | None = Field(None, ge=0, exclude_if=_is_none)
    seed: int = 0  # a generator's
    options: dict[str, Any] = Field(default_factory=dict)  # a generator's


class SourcesSection(Section):
    """Data sets for training and evaluation."""

    train: tuple[SourceSection, ...] = ()  # training sets
    eval: tuple[SourceSection, ...] = ()  # evaluation sets; empty: held-out training rows
    # Variables of the chat template, e.g. enable_thinking = false. chat_template replaces the
    # template, by its text or its name.
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in value if name in _TEMPLATE_ARGUMENTS]:
            raise ValueError(f"{taken[0]} cannot be set: prompt rendering sets it; remove it")
        return value

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        """`data = "path or name"` is short for one training source."""
        return {"train": value} if isinstance(value, str) else value

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            value = (value,)
        return tuple({"name": item} if isinstance(item, str) else item for item in value)


class DataSection(SourcesSection):
    """Data sets and how their problems are rendered."""

    # Rows held out from the training sets for evaluation, if data.eval is empty or contains
    # "held_out"; from each set in proportion where one has a weight or its own number. Several sets
    # make one evaluation with a score for each.
    held_out: int = Field(200, ge=1)
    # pass_rate: prompts that are always or never solved are drawn seldom, by running pass rates.
    curriculum: Literal["none", "pass_rate"] = "none"
    # A file of `rl-lora pass-rates`, for min_pass_rate and max_pass_rate; a curriculum begins with
    # its rates. Training prompts that it lacks stay.
    pass_rates: str | None = None
    min_pass_rate: float | None = Field(None, ge=0, le=1)  # training prompts below are left out
    max_pass_rate: float | None = Field(None, ge=0, le=1)  # training prompts above are left out
    template: Literal["chat", "base"] = "chat"  # base: plain text, for models without a template
    system: str | None = None  # system message (chat template)
    instruction: str = "Put your final answer within \\boxed{}."  # appended to each question
    few_shot: str = ""  # text before each question (base template)
    max_prompt_tokens: int = Field(1024, ge=1)  # a longer prompt is an error; none is truncated

    @model_validator(mode="after")
    def _keys_of_training_sets(self) -> DataSection:
        for source in self.eval:
            for key in ("weight", "held_out"):
                if getattr(source, key) is not None:
                    raise ValueError(
                        f"eval: {key} of {source.name} is a key of training sets; remove it, or "
                        "move it to data.train"
                    )
        return self

    @model_validator(mode="after")
    def _bounds_of_pass_rates(self) -> DataSection:
        low, high = self.min_pass_rate, self.max_pass_rate
        if self.pass_rates is None and (low, high) != (None, None):
            raise ValueError(
                "min_pass_rate and max_pass_rate need the prompts' pass rates; set data.pass_rates "
                "to a file that `rl-lora pass-rates` has written"
            )
        if self.pass_rates is not None and (low, high, self.curriculum) == (None, None, "none"):
            raise ValueError(
                "pass_rates has no effect by itself; set data.min_pass_rate, data.max_pass_rate "
                "or data.curriculum='pass_rate', or remove it"
            )
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_pass_rate={low:g} is above max_pass_rate={high:g}; swap them")
        return self
