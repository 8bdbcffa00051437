"""The records passed along the data path; every module may import this one.

prompts -> rollouts (sampler, rewards) -> advantages -> batches -> losses -> learner -> adapter
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rewards import Score

if TYPE_CHECKING:
    import torch

from rl_lora.nn.segments import AttentionLayout

__all__ = [
    "Adapter",
    "Completion",
    "Episode",
    "Microbatch",
    "Probe",
    "Prompt",
    "Rollout",
    "RolloutGroup",
    "SampleParams",
    "Score",
    "SeededParams",
    "TrainSample",
]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, rendered and tokenised once; both sampler and learner take these ids.

    Example: Prompt(prompt_id="chain_sum/17", source="chain_sum", question="What is 4 + 3?",
    reference="7", token_ids=(1, 4093, 198))
    """

    prompt_id: str  # unique within a data set; groups are formed by it, never by text
    source: str  # the data set's name, for metrics by source
    question: str  # the bare question, without template or instruction
    reference: str  # the gold answer; alternatives as `data.references` separates them
    token_ids: tuple[int, ...]  # the rendered prompt, special tokens included
    solution: str = ""  # a worked solution ending in the answer, where the data set has one
    # The row's columns as read, for a reward that asks for them; otherwise empty.
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class SampleParams:
    """How to sample one batch of prompts.

    Example: SampleParams(num_samples=8, max_tokens=96, temperature=1.0, seed=123)
    """

    num_samples: int  # G, completions per prompt
    max_tokens: int
    temperature: float  # 0: greedy
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # strings that end a completion
    seed: int = 0  # of this batch; `seeds.sample_seeds` derives each sample's from it

    def plain(self, max_tokens: int) -> SampleParams:
        """With another limit, and without seeds."""
        return SampleParams(self.num_samples, max_tokens, self.temperature, self.top_p, self.stop)


@dataclass(frozen=True, slots=True)
class SeededParams(SampleParams):
    """Of a call in which each sample's seed is given; `seed` is then not used.

    Example: SeededParams(num_samples=2, max_tokens=96, temperature=1.0, seeds_N_G=((17, 4093),))
    """

    seeds_N_G: tuple[tuple[int, ...], ...] = ()
    # Longest completion of each prompt, at most max_tokens; empty: max_tokens.
    max_tokens_N: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        params: SampleParams,
        seeds_N_G: tuple[tuple[int, ...], ...],
        *,
        num_samples: int | None = None,
        max_tokens_N: tuple[int, ...] = (),
    ) -> SeededParams:
        """The params with seeds; num_samples: another one than theirs."""
        return cls(
            num_samples or params.num_samples,
            params.max_tokens,
            params.temperature,
            params.top_p,
            params.stop,
            seeds_N_G=seeds_N_G,
            max_tokens_N=max_tokens_N,
        )


@dataclass(frozen=True, slots=True)
class Episode:
    """What several turns with an environment add to a completion (`rl_lora.environments`).

    Example: Episode(texts=("<calc>4+3</calc>", "7", "So \\boxed{7}."), is_sampled_T=(True, False,
    True), score=None)
    """

    texts: tuple[str, ...]  # of the policy, the environment, ..., the policy
    is_sampled_T: tuple[bool, ...]  # one per token of the completion; False: the environment's
    score: Score | None  # None: the reward scores the last text

    @property
    def num_turns(self) -> int:
        """Of the policy."""
        return len(self.texts) // 2 + 1


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer.

    Of an episode of several turns, `token_ids` are those of all turns and of what the environment
    said in between, whose log-probs are 0, and `text` is the last turn's.

    Example: Completion(token_ids=(7, 2), text="7", sampler_logprobs_T=(-0.1, -0.7),
    is_truncated=False, adapter_version=3)
    """

    token_ids: tuple[int, ...]  # sampled tokens, the end token included if it was sampled
    text: str  # decoded without special tokens
    sampler_logprobs_T: tuple[float, ...]  # nats, at the sampling temperature, one per token
    is_truncated: bool  # ended by the token cap, not by an end token
    adapter_version: int  # the version that sampled it; -1: the base model without adapter
    episode: Episode | None = None  # None: one turn, and every token was sampled

    @property
    def is_sampled_T(self) -> tuple[bool, ...]:
        """As in `TrainSample`."""
        return () if self.episode is None else self.episode.is_sampled_T

    @property
    def num_sampled(self) -> int:
        """Its sampled tokens."""
        return _num_sampled(self.token_ids, self.is_sampled_T)

    @property
    def own_score(self) -> Score | None:
        """The episode's; None: the reward scores the text."""
        return None if self.episode is None else self.episode.score


def _num_sampled(token_ids: tuple[int, ...], is_sampled_T: tuple[bool, ...]) -> int:
    return sum(is_sampled_T) if is_sampled_T else len(token_ids)


