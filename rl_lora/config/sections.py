"""The job's settings: a few frozen sections, read from TOML, checked before any long work.

Departures from the defaults are all that a file in configs/ holds. A dotted override on the command
line (`lora.rank=8`) has the last word. An unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import tomllib
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rl_lora.config.algorithm import check_algorithm
from rl_lora.config.checks import (
    check_backend,
    check_full_dtype,
    check_served,
    check_temperatures,
    check_variant,
)
from rl_lora.config.overrides import apply_overrides
from rl_lora.config.shipped import find_config
from rl_lora.errors import UserError, nearest


class Section(BaseModel):
    """A frozen section; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


SomeSection = TypeVar("SomeSection", bound=Section)
# Arguments of `apply_chat_template` that are ours to set.
_TEMPLATE_ARGUMENTS = (
    "conversation messages add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs"
).split()


class RunSection(Section):
    """What is written where, how long and how often."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    num_steps: int = Field(100, ge=0)
    output_dir: str = "runs"  # the run folder is output_dir/name
    eval_every: int = Field(0, ge=0)  # steps; 0: only before the first and after the last step
    checkpoint_every: int = Field(1, ge=1)  # steps
    keep_last: int = Field(2, ge=1)  # checkpoints kept
    transcripts_per_step: int = Field(8, ge=0)
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name


class ModelSection(Section):
    """The base model."""

    name: str = "smollm2-135m-instruct"  # the embedded one, a local directory or a hub id
    revision: str | None = None  # of a hub id
    released: date | None = (
        None  # YYYY-MM-DD, for the evaluation's note on contamination; None: by name
    )
    device: str = "auto"  # auto: cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: by a matmul probe of the device


# What the papers call them; plain LoRA is not among them.
VARIANT_NAMES = {"rslora": "rsLoRA", "pissa": "PiSSA", "olora": "OLoRA", "dora": "DoRA"}


class LoraSection(Section):
    """The policy: W' = W + (alpha / rank) B A ('LoRA Without Regret', set-up)."""

    mode: Literal["lora", "full"] = "lora"  # full: all weights train, through the same loop
    rank: int = Field(1, ge=1, le=512)
    alpha: float = Field(32.0, gt=0, le=1e6)
    layers: Literal["all", "attention", "mlp"] = "all"
    lm_head: bool = False
    variant: Literal["lora", "rslora", "pissa", "olora", "dora"] = "lora"  # see rl_lora.nn.variants


class SourceSection(Section):
    """One data set: a name of the loaders' table, a file, a folder, or a generator."""

    name: str  # e.g. gsm8k, math500, aime24, a path, or reasoning_gym:chain_sum
    split: str | None = None
    question: str | None = None  # column of the question, if not one that is known
    answer: str | None = None  # column of the gold answer; `a.b`: field b of column a
    # What a list of answers means: any of them counts, or all of them together are the answer.
    # None: see rl_lora.data.row_formats.
    list_answers: Literal["any", "all"] | None = Field(None, exclude_if=lambda value: value is None)
    num_rows: int | None = Field(None, ge=1)  # first rows only; rows made, for a generator
    seed: int = 0  # of a generator
    options: dict[str, Any] = Field(default_factory=dict)  # of a generator


class SourcesSection(Section):
    """Data sets to learn from and to be evaluated on."""

    train: tuple[SourceSection, ...] = ()
    eval: tuple[SourceSection, ...] = ()  # empty: rows are kept from the training rows
    # For the chat template, e.g. enable_thinking = false; chat_template = another one, as text or
    # by its name.
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := [name for name in value if name in _TEMPLATE_ARGUMENTS]:
            raise ValueError(f"{taken[0]} is not free: it is set by how prompts are made")
        return value

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        """`data = "path or name"` stands for that one training source."""
        return {"train": value} if isinstance(value, str) else value

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        if isinstance(value, str | dict):
            value = (value,)
        return tuple({"name": item} if isinstance(item, str) else item for item in value)


