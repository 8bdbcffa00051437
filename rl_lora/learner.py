"""One optimizer step from microbatches: forward, loss, backward, sum over ranks, clip, step.

Adam with betas (0.9, 0.95) and a constant learning rate, the same for A and B ('LoRA Without
Regret', set-up) unless LoRA+ is asked for. The gradient of a step is the sum over its microbatches:
their weights contain the step-wide denominator already. In a job of several processes every rank
gets all microbatches and runs a share of them; the sum, and so the step, is the same on all.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from rl_lora import distributed
from rl_lora.batches import halves, to_device
from rl_lora.launchers import interruption
from rl_lora.losses import (
    Estimator,
    LossFn,
    LossInputs,
    MaskFn,
    entropy_bonus,
    importance_sampling,
    k3,
    kl_penalty,
    log_loss,
    needs_of,
)
from rl_lora.nn.cpu_workers import map_on_cores
from rl_lora.nn.optimized import l2_norm
from rl_lora.policy import Policy
from rl_lora.schedule import Schedule, parameter_groups
from rl_lora.step_stats import PassStats, StepStats, read_numbers
from rl_lora.types import Microbatch

Objective = Callable[[Microbatch], tuple[Tensor, PassStats]]


@dataclass(frozen=True)
class Share:
    """One process's part of an update."""

    own: list[Microbatch]
    idle: Sequence[Microbatch] = ()  # without weight: passes that only keep other ranks company


def own_share(policy: Policy, microbatches: Sequence[Microbatch]) -> Share:
    """What this process runs of an update's microbatches: about as many tokens as the others.

    Passes over sharded weights are collective, so that all ranks need as many of them.
    """
    parts = distributed.share([batch.token_ids_BT.numel() for batch in microbatches])
    own = [microbatches[index] for index in parts[distributed.rank()]]
    if not policy.is_sharded:
        return Share(own)
    num_idle = max(map(len, parts)) - len(own)
    filler = min(microbatches, key=lambda batch: batch.token_ids_BT.numel())
    filler = replace(filler, weights_C=torch.zeros_like(filler.weights_C))
    return Share(own, [filler] * num_idle)


