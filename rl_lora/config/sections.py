"""A job's settings: frozen sections, checked before any long work.

The comments next to the fields are the text of docs/configuration.md
(scripts/docs_configuration.py).
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rl_lora.config.algorithm import check_algorithm
from rl_lora.config.checks import (
    check_backend,
    check_entropy,
    check_environment,
    check_environment_name,
    check_gdpo,
    check_kl,
    check_penalties,
    check_pushes,
    check_quantize,
    check_resources,
    check_served,
    check_temperatures,
    check_variant,
)
from rl_lora.config.data import DataSection
from rl_lora.config.dynamic import check_dynamic
from rl_lora.config.presets import with_preset
from rl_lora.config.resources import ResourcesSection
from rl_lora.config.section import Section


class RunSection(Section):
    """Name, length and outputs of the run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # of the run folder
    seed: int = Field(0, ge=0)  # of the weights' initialization, sampling and the data's order
    num_steps: int = Field(100, ge=0)  # training steps, each one batch of rollouts
    output_dir: str = "runs"  # the run folder is output_dir/name
    eval_every: int = Field(0, ge=0)  # steps; 0: only before the first and after the last
    checkpoint_every: int = Field(1, ge=1)  # steps between checkpoints
    keep_last: int = Field(2, ge=1)  # number of checkpoints kept
    transcripts_per_step: int = Field(8, ge=0)  # completions saved in full per step
    # Several processes: how long they wait for one that is late, until the job ends.
    process_timeout_s: float = Field(1800, gt=0)
    # Where metrics go besides metrics.jsonl.
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    # Hub repository, owner/name, that gets the adapter with its model card at the end of an RL run.
    # One that does not exist yet is made, private.
    push_to: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$")
    push_every: int = Field(0, ge=0)  # steps between further pushes; 0: only at the end

    @property
    def folder(self) -> Path:
        """output_dir/name."""
        return Path(self.output_dir) / self.name

    @model_validator(mode="after")
    def _target(self) -> RunSection:
        if self.push_every and self.push_to is None:
            raise ValueError(
                f"push_every={self.push_every} has no effect without run.push_to; set it to "
                "owner/name, or remove push_every"
            )
        return self


class ModelSection(Section):
    """The base model."""

    name: str = "smollm2-135m-instruct"  # a built-in model, a local directory or a hub id
    revision: str | None = None  # branch, tag or commit of a hub id
    # Release date, YYYY-MM-DD, for the evaluation's note on contamination; none: looked up by name.
    released: date | None = None
    # A torch device; auto: cuda if available. With several processes each has its own GPU.
    device: str = "auto"
    # auto: bfloat16 if its matmul is faster than float32's on the device.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool | None = None  # the learner's layers and head are compiled; none: on a GPU
    # Each process holds a share of the weights (FSDP2); none: of several with lora.mode="full".
    shard: bool | None = None
    # The frozen base in 8 or 4 bits (QLoRA; extra `quant`): int8, nf4; none: in dtype.
    quantize: Literal["int8", "nf4"] | None = None


# As their papers spell them; plain LoRA is not a variant.
VARIANT_NAMES = {"rslora": "rsLoRA", "pissa": "PiSSA", "olora": "OLoRA", "dora": "DoRA"}


class LoraSection(Section):
    """The policy: W' = W + (alpha / rank) B A ('LoRA Without Regret', set-up)."""

    mode: Literal["lora", "full"] = "lora"  # full: all weights are trained, by the same loop
    rank: int = Field(1, ge=1, le=512)  # inner dimension of the product B A
    alpha: float = Field(32.0, gt=0, le=1e6)  # the product is scaled by alpha / rank
    layers: Literal["all", "attention", "mlp"] = "all"  # linear layers that get an adapter
    lm_head: bool = False  # an adapter on the output layer, too
    # rsLoRA, PiSSA, OLoRA or DoRA instead of plain LoRA (rl_lora.nn.variants).
    variant: Literal["lora", "rslora", "pissa", "olora", "dora"] = "lora"