class DataSection(SourcesSection):
    """The problems, and how they are rendered."""

    # Several sets in `eval` make one evaluation, with scores for each. "held_out" among them:
    # held_out rows are kept from the training rows; no set: those alone.
    held_out: int = Field(200, ge=1)
    template: Literal["chat", "base"] = "chat"
    system: str | None = None
    instruction: str = "Put your final answer within \\boxed{}."  # follows the question
    few_shot: str = ""  # stands before the question, base template
    max_prompt_tokens: int = Field(1024, ge=1)  # a longer prompt is an error, not cut


class SamplingSection(Section):
    """Rollouts. top_p = 1 and no top_k: the importance ratio needs the whole distribution."""

    backend: str = "vllm"  # vllm, torch, or your own as module:Class (rl_lora.build.make_sampler)
    num_prompts: int = Field(16, ge=1)  # prompts a step
    num_samples: int = Field(8, ge=1)  # G, completions a prompt
    max_tokens: int = Field(256, ge=1)  # cap of a completion
    temperature: float = Field(1.0, gt=0)  # MIN_TEMPERATURE at least
    stop: tuple[str, ...] = ()  # strings that end a completion (base models with few-shot prompts)
    max_num_seqs: int | None = Field(None, ge=1)  # sequences decoded at once; None: for the machine
    eager: bool | None = None  # vLLM without compilation; None: so on a CPU, but for long jobs
    attention_backend: str | None = None  # vLLM's on a GPU (TRITON_ATTN); None: its choice
    # Adapter added to vLLM's own copy of the weights; None: on a CPU in float32.
    merge_adapter: bool | None = None
    memory_fraction: float = Field(0.45, gt=0, le=0.95)  # of the GPU's memory, for vLLM
    max_kl: float | None = Field(None, gt=0)  # nats; None: 1e-4 in float32, 2e-2 in bfloat16
    overlap: bool = False  # samples step k + 1 while step k learns, from version k - 1; for GPUs

    _known_backend = field_validator("backend")(check_backend)

    @field_validator("stop")
    @classmethod
    def _some_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string stands in every text; leave it out")
        return value


class RewardSection(Section):
    """What is rewarded."""

    name: str = "math"  # a name of rewards' table or module:function
    policy: str = "default"  # the verifier's policy for the data set
    format_weight: float = Field(0.0, ge=0, le=1)  # added when the answer stands in a \boxed{}
    thinking_tags: tuple[tuple[str, str], ...] = ()  # [opening, closing], beyond the known ones
    num_workers: int = Field(1, ge=1)  # processes for the symbolic tier
    timeout_s: float = Field(5.0, gt=0)


class AlgorithmSection(Section):
    """Advantage, loss and KL. The defaults are the article's."""

    advantage: str = "group_mean"  # a row of rl_lora.advantages.ADVANTAGES, or module:function
    loss: str = "importance_sampling"  # a row of rl_lora.losses.LOSSES, or module:function
    # Keywords of the loss and the advantage, e.g. clip_low, clip_high and ratio_cap of ppo. They
    # may also be written next to the other keys: algorithm.clip_low.
    options: dict[str, Any] = Field(default_factory=dict)
    denominator: Literal["tokens", "sequences", "max_tokens"] = "tokens"
    kl: Literal["none", "loss", "reward"] = "none"  # to the base model, without the adapter
    kl_weight: float = Field(0.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _collect_options(cls, value: Any) -> Any:
        """Keys that are no field are options; None stands for the function's own default."""
        if not isinstance(value, dict):
            return value
        own = {key: value[key] for key in value if key in cls.model_fields and key != "options"}
        more = {key: value[key] for key in value if key not in cls.model_fields}
        options = value.get("options", {})
        if not isinstance(options, dict):
            return value
        if more.get("clip_low", 0) is None and more.get("ratio_cap") == 2.0:
            del more["ratio_cap"]  # a record written before: every loss had it, as the default
        given = {key: one for key, one in {**options, **more}.items() if one is not None}
        return own | {"options": given}


class OptimSection(Section):
    """Adam and the batch."""

    lr: float = Field(1e-4, gt=0, le=1e30)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    # Optimizer steps per batch. Above 1 the bounds of ppo, gspo and cispo take effect; these then
    # score the later updates' tokens once more before the first step.
    num_updates: int = Field(1, ge=1)
    microbatch_tokens: int = Field(4096, ge=1)  # padded tokens in one forward and backward pass
    share_prompts: bool = True  # a prompt is computed once for its completions, to the same result
    checkpoint_activations: bool = False
    lora_plus_ratio: float = Field(1.0, gt=0)  # LoRA+: rate of B over that of A, which is lr

    @field_validator("betas")
    @classmethod
    def _decay_rates(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each of Adam's betas must be in [0, 1); the article uses [0.9, 0.95]")
        return value


class WarmStartSection(Section):
    """Supervised steps on generated solutions before RL, its own stage; 0 steps: none."""

    num_steps: int = Field(0, ge=0)
    batch_size: int = Field(32, ge=1)  # examples a step
    lr: float = Field(1e-3, gt=0)
    seed: int = 1


class EvalSection(Section):
    """The held-out evaluation during training."""

    num_samples: int = Field(1, ge=1)  # completions a problem
    temperature: float = Field(0.0, ge=0)  # 0: greedy
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)  # None: as in training
    chunk_samples: int = Field(256, ge=1)  # sampled at once, then on disk: what a kill costs

    @model_validator(mode="after")
    def _no_copies(self) -> EvalSection:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples={self.num_samples} greedy completions of a problem are all the same; "
                "set eval.temperature, or eval.num_samples=1"
            )
        return self