@dataclass(frozen=True, slots=True)
class Rollout:
    """A completion with its score.

    Example: Rollout(completion=Completion(...), score=Score(reward=1.0, correct=True, ...))
    """

    completion: Completion
    score: Score


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The G rollouts of one prompt in one step.

    Example: RolloutGroup(prompt=Prompt(...), rollouts_G=(Rollout(...), Rollout(...)))
    """

    prompt: Prompt
    rollouts_G: tuple[Rollout, ...]
    # Why nothing is learned from it: it has no signal, or others have filled the step; empty: it is
    # learned from (rl_lora.samplers.dynamic).
    left_out: Literal["", "rejected", "surplus"] = ""

    @property
    def rewards_G(self) -> list[float]:
        """Rewards in sampling order; never overwritten by advantages or penalties."""
        return [rollout.score.reward for rollout in self.rollouts_G]

    def terms_G(self) -> dict[str, list[float]]:
        """By term of the reward, its values in sampling order; empty if the reward has no terms."""
        scores_G = [rollout.score for rollout in self.rollouts_G]
        return {term: [score.terms[term] for score in scores_G] for term in scores_G[0].terms}


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One sequence to learn from.

    Example: TrainSample(prompt_ids=(1, 5), completion_ids=(7, 2), sampler_logprobs_T=(-0.1, -0.7),
    advantage=0.5, adapter_version=3)
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    sampler_logprobs_T: tuple[float, ...]  # nats; zeros in supervised fine-tuning (unused there)
    advantage: float  # of every token of the sequence; 1.0 in supervised fine-tuning
    adapter_version: int
    # One per token of the completion. False: an environment's, which is seen but not scored, and
    # counts in no denominator. Empty: every one was sampled.
    is_sampled_T: tuple[bool, ...] = ()

    @property
    def num_sampled(self) -> int:
        """Its sampled tokens."""
        return _num_sampled(self.completion_ids, self.is_sampled_T)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Rows of tokens, and the flat list of completion tokens to score in them.

    Letters: B rows, T positions, C completion tokens and S sequences of the microbatch. Either one
    row without padding holds all prompts, then all completions, which see their prompt and
    themselves (`layout`); or each row is a prompt with one completion, right-padded, under plain
    causal attention. Token c is predicted by the hidden state at [row_C[c], column_C[c]], the one
    before its own (for a completion's first token: the prompt's last): `batches` makes this shift,
    and nothing else does. Tokens that were not sampled have no c. `weights_C` holds the mask and
    the step-wide denominator: a loss is sum(weights_C * loss_C), and microbatch losses add up to
    the whole batch's loss.

    Example: one sequence of prompt (1, 5) and completion (7, 2): token_ids_BT=[[1, 5, 7, 2]],
    row_C=[0, 0], column_C=[1, 2], target_ids_C=[7, 2], sequence_C=[0, 0].
    """

    token_ids_BT: torch.Tensor  # int64; padding is 0, and no real token attends to it
    position_BT: torch.Tensor | None  # int64; None: 0, 1, 2, ... in every row
    layout: AttentionLayout | None  # of the one row; None: plain causal attention
    row_C: torch.Tensor  # int64, row of token_ids_BT
    column_C: torch.Tensor  # int64, position whose hidden state predicts the token
    target_ids_C: torch.Tensor  # int64
    sampler_logprobs_C: torch.Tensor  # float32, nats
    advantages_C: torch.Tensor  # float32
    weights_C: torch.Tensor  # float32; 1/denominator of the step
    sequence_C: torch.Tensor  # int64, number of the token's completion: 0, 1, ... in the microbatch
    samples_S: tuple[TrainSample, ...]  # its sequences, in the order of sequence_C
    num_tokens: int  # real tokens that are computed, without padding
    # float32, nats, of the policy when the step began; None: it has not moved since
    old_logprobs_C: torch.Tensor | None = None

    @property
    def num_sequences(self) -> int:
        """Completions."""
        return len(self.samples_S)


@dataclass(frozen=True, slots=True)
class Probe:
    """Fixed tokens, and the policy's log-probs of them under one adapter version.

    Example: Probe(token_ids_N=((1, 5, 6),), logprobs_N=((-0.5, -1.25),), limit=2e-3)
    """

    token_ids_N: tuple[tuple[int, ...], ...]
    # Nats at temperature 1, of tokens 1, 2, ... of each sequence given those before.
    logprobs_N: tuple[tuple[float, ...], ...]
    limit: float  # nats; the mean |difference| of a healthy sampler is below


@dataclass(frozen=True, slots=True)
class Adapter:
    """A published version of the policy's weights, as `Sampler.set_adapter` takes it.

    Example: Adapter(version=3, name="quickstart-v000003", path=Path("runs/q/adapters/v000003"),
    fingerprint="9f2c...", rank=1)
    """

    version: int  # 0 at start, one more after each step; never reused within a run
    name: str  # never reused: vLLM keys its prefix cache by it
    path: Path  # PEFT directory, or for full fine-tuning a safetensors directory
    fingerprint: str  # sha256 over names and bytes of the tensors
    rank: int  # 0 for full fine-tuning
    # What a sampler with this version must answer; None: it is compared in another way, or not.
    probe: Probe | None = field(default=None, compare=False, repr=False)

    @property
    def is_full(self) -> bool:
        """Whether it is a whole model."""
        return self.rank == 0