class SamplingSection(Section):
    """Rollouts. Always top_p = 1 and no top_k: importance ratios need the whole distribution."""

    backend: str = "vllm"  # vllm, torch, or your own as module:Class (rl_lora.build.make_sampler)
    num_prompts: int = Field(16, ge=1)  # prompts per step
    num_samples: int = Field(8, ge=1)  # completions per prompt, the group size G
    # Dynamic sampling (DAPO): groups without signal are left out and replaced by those of further
    # prompts, until num_prompts have signal, in so many rounds of sampling at most.
    max_rounds: int = Field(1, ge=1)
    # Prompts of each round, as a multiple of the groups with signal that are missing. What then is
    # too many is not learned from. 1 with max_rounds = 1: all groups are learned from.
    oversample: float = Field(1.0, ge=1, le=100)
    max_tokens: int = Field(256, ge=1)  # longest completion; of an environment, a whole episode
    temperature: float = Field(1.0, gt=0)  # at least 0.01 with vllm, 1e-6 with torch
    stop: tuple[str, ...] = ()  # strings that end a completion (base models with few-shot prompts)
    # Sequences decoded at once; none: chosen for the machine.
    max_num_seqs: int | None = Field(None, ge=1)
    eager: bool | None = None  # vLLM without compilation; none: on a CPU, except for long jobs
    attention_backend: str | None = None  # vLLM's on a GPU, e.g. TRITON_ATTN; none: its choice
    # Merge the adapter into vLLM's own copy of the weights; none: in float32.
    merge_adapter: bool | None = None
    # Share of the GPU's memory for vLLM; none: what the learner leaves free while sampling.
    memory_fraction: float | None = Field(None, gt=0, le=0.95)
    # Sampler-learner mismatch (KL, nats) at which the run stops; none: 1e-4 in float32, 2e-2 in
    # bfloat16.
    max_kl: float | None = Field(None, gt=0)
    # By how many adapter versions samples may be older than the policy that learns from them:
    # sampling runs so many steps ahead while the learner works. 0: they take turns.
    max_staleness: int = Field(0, ge=0)
    # vLLM gave no token for so many seconds: it hangs, and is started again.
    timeout_s: float = Field(600, gt=0)
    # How often in a row vLLM is started again where it fails or hangs, until the run stops.
    max_restarts: int = Field(2, ge=0)

    _known_backend = field_validator("backend")(check_backend)

    @field_validator("stop")
    @classmethod
    def _some_text(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value:
            raise ValueError("an empty string matches everywhere; remove it")
        return value


class EnvironmentSection(Section):
    """Several turns: what answers the policy after each one (rl_lora.environments)."""

    # calculator, retry, or your own as module:Class; none: a completion is one turn.
    name: str | None = None
    max_turns: int = Field(4, ge=1)  # of the policy, in one episode
    role: Literal["user", "tool"] = "user"  # of its messages in the chat template
    options: dict[str, Any] = Field(default_factory=dict)  # keywords of the class

    _known_name = field_validator("name")(check_environment_name)


class RewardTermSection(Section):
    """One term of a reward of several."""

    name: str  # math, math_verify, format (1 for an answer in a \boxed{}), or module:function
    weight: float = 1.0  # of its values in the sum; 0: it is only logged
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]+$")  # in metrics; none: from the name
    sources: tuple[str, ...] = ()  # data sets that it applies to, as metrics call them; empty: all

    @property
    def key(self) -> str:
        """What metrics and transcripts call it."""
        return self.label or self.name.rpartition(":")[2]


