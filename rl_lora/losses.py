"""Policy-gradient losses: pure functions of flat tensors over the C completion tokens.

A loss takes `LossInputs` and keyword options, and returns (loss, num_clipped): the loss is a scalar
sum(weights_C * loss_C), so the mask and the step-wide denominator come in through weights_C and
nothing is divided here; num_clipped is the number of tokens whose gradient the bounds drop.
Log-probs are in nats at the sampling temperature. To add a loss, write the function and its row in
`LOSSES`; to use one from outside the package, pass it to `Learner.update` or write
`algorithm.loss = "module:function"`. Its keywords are its options: [algorithm] sets them by name,
checked against their annotations. `needs` declares what else it requires.

Which loss uses which ratio:

- `importance_sampling` and its truncated form: policy / SAMPLER, the very distribution that the
  tokens came from.
- Losses with bounds (`ppo`, `gspo`, `cispo`): the bounded ratio is policy / old, old being the
  policy itself when the step began, as the papers define it: it is 1 until the policy moves,
  however the sampler rounds and however old its version is. It is multiplied by old / sampler, a
  weight without gradient, truncated at `ratio_cap`: the decoupled objective (arXiv 2110.00641) with
  truncated importance sampling (Ionides 2008; V-trace, arXiv 1802.01561, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypeVar

from pydantic import Field, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0  # nats, of `k3`: e^20 is 5e8, and float32 gradients end at e^88
LowerBound = Annotated[float, Field(gt=0, le=1)]  # the ratio is at least 1 minus this


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One microbatch, seen by a loss.

    Example: LossInputs(policy_logprobs_C=tensor([-0.5]), sampler_logprobs_C=tensor([-0.7]),
    advantages_C=tensor([1.0]), weights_C=tensor([0.1]), sequence_C=tensor([0]), num_sequences=1,
    old_logprobs_C=tensor([-0.6]))
    """

    policy_logprobs_C: Tensor  # float32, nats, carries the gradient
    sampler_logprobs_C: Tensor  # float32, nats
    advantages_C: Tensor  # float32
    weights_C: Tensor  # float32, 1/denominator of the step
    sequence_C: Tensor  # int64, the token's sequence in the microbatch
    num_sequences: int
    # float32, nats, of the policy when the step began; None: the loss does not declare the need
    old_logprobs_C: Tensor | None = None

    def log_ratio_to_old(self) -> Tensor:
        """log (policy / old) [C], with gradient; exactly 0 where the policy has not moved."""
        return self.policy_logprobs_C - self._old()

    def log_ratio_of_old(self) -> Tensor:
        """log (old / sampler) [C], without gradient."""
        return self._old() - self.sampler_logprobs_C

    def _old(self) -> Tensor:
        if self.old_logprobs_C is None:
            raise ValueError("this loss uses old_logprobs_C: decorate it @needs(old_logprobs=True)")
        return self.old_logprobs_C


LossFn = Callable[..., "tuple[Tensor, Tensor | int]"]  # of LossInputs and the loss's own keywords
AnyLoss = TypeVar("AnyLoss", bound=LossFn)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a loss requires besides `LossInputs`' other fields.

    Example, of GSPO: Needs(old_logprobs=True, denominator="sequences")
    """

    old_logprobs: bool = False  # costs a forward pass for each update of a step after the first
    denominator: str | None = None  # the only algorithm.denominator that it is defined with


def needs(
    *, old_logprobs: bool = False, denominator: str | None = None
) -> Callable[[AnyLoss], AnyLoss]:
    """Decorates a loss with its `Needs`."""

    def mark(loss: AnyLoss) -> AnyLoss:
        loss.needs = Needs(old_logprobs, denominator)  # type: ignore[attr-defined]
        return loss

    return mark


def needs_of(loss: LossFn) -> Needs:
    """The loss's `Needs`, also of a `functools.partial` of it."""
    function = loss.func if isinstance(loss, partial) else loss
    found: Needs = getattr(function, "needs", Needs())
    return found


def importance_sampling(x: LossInputs) -> tuple[Tensor, int]:
    """-sum w * (p_policy / p_sampler) * A, unclipped ('LoRA Without Regret', RL set-up).

    Its gradient is ratio * A * grad log p. With on-policy samples the ratio is 1, and this is
    REINFORCE.
    """
    ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).exp()
    return -(x.weights_C * ratio_C * x.advantages_C).sum(), 0


def truncated_importance_sampling(
    x: LossInputs, *, ratio_cap: PositiveFloat = 2.0
) -> tuple[Tensor, int]:
    """-sum w * min(ratio, cap) * A * log p, the weight without gradient.

    Truncated importance sampling (Ionides 2008, 'Truncated Importance Sampling'; in RL V-trace,
    arXiv 1802.01561, section 4.1). Below the cap its gradient is that of `importance_sampling`;
    above it the token still counts, with the capped weight: no gradient is dropped.
    """
    ratio_C = (x.policy_logprobs_C - x.sampler_logprobs_C).detach().exp()
    weight_C = ratio_C.clamp(max=ratio_cap)
    return -(x.weights_C * weight_C * x.advantages_C * x.policy_logprobs_C).sum(), 0