class Learner:
    """The optimizer and its policy.

    Args:
        policy: what learns.
        lr: the full learning rate.
        schedule: of the rate; None: constant.
        betas, eps, weight_decay: AdamW's.
        grad_clip: largest L2 norm of a step's gradient.
        lora_plus_ratio: LoRA+: the rate of B over that of A, which is lr.
        temperature: of sampling; log-probs are taken at it.
        microbatch_tokens: limit on the size of the microbatches that the learner makes itself.
    """

    # limits: AdamW's knobs, each a keyword with the article's value as its default
    def __init__(
        self,
        policy: Policy,
        lr: float = 1e-4,
        *,
        schedule: Schedule | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_clip: float = 1.0,
        lora_plus_ratio: float = 1.0,
        temperature: float = 1.0,
        microbatch_tokens: int = 4096,
    ) -> None:
        self.policy = policy
        self.lr = lr
        self.schedule = schedule or Schedule()
        self.grad_clip = grad_clip
        self.temperature = temperature
        self.microbatch_tokens = microbatch_tokens
        self._lora_plus_ratio = lora_plus_ratio
        self._adam = partial(
            torch.optim.AdamW,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True if policy.device.type == "cuda" else None,
        )
        self.restart()

    def restart(self) -> None:
        """Fresh Adam moments and step count, for a new stage of training."""
        self.num_updates_done = 0  # the schedule's position; updates without a step count as well
        self.lr_factor = 1.0  # on the rate, of a schedule that is steered by the measured KL
        groups = parameter_groups(self.policy.optimized.tensors, self._lora_plus_ratio)
        self.optimizer: torch.optim.Optimizer = self._adam(groups)

    # limits: a keyword for each term of the loss, and what it means
    def update(
        self,
        updates: Sequence[Sequence[Microbatch]],
        loss: LossFn = importance_sampling,
        *,
        mask: MaskFn | None = None,
        kl_weight: float = 0.0,
        kl_estimator: Estimator = "k3",
        entropy_weight: float = 0.0,
    ) -> dict[str, float]:
        """Policy-gradient steps, one per element of `updates`; returns the step's metrics.

        An update whose advantages are all zero takes no optimizer step (Adam's momentum would move
        the weights without a signal) unless the loss has a KL or entropy term, nor does an empty
        one, or one whose gradient is not finite (learn/nonfinite_updates). All are counted in
        learn/skipped_updates, and the schedule advances. Without any completion token there are no
        metrics of tokens.

        Args:
            updates: what `pack` makes.
            loss: one of `rl_lora.losses` or your own; bind its options by functools.partial.
            mask: of `rl_lora.losses.MASKS`; tokens that it drops have no part in the loss and the
                entropy (the KL counts them). None: all stay.
            kl_weight: of the KL to the base model that is added to the loss; 0: none is.
            kl_estimator: of that KL (`kl_penalty`).
            entropy_weight: of the policy's entropy, which is subtracted from the loss.

        Raises:
            torch.OutOfMemoryError: even microbatches of one sequence take too much memory.
        """
        objective = partial(
            self._policy_objective,
            loss_fn=loss,
            mask=mask,
            kl_weight=kl_weight,
            kl_estimator=kl_estimator,
            entropy_weight=entropy_weight,
        )
        has_terms = bool(kl_weight or entropy_weight)
        stats, counts, norms, kls = StepStats(), Counter[str](), [], []
        num_updates_after = self.num_updates_done + len(updates)
        filled = [microbatches for microbatches in updates if microbatches]
        shares = [own_share(self.policy, microbatches) for microbatches in filled]
        if needs_of(loss).old_logprobs:
            with interruption.abandonable():
                shares[1:] = [self._with_old_logprobs(share, counts) for share in shares[1:]]
        for index, (microbatches, share) in enumerate(zip(filled, shares, strict=True)):
            samples = (sample for batch in microbatches for sample in batch.samples_S)
            has_signal = has_terms or any(sample.advantage != 0 for sample in samples)
            chosen = objective if has_signal else torch.no_grad()(objective)
            # Until the first optimizer step nothing has changed.
            with contextlib.nullcontext() if index else interruption.abandonable():
                passes = self._in_memory(share, chosen, counts)
            for batch, one in passes:
                stats.add(batch, one, update=index)
            self._next_rate()
            if has_signal:
                norms.append(self._step(counts))
            if self.schedule.kind == "kl" and has_signal and math.isfinite(norms[-1]):
                kls.append(self._step_kl(share, passes))
                self.lr_factor = self.schedule.adapted(self.lr_factor, kls[-1])
        self.num_updates_done = num_updates_after
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            **(stats.metrics(len(filled)) if filled else {}),
            **counts,
            "grad/norm": sum(finite) / len(finite) if finite else 0.0,
            "learn/updates": float(len(finite)),
            "learn/skipped_updates": float(len(updates) - len(finite)),
            "learn/nonfinite_updates": float(len(norms) - len(finite)),
            "optim/lr": self.optimizer.param_groups[0]["lr"],
            "adapter/norm": self.parameter_norm(),
            **({"learn/step_kl": sum(kls) / len(kls)} if kls else {}),
        }

    def fit(self, microbatches: Sequence[Microbatch], lr: float | None = None) -> dict[str, float]:
        """One supervised step by log loss (nats a token).

        lr: a constant rate; None: the learner's, by its schedule.

        Raises:
            FloatingPointError: the gradient is not finite; the parameters are left as they were.
        """
        counts = Counter[str]()
        share = own_share(self.policy, microbatches)
        with interruption.abandonable():
            passes = self._in_memory(share, self._log_loss_objective, counts)
        self._next_rate(lr)
        norm = self._step(counts)
        losses = distributed.gather(read_numbers([one.loss for _, one in passes]), "learning")
        rate = self.optimizer.param_groups[0]["lr"]
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"gradient norm is {norm} at update {self.num_updates_done}; lower the learning "
                f"rate ({rate:g})"
            )
        loss = sum(itertools.chain(*losses))
        return {"sft/loss": loss, "grad/norm": norm, "optim/lr": rate, **counts}

    def parameter_norm(self) -> float:
        """L2 norm of all trainable parameters."""
        return l2_norm(p.detach() for p in self.policy.optimized.tensors.values())

    def _passes(self, share: Share, objective: Objective) -> Iterator[tuple[Microbatch, PassStats]]:
        """Forward and backward passes; gradients are summed in the microbatches' order.

        Where the policy learns in parallel, passes run at once. Otherwise nothing in here waits for
        the device. Idle passes are run, too, but not returned.
        """
        microbatches = [*share.own, *share.idle]

        def forward_backward(batch: Microbatch) -> PassStats:
            batch = to_device(batch, self.policy.device)
            with torch.enable_grad():
                loss, one = objective(batch)
                if loss.requires_grad:
                    one.gradients = self.policy.optimized.gradients(loss)
            return one

        with self.policy.training():
            passes = (
                map_on_cores(forward_backward, microbatches)
                if self.policy.learns_in_parallel
                else map(forward_backward, microbatches)
            )
            for number, (batch, one) in enumerate(zip(microbatches, passes, strict=True)):
                if one.gradients:
                    self.policy.optimized.add_gradients(one.gradients)
                    one.gradients = ()
                if number < len(share.own):
                    yield batch, one

    def _in_memory(
        self, share: Share, objective: Objective, counts: Counter[str]
    ) -> list[tuple[Microbatch, PassStats]]:
        """`_passes`, of microbatches half as large where memory runs out (learn/out_of_memory): the
        same sums in another order."""
        while True:
            try:
                return list(self._passes(share, objective))
            except torch.OutOfMemoryError:
                smaller = [half for batch in share.own for half in halves(batch)]
                if len(smaller) == len(share.own) or self.policy.is_sharded:
                    raise
            self.optimizer.zero_grad(set_to_none=False)  # of the passes before
            if self.policy.device.type == "cuda":
                torch.cuda.empty_cache()
            counts["learn/out_of_memory"] += 1
            share = Share(smaller)

    def _with_old_logprobs(self, share: Share, counts: Counter[str]) -> Share:
        """The share with the log-probs of the policy as it is now.

        The first update takes them from its own pass, so that a single update costs no extra one.
        """
        own = [
            replace(batch, old_logprobs_C=one.logprobs_C)
            for batch, one in self._in_memory(share, self._scores, counts)
        ]
        return replace(share, own=own)

    def _policy_objective(
        self,
        batch: Microbatch,
        loss_fn: LossFn,
        mask: MaskFn | None = None,
        kl_weight: float = 0.0,
        kl_estimator: Estimator = "k3",
        entropy_weight: float = 0.0,
    ) -> tuple[Tensor, PassStats]:
        logprobs_C, entropy_C = self.policy.token_logprobs(batch, self.temperature)
        x = loss_inputs(batch, logprobs_C)
        if needs_of(loss_fn).old_logprobs and x.old_logprobs_C is None:
            x = replace(x, old_logprobs_C=logprobs_C.detach())  # the policy has not moved yet
        num_masked: Tensor | None = None
        if mask is not None:
            is_dropped_C = ~mask(x)
            num_masked = is_dropped_C.sum()
            x = replace(x, weights_C=x.weights_C.masked_fill(is_dropped_C, 0.0))
        loss, num_clipped = loss_fn(x)
        one = PassStats(loss.detach(), logprobs_C.detach(), entropy_C, num_clipped, num_masked)
        if kl_weight:
            reference_C = self.policy.reference_logprobs(batch, self.temperature)
            kl = kl_penalty(logprobs_C, reference_C, batch.weights_C, kl_estimator)
            one.kl = kl.detach()
            loss = loss + kl_weight * kl
        if entropy_weight:
            loss = loss - entropy_weight * entropy_bonus(x, entropy_C)
        return loss, one

    @torch.no_grad()
    def _scores(self, batch: Microbatch) -> tuple[Tensor, PassStats]:
        logprobs_C, entropy_C = self.policy.token_logprobs(batch, self.temperature)
        total = logprobs_C.sum()
        return total, PassStats(total, logprobs_C, entropy_C)

    def _log_loss_objective(self, batch: Microbatch) -> tuple[Tensor, PassStats]:
        logprobs_C, entropy_C = self.policy.token_logprobs(batch, temperature=1.0)
        loss, _ = log_loss(loss_inputs(batch, logprobs_C))
        return loss, PassStats(loss.detach(), logprobs_C.detach(), entropy_C)

    def _next_rate(self, constant: float | None = None) -> None:
        """Advances to the next update's learning rate, whether or not it takes a step."""
        self.num_updates_done += 1
        scheduled = self.schedule.rate(self.lr, self.num_updates_done, self.lr_factor)
        for group in self.optimizer.param_groups:
            rate = scheduled if constant is None else constant
            group["lr"] = rate * group.get("lr_ratio", 1.0)

    def _step_kl(self, share: Share, passes: Sequence[tuple[Microbatch, PassStats]]) -> float:
        """KL(policy before the step || policy after it), nats a token, of the update's tokens.

        The k3 estimate, which needs one more forward pass. The tokens are the sampler's, which is
        the policy before the step but for rounding, an older version and the step's earlier
        updates. All tokens count, so that the number of processes makes no difference.
        """
        again = Share([batch for batch, _ in passes], share.idle)
        kls = [
            k3(after.logprobs_C.double() - before.logprobs_C.double())
            for (_, before), (_, after) in zip(
                passes, list(self._passes(again, self._scores)), strict=True
            )
        ]
        own = sum(float(kl_C.sum()) for kl_C in kls), sum(kl_C.numel() for kl_C in kls)
        found = distributed.gather(own, "the KL of a step")
        return sum(kl for kl, _ in found) / sum(count for _, count in found)

    def _step(self, counts: Counter[str]) -> float:
        """Sums gradients over the ranks, clips, steps, clears; returns the norm (L2) before
        clipping. If that is not finite, the step is left out. The sum's bytes and seconds are added
        to `counts`."""
        counts.update(self.policy.optimized.sum_gradients("learning"))
        gradients = [p.grad for p in self.policy.optimized.tensors.values() if p.grad is not None]
        norm = l2_norm(gradients)
        if math.isfinite(norm):
            if norm > self.grad_clip:
                for gradient in gradients:
                    gradient.mul_(self.grad_clip / norm)
            self.optimizer.step()
            self.policy.optimized.write_back()
        self.optimizer.zero_grad(set_to_none=False)  # fresh memory is slow to touch; keep it
        return norm


def loss_inputs(batch: Microbatch, policy_logprobs_C: Tensor) -> LossInputs:
    """What a loss sees of a microbatch."""
    return LossInputs(
        policy_logprobs_C=policy_logprobs_C,
        sampler_logprobs_C=batch.sampler_logprobs_C,
        advantages_C=batch.advantages_C,
        weights_C=batch.weights_C,
        sequence_C=batch.sequence_C,
        num_sequences=batch.num_sequences,
        old_logprobs_C=batch.old_logprobs_C,
    )