class RewardSection(Section):
    """The reward of a completion."""

    name: str = "math"  # math, math_verify, format, or your own as module:function
    # Several rewards instead, whose weighted sum is the reward. The first that applies to a problem
    # says whether its completions are correct.
    terms: tuple[RewardTermSection, ...] = ()
    policy: str = "default"  # grading rules of the verifier: default, gsm8k, math, deepmath, aime
    format_weight: float = Field(0.0, ge=0, le=1)  # added if the answer is in a \boxed{}
    # DAPO's soft penalty of length: over the last so many tokens before sampling.max_tokens the
    # reward falls linearly, by overlong_weight at the limit. 0: none.
    overlong_tokens: int = Field(0, ge=0)
    overlong_weight: float = Field(1.0, gt=0)  # what a completion at the limit loses
    thinking_tags: tuple[tuple[str, str], ...] = ()  # more [opening, closing] pairs to recognize
    num_workers: int = Field(1, ge=1)  # processes for symbolic comparisons
    timeout_s: float = Field(5.0, gt=0)  # seconds for one symbolic comparison

    @field_validator("terms", mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        """A plain string is a term's name."""
        if isinstance(value, str | dict):
            value = (value,)
        return tuple({"name": item} if isinstance(item, str) else item for item in value)

    @model_validator(mode="after")
    def _term_names(self) -> RewardSection:
        if self.terms and self.name != "math":
            raise ValueError(
                f"name={self.name!r} has no effect with reward.terms; list it there as well, or "
                "remove one of them"
            )
        keys = [term.key for term in self.terms]
        for key in keys:
            if keys.count(key) > 1 or key == "mean":
                why = "is a metric of the whole reward" if key == "mean" else "is there twice"
                raise ValueError(f"terms: the name {key!r} {why}; set the term's label")
        return self


class AlgorithmSection(Section):
    """Advantage, loss and KL. The defaults are the article's."""

    # A named set of the settings below, for those that are not given (rl_lora.config.presets).
    preset: Literal["none", "lora_without_regret", "dapo", "dr_grpo", "gspo", "cispo"] = "none"
    advantage: str = "group_mean"  # a row of rl_lora.advantages.ADVANTAGES, or module:function
    loss: str = "importance_sampling"  # a row of rl_lora.losses.LOSSES, or module:function
    # Tokens too far off the sampler that are dropped: by their own ratio, their sequence's, or its
    # geometric mean (rl_lora.losses.masks).
    mask: Literal["none", "token", "sequence", "geometric"] = "none"
    # Keywords of loss, advantage and mask, e.g. clip_low, clip_high and ratio_cap of ppo. They may
    # also be written next to the other keys: algorithm.clip_low.
    options: dict[str, Any] = Field(default_factory=dict)
    # What a step's summed loss is divided by: completion tokens; sequences times the length of each
    # token's own sequence; or sequences times sampling.max_tokens (Dr. GRPO).
    denominator: Literal["tokens", "sequences", "max_tokens"] = "tokens"
    kl: Literal["none", "loss", "reward"] = "none"  # where KL to the base model is penalized
    kl_weight: float = Field(0.0, ge=0)  # factor of the KL penalty
    # Estimator of the KL; none: k3 in the loss (its gradient is that of KL(base || policy); of k2
    # it is that of KL(policy || base)), and k1 in the reward.
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    entropy_weight: float = Field(0.0, ge=0)  # factor of the policy's entropy, which is raised
    # Nats a token: the entropy is raised only in steps whose samples have less; none: in all steps.
    entropy_floor: float | None = Field(None, gt=0)
    # Nothing is learned from completions that sampling.max_tokens has cut off; their rewards still
    # count in their group's advantages.
    mask_truncated: bool = False
    # KL of the policy to the base model (nats a token, on each step's rollouts) above which the run
    # stops; none: never, and nothing is computed for it.
    max_kl_to_base: float | None = Field(None, gt=0)

    @property
    def needs_base(self) -> bool:
        """Whether the base model's log-probs are needed next to the policy's."""
        return self.kl != "none" or self.max_kl_to_base is not None

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
            del more["ratio_cap"]  # an older record, which has the default of all losses
        given = {key: one for key, one in {**options, **more}.items() if one is not None}
        return with_preset(own | {"options": given})


class OptimSection(Section):
    """Adam and the batch."""

    lr: float = Field(1e-4, gt=0, le=1e30)  # learning rate; `rl-lora lr MODEL` suggests one
    # Of the rate: linear and cosine end at 0; kl raises and lowers it, so that each optimizer step
    # moves the policy by about target_kl (measured by one more forward pass).
    schedule: Literal["constant", "linear", "cosine", "kl"] = "constant"
    # Nats a token, KL(before || after) of one optimizer step, for schedule = "kl".
    target_kl: float | None = Field(None, gt=0)
    warmup_steps: int = Field(0, ge=0)  # steps in which the rate rises from 0
    betas: tuple[float, float] = (0.9, 0.95)  # Adam's decay rates
    eps: float = Field(1e-8, ge=0)  # Adam's epsilon
    weight_decay: float = Field(0.0, ge=0)  # decoupled, as in AdamW
    grad_clip: float = Field(1.0, gt=0)  # largest norm of the gradient
    # Steps whose gradient is not finite are left out; so many in a row end the run.
    max_nonfinite_steps: int = Field(3, ge=1)
    # Optimizer steps per batch. Above 1 the bounds of ppo, gspo and cispo take effect; these then
    # score the later updates' tokens once more before the first step.
    num_updates: int = Field(1, ge=1)
    # Padded tokens in one forward and backward pass; none: 4,096 on a CPU, and on a GPU 16,384 (of
    # smaller models up to 65,536), or what fits its free memory.
    microbatch_tokens: int | None = Field(None, ge=1)
    share_prompts: bool = True  # a prompt is computed once for its completions, to the same result
    checkpoint_activations: bool = False  # recompute activations: less memory, more time
    lora_plus_ratio: float = Field(1.0, gt=0)  # LoRA+: rate of B over that of A, which is lr

    @model_validator(mode="after")
    def _target(self) -> OptimSection:
        if self.schedule == "kl" and self.target_kl is None:
            raise ValueError(
                "schedule='kl' needs a target: set optim.target_kl, e.g. to learn/step_kl of a run "
                "that learns well (1e-4 to 1e-3 nats a token)"
            )
        if self.schedule != "kl" and self.target_kl is not None:
            raise ValueError(
                f"target_kl={self.target_kl:g} has no effect with schedule={self.schedule!r}; set "
                "optim.schedule='kl', or remove it"
            )
        return self

    @field_validator("betas")
    @classmethod
    def _decay_rates(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("each of Adam's betas must be in [0, 1); the article uses [0.9, 0.95]")
        return value


class WarmStartSection(Section):
    """Supervised steps on the data's worked solutions before RL."""

    num_steps: int = Field(0, ge=0)  # 0: no warm start
    batch_size: int = Field(32, ge=1)  # examples per step
    lr: float = Field(1e-3, gt=0)  # learning rate
    seed: int = 1  # of the examples' order


class EvalSection(Section):
    """Evaluation on held-out problems, during training and with `rl-lora eval`."""

    num_samples: int = Field(1, ge=1)  # completions per problem
    temperature: float = Field(0.0, ge=0)  # 0: greedy
    top_p: float = Field(1.0, gt=0, le=1)  # nucleus sampling; 1: off
    max_tokens: int | None = Field(None, ge=1)  # longest completion; none: as in training
    chunk_samples: int = Field(256, ge=1)  # completions between saves; a killed process loses one

    @model_validator(mode="after")
    def _no_copies(self) -> EvalSection:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"num_samples={self.num_samples} greedy completions of a problem are identical; "
                "set eval.temperature above 0, or eval.num_samples=1"
            )
        return self


class RunConfig(Section):
    """An RL job."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    data: DataSection = DataSection()
    sampling: SamplingSection = SamplingSection()
    environment: EnvironmentSection = EnvironmentSection()
    reward: RewardSection = RewardSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optim: OptimSection = OptimSection()
    warm_start: WarmStartSection = WarmStartSection()
    eval: EvalSection = EvalSection()
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        check_resources(self.resources, self.lora, self.sampling)
        check_environment(self.environment, self.resources, self.sampling.max_staleness)
        check_variant(self.lora, self.optim)
        check_quantize(self.model, self.lora)
        check_pushes(self.run, self.lora)
        check_served(self.lora, self.sampling, self.resources)
        check_temperatures(self.sampling, self.eval)
        check_kl(self.algorithm)
        check_entropy(self.algorithm)
        check_penalties(self.algorithm, self.reward, self.sampling)
        check_gdpo(self.algorithm, self.reward)
        check_dynamic(self.sampling)
        check_algorithm(self.algorithm)
        if self.sampling.num_samples < 2:
            raise ValueError(
                f"sampling.num_samples=1 gives every group one sample, and algorithm.advantage="
                f"{self.algorithm.advantage!r} is then always 0; set it to 2 or more"
            )
        return self