class RunConfig(Section):
    """A whole job."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    sampling: SamplingSection = SamplingSection()
    reward: RewardSection = RewardSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optim: OptimSection = OptimSection()
    warm_start: WarmStartSection = WarmStartSection()
    eval: EvalSection = EvalSection()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        check_variant(self.lora, self.optim)
        check_full_dtype(self.lora, self.model.dtype)
        check_served(self.lora, self.sampling)
        check_temperatures(self.sampling, self.eval)
        check_algorithm(self.algorithm)
        if self.sampling.num_samples < 2:
            raise ValueError(
                f"sampling.num_samples=1 gives every group one sample, and algorithm.advantage="
                f"{self.algorithm.advantage!r} is then always 0; take num_samples >= 2"
            )
        if self.algorithm.kl != "none" and self.algorithm.kl_weight == 0:
            raise ValueError(
                f"algorithm.kl={self.algorithm.kl!r} has no effect with kl_weight=0; "
                "set algorithm.kl_weight or algorithm.kl='none'"
            )
        return self


def load_config(path: Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Reads a TOML file, applies dotted overrides (`section.key=value`), checks everything.

    Raises:
        UserError: one line that names the file or key and the fix.
    """
    return parse_config(read_settings(path, overrides, RunConfig))


def read_settings(
    path: Path | None, overrides: list[str] | None, root: type[Section]
) -> dict[str, Any]:
    """A TOML file's settings, to be those of `root`, with the overrides put in; not checked yet.

    Raises:
        UserError: no such file, no TOML, or an override that is none.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        path = find_config(path)
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # no TOML, no UTF-8, or a number of too many digits
            raise UserError(f"{path} is not valid TOML: {error}") from error
    return apply_overrides(raw, overrides or [], root)


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Checks a nested dict. Raises UserError naming the first bad key."""
    return parse_as(RunConfig, raw)


def parse_as(root: type[SomeSection], raw: dict[str, Any]) -> SomeSection:
    """Checks a nested dict as the settings of `root`. Raises UserError naming the first bad key."""
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        raise UserError(_explain(error, root)) from error


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        section = _section_at(first["loc"][:-1], root)
        hint = nearest(str(first["loc"][-1]), section.model_fields)
        return f"config: unknown key {key!r}; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    return f"config: {key} = {first['input']!r}: {message}" if key else f"config: {message}"


def _section_at(location: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel]:
    """The section class that a validation error's location lies in."""
    section = root
    for part in location:
        if isinstance(part, int):
            section = SourceSection
        else:
            annotation = section.model_fields[part].annotation
            is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
            section = cast("type[BaseModel]", annotation) if is_section else SourceSection
    return section
