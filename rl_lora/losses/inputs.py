"""What a loss takes, what it requires, and the ratios of a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import Field

if TYPE_CHECKING:
    from torch import Tensor

LowerBound = Annotated[float, Field(gt=0, le=1)]  # the ratio is at least 1 minus this
Floor = Annotated[float, Field(ge=0, le=1)]  # of a ratio; 0: none
Level = Literal["token", "sequence", "geometric"]  # what one ratio belongs to: `at_level`


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
    weights_C: Tensor  # float32, 1/denominator of the step; 0 where `algorithm.mask` drops a token
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

    def log_mismatch(self) -> Tensor:
        """log (old / sampler) [C], without gradient; where the loss does not need the old policy,
        log (policy / sampler)."""
        if self.old_logprobs_C is None:
            return self.policy_logprobs_C.detach() - self.sampler_logprobs_C
        return self.log_ratio_of_old()

    def at_level(self, log_ratio_C: Tensor, level: Level) -> Tensor:
        """[C]: the log-ratio of the token, or of its whole sequence (the sum over its tokens), or
        the logarithm of the sequence's geometric mean (the mean over its tokens)."""
        if level == "token":
            return log_ratio_C
        zeros_B = log_ratio_C.new_zeros(self.num_sequences)
        total_B = zeros_B.index_add(0, self.sequence_C, log_ratio_C)
        if level == "geometric":
            ones_C = log_ratio_C.new_ones(log_ratio_C.shape)
            total_B = total_B / zeros_B.index_add(0, self.sequence_C, ones_C).clamp(min=1)
        return total_B[self.sequence_C]

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