@needs(old_logprobs=True)
def ppo(
    x: LossInputs,
    *,
    clip_low: LowerBound = 0.2,
    clip_high: PositiveFloat = 0.28,
    ratio_cap: PositiveFloat = 2.0,
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7) with DAPO's separate bounds
    (arXiv 2503.14476, equation 10): min(r A, clip(r, 1 - low, 1 + high) A), r = policy / old, times
    the truncated weight old / sampler. The default bounds are DAPO's."""
    weight_C = x.log_ratio_of_old().exp().clamp(max=ratio_cap)
    return _clipped_surrogate(x, x.log_ratio_to_old().exp(), weight_C, clip_low, clip_high)


@needs(old_logprobs=True, denominator="sequences")
def gspo(
    x: LossInputs,
    *,
    clip_low: LowerBound = 3e-4,
    clip_high: PositiveFloat = 4e-4,
    ratio_cap: PositiveFloat = 2.0,
) -> tuple[Tensor, Tensor]:
    """GSPO (arXiv 2507.18071, equations 5-7): one ratio a sequence, the geometric mean over its
    tokens, clipped as in PPO; the weight old / sampler is the sequence's geometric mean as well.
    The default bounds are the paper's (section 5.1)."""
    ratio_C = _sequence_means(x, x.log_ratio_to_old()).exp()
    weight_C = _sequence_means(x, x.log_ratio_of_old()).exp().clamp(max=ratio_cap)
    return _clipped_surrogate(x, ratio_C, weight_C, clip_low, clip_high)


@needs(old_logprobs=True)
def cispo(
    x: LossInputs,
    *,
    clip_low: LowerBound = 1.0,
    clip_high: PositiveFloat = 0.28,
    ratio_cap: PositiveFloat = 2.0,
) -> tuple[Tensor, int]:
    """CISPO (MiniMax-M1, arXiv 2506.13585, equation 4): the clipped ratio policy / old is a weight
    without gradient, so no token's gradient is dropped; it is multiplied by the truncated weight
    old / sampler.

    The paper (section 3.1) has no lower bound and tunes the upper one without giving its value:
    0.28 is DAPO's for PPO, and our choice here.
    """
    weight_C = x.log_ratio_to_old().detach().exp().clamp(1 - clip_low, 1 + clip_high)
    weight_C = weight_C * x.log_ratio_of_old().exp().clamp(max=ratio_cap)
    return -(x.weights_C * weight_C * x.advantages_C * x.policy_logprobs_C).sum(), 0


def log_loss(x: LossInputs) -> tuple[Tensor, int]:
    """-sum w * log p, for supervised fine-tuning; advantages and sampler log-probs are unused."""
    return -(x.weights_C * x.policy_logprobs_C).sum(), 0


LOSSES: dict[str, LossFn] = {
    "importance_sampling": importance_sampling,
    "truncated_importance_sampling": truncated_importance_sampling,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
}


def kl_penalty(
    policy_logprobs_C: Tensor, reference_logprobs_C: Tensor, weights_C: Tensor
) -> Tensor:
    """sum w * k3 (GRPO, arXiv 2402.03300, equation 4); a float64 scalar.

    For tokens that the policy samples the value is an unbiased estimate of KL(policy || reference).
    Its gradient is not one of that KL's gradient: its mean, -E_reference[grad log p_policy], is the
    gradient of KL(reference || policy). `algorithm.kl = "reward"` follows the gradient of
    KL(policy || reference).
    """
    return (weights_C * k3(reference_logprobs_C.double() - policy_logprobs_C.double())).sum()


def k3(log_ratio_C: Tensor) -> Tensor:
    """exp(d) - d - 1 in float64: a non-negative estimate of KL(p || q) for tokens from p.

    In float32 everything below 4e-9 nats would be rounding noise of either sign. Above
    MAX_LOG_RATIO the exponential is replaced by its tangent there: values and gradients stay
    finite, and a token that is further off is still pulled back.

    Args:
        log_ratio_C: d = log q - log p, nats, subtracted in float64.
    """
    d_C = log_ratio_C.double()
    bounded_C = d_C.clamp(max=MAX_LOG_RATIO)
    return bounded_C.expm1() * (1 + d_C - bounded_C) - bounded_C


def _clipped_surrogate(
    x: LossInputs, ratio_C: Tensor, weight_C: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    plain_C = ratio_C * x.advantages_C
    clipped_C = ratio_C.clamp(1 - low, 1 + high) * x.advantages_C
    surrogate_C = plain_C.minimum(clipped_C) * weight_C
    return -(x.weights_C * surrogate_C).sum(), (clipped_C < plain_C).sum()


def _sequence_means(x: LossInputs, values_C: Tensor) -> Tensor:
    """[C]: each token's value replaced by the mean over its sequence."""
    zeros_B = values_C.new_zeros(x.num_sequences)
    total_B = zeros_B.index_add(0, x.sequence_C, values_C)
    count_B = zeros_B.index_add(0, x.sequence_C, values_C.new_ones(values_C.shape))
    return (total_B / count_B.clamp(min=1))[x.sequence_C]
