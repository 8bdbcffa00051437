"""One optimizer step from microbatches: forward, loss, backward, clip, step.

Adam with betas (0.9, 0.95) and a constant learning rate, one rate for A and B
('LoRA Without Regret', set-up) unless LoRA+ is asked for. The gradient of a step is the sum over
its microbatches: their weights hold the step-wide denominator already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_lora.batches import make_samples, pack, to_device
from rl_lora.config import AlgorithmSection, OptimSection
from rl_lora.config.checks import check_full_dtype
from rl_lora.losses import LOSSES, RATIO_TO_OLD, LossInputs, k3, kl_penalty, log_loss
from rl_lora.nn.cpu_workers import map_on_cores
from rl_lora.policy import Policy
from rl_lora.types import Microbatch, RolloutGroup

_RATIO_QUANTILES = (0.01, 0.5, 0.99)


def learning_rate(optim: OptimSection, step: int, num_steps: int) -> float:
    """The rate of optimizer step `step` = 1, 2, ...; constant is the article's choice."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    span = max(1, num_steps - optim.warmup_steps)
    done = min(1.0, (step - optim.warmup_steps - 1) / span)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[optim.schedule]
    return optim.lr * factor


def parameter_groups(
    parameters: Mapping[str, torch.nn.Parameter], ratio: float
) -> list[dict[str, Any]]:
    """One group of all parameters, or LoRA+'s two (Hayou et al., arXiv 2402.12354, section 5).

    B has `lr_ratio` times the rate of A; DoRA's magnitudes go with B, as in PEFT's optimizer.

    Args:
        parameters: trainable ones by name, lora_A and lora_B among them.
        ratio: of the rates of B and A; 1: one group in the parameters' order.
    """
    if ratio == 1:
        return [{"params": list(parameters.values())}]
    of_b = {name for name, p in parameters.items() if "lora_B" in name or p.dim() == 1}
    return [
        {"params": [p for name, p in parameters.items() if name not in of_b]},
        {"params": [p for name, p in parameters.items() if name in of_b], "lr_ratio": ratio},
    ]


def quantiles(values: Tensor, levels: Sequence[float]) -> list[float]:
    """Quantiles of a float tensor on the CPU, linearly interpolated in float64.

    As `torch.quantile`, which takes no more than 2^24 elements.
    """
    ranks = [level * (values.numel() - 1) for level in levels]
    places = sorted({place for rank in ranks for place in (math.floor(rank), math.ceil(rank))})
    ordered = torch.from_numpy(np.partition(values.numpy().ravel(), places)).double()
    below, above = (ordered[[int(f(rank)) for rank in ranks]] for f in (math.floor, math.ceil))
    fractions = [rank - math.floor(rank) for rank in ranks]
    return below.lerp(above, below.new_tensor(fractions)).tolist()


class TokenRecord:
    """What the forward passes of a step saw, kept on the CPU for the metrics."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.num_clipped = 0
        self.num_tokens = 0
        self.num_padded = 0

    def add(self, batch: Microbatch, policy_logprobs_C: Tensor, entropy_C: Tensor) -> None:
        """One microbatch's log-probs (nats) and entropies (nats)."""
        row = (policy_logprobs_C.detach(), batch.sampler_logprobs_C, entropy_C.detach())
        self._rows.append(tuple(t.float().cpu() for t in row))  # type: ignore[arg-type]
        self.num_tokens += batch.num_tokens
        self.num_padded += batch.token_ids_BT.numel()

    def metrics(self) -> dict[str, float]:
        """Ratios and the sampler-policy mismatch over all the step's completion tokens.

        ratio/* are of policy to sampler, whatever ratio the loss bounds; mismatch/kl is the k3
        estimate of KL(sampler || policy) in nats a token, computed in float64.
        """
        policy_C, sampler_C, entropy_C = (torch.cat(t) for t in zip(*self._rows, strict=True))
        difference_C = policy_C - sampler_C
        ratio_C = difference_C.exp()
        out = {
            "ratio/mean": ratio_C.mean(),
            "ratio/max": ratio_C.max(),
            "mismatch/kl": k3(policy_C.double() - sampler_C.double()).mean(),
            "mismatch/abs_mean": difference_C.abs().mean(),
            "mismatch/abs_max": difference_C.abs().max(),
            "entropy/mean": entropy_C.mean(),
            "clip/fraction": torch.tensor(self.num_clipped / policy_C.numel()),
            "learn/completion_tokens": torch.tensor(policy_C.numel()),
            "learn/tokens": torch.tensor(self.num_tokens),
            "learn/padding_fraction": torch.tensor(1 - self.num_tokens / self.num_padded),
        }
        found = zip(_RATIO_QUANTILES, quantiles(ratio_C, _RATIO_QUANTILES), strict=True)
        return {f"ratio/p{int(level * 100):02d}": value for level, value in found} | {
            name: float(value) for name, value in out.items()
        }


@dataclass
class PassStats:
    """What one pass leaves behind."""

    loss: float
    kl: float
    logprobs_C: Tensor
    entropy_C: Tensor
    num_clipped: int
    gradients: Sequence[Tensor | None] = ()  # of the trainable parameters, where passes run at once


Objective = Callable[[Microbatch], tuple[Tensor, PassStats]]


class Learner:
    """The optimizer and its policy.

    Raises:
        UserError: the policy is in full fine-tuning in bfloat16.
    """

    def __init__(
        self,
        policy: Policy,
        optim: OptimSection,
        algorithm: AlgorithmSection,
        *,
        temperature: float,
        num_steps: int,
    ) -> None:
        check_full_dtype(policy.lora, str(policy.dtype).removeprefix("torch."))
        self.policy = policy
        self.optim = optim
        self.algorithm = algorithm
        self.temperature = temperature
        self.num_steps = num_steps  # of optimizer steps, for the schedule
        self.num_updates_done = 0  # the schedule's place: updates without a step count as well
        self.optimizer = self._make_optimizer()

    def restart(self) -> None:
        """Fresh Adam moments and step count, for a new stage of training."""
        self.num_updates_done = 0
        self.optimizer = self._make_optimizer()

    def update(self, updates: Sequence[Sequence[Microbatch]]) -> dict[str, float]:
        """Policy-gradient steps, one an element of `updates`; returns the step's metrics.

        An update whose advantages are all zero takes no optimizer step (Adam's momentum would move
        the weights without a signal), but for the one to the KL where that is in the loss. It is
        counted in learn/skipped_updates; the schedule goes on.
        """
        record, clean = TokenRecord(), TokenRecord()
        loss_total = kl_total = 0.0
        norms: list[float] = []
        num_updates_after = self.num_updates_done + max(len(updates), self.optim.num_updates)
        for index, microbatches in enumerate(self._with_old_logprobs(updates)):
            self._next_rate(self.optim.lr)
            has_signal = self.algorithm.kl == "loss" or any(
                bool(b.advantages_C.any()) for b in microbatches
            )
            objective = self._policy_objective if has_signal else self._without_gradient
            for batch, stats in self._passes(microbatches, objective):
                loss_total, kl_total = loss_total + stats.loss, kl_total + stats.kl
                record.add(batch, stats.logprobs_C, stats.entropy_C)
                record.num_clipped += stats.num_clipped
                if index == 0:  # only before the first step is the policy the sampled version
                    clean.add(batch, stats.logprobs_C, stats.entropy_C)
            if has_signal:
                norms.append(self._step(self.optim.lr))
        self.num_updates_done = num_updates_after  # a step of few samples has fewer updates
        metrics = record.metrics() | {
            k: v for k, v in clean.metrics().items() if k.startswith("mismatch/")
        }
        return metrics | {
            "loss/policy": loss_total / len(updates),
            **({"loss/kl": kl_total / len(updates)} if self.algorithm.kl == "loss" else {}),
            "grad/norm": sum(norms) / len(norms) if norms else 0.0,
            "learn/updates": float(len(norms)),
            "learn/skipped_updates": float(len(updates) - len(norms)),
            "optim/lr": self.optimizer.param_groups[0]["lr"],
            "adapter/norm": self.parameter_norm(),
        }

    def fit(
        self, microbatches: Sequence[Microbatch], lr: float, *, is_scheduled: bool = True
    ) -> dict[str, float]:
        """One supervised step by log loss (nats a token), at a learning rate of its own.

        is_scheduled: the rate follows `optim.schedule`; False: it is constant.
        """
        total = sum(stats.loss for _, stats in self._passes(microbatches, self._log_loss_objective))
        self._next_rate(lr, is_scheduled)
        norm = self._step(lr)
        return {"sft/loss": total, "grad/norm": norm, "optim/lr": lr}

    def penalised_rewards(
        self, groups_N: Sequence[RolloutGroup], microbatch_tokens: int
    ) -> tuple[list[list[float]], dict[str, float]]:
        """rewards_N_G, with kl = "reward" less kl_weight times each sequence's KL to the base, the
        sum over its tokens of log p_sampler - log p_reference (InstructGPT, arXiv 2203.02155,
        equation 2).

        The groups' own rewards stay as they are.

        Returns:
            The rewards, and as metrics reward/kl, the k3 estimate of KL(sampler || base) in nats a
            token, and reward/kl_penalty, what a completion's reward has lost on average.
        """
        if self.algorithm.kl != "reward":
            return [group.rewards_G for group in groups_N], {}
        numbers_N_G, position = [], 0
        for group in groups_N:
            numbers_N_G.append([float(position + i) for i in range(len(group.rollouts_G))])
            position += len(group.rollouts_G)
        kl = [0.0] * position  # the advantage field carries the sequence's number through pack
        kl_total, num_tokens = 0.0, 0
        (batches,) = pack(
            make_samples(groups_N, numbers_N_G),
            denominator="tokens",
            max_tokens=1,
            microbatch_tokens=microbatch_tokens,
            keep_zero_advantage=True,
        )
        for batch in batches:
            batch = to_device(batch, self.policy.device)
            reference_C = self.policy.reference_logprobs(batch, self.temperature)
            log_ratio_C = batch.sampler_logprobs_C.double() - reference_C.double()
            kl_total, num_tokens = (
                kl_total + float(k3(-log_ratio_C).sum()),
                num_tokens + len(log_ratio_C),
            )
            for number, value in zip(
                batch.advantages_C.tolist(), log_ratio_C.tolist(), strict=True
            ):
                kl[int(number)] += value
        weight = self.algorithm.kl_weight
        penalised_N_G = [
            [
                reward - weight * kl[int(number)]
                for reward, number in zip(group.rewards_G, numbers_G, strict=True)
            ]
            for group, numbers_G in zip(groups_N, numbers_N_G, strict=True)
        ]
        return penalised_N_G, {
            "reward/kl": kl_total / num_tokens,
            "reward/kl_penalty": weight * sum(kl) / len(kl),
        }

    def parameter_norm(self) -> float:
        """L2 norm of all trainable parameters."""
        norms = [p.detach().float().norm() for p in self.policy.trainable().values()]
        return float(torch.stack(norms).norm())

    def _make_optimizer(self) -> torch.optim.Optimizer:
        optim = self.optim
        return torch.optim.AdamW(
            parameter_groups(self.policy.trainable(), optim.lora_plus_ratio),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )

    def _passes(
        self, microbatches: Sequence[Microbatch], objective: Objective
    ) -> Iterator[tuple[Microbatch, PassStats]]:
        """Forward and backward passes; gradients are added up in the microbatches' order.

        On a CPU adapters learn from several microbatches at once, each by its own gradients.
        """
        parameters = list(self.policy.trainable().values())
        is_parallel = self.policy.device.type == "cpu" and not self.policy.is_full

        def forward_backward(batch: Microbatch) -> PassStats:
            batch = to_device(batch, self.policy.device)
            with torch.enable_grad():
                loss, stats = objective(batch)
                if loss.requires_grad and is_parallel:
                    stats.gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                elif loss.requires_grad:
                    loss.backward()
            return stats

        with self.policy.training():
            passes = (
                map_on_cores(forward_backward, microbatches)
                if is_parallel
                else map(forward_backward, microbatches)
            )
            for batch, stats in zip(microbatches, passes, strict=True):
                for parameter, gradient in zip(parameters, stats.gradients, strict=False):
                    if gradient is None:  # an expert that none of the tokens went to
                        continue
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    parameter.grad.add_(gradient)
                stats.gradients = ()
                yield batch, stats

    def _with_old_logprobs(
        self, updates: Sequence[Sequence[Microbatch]]
    ) -> Sequence[Sequence[Microbatch]]:
        """The updates with the log-probs of the policy as it is now, for losses that bound its way.

        The first update has them from its own pass; one update a step thus costs no pass more.
        """
        if self.algorithm.loss not in RATIO_TO_OLD:
            return updates
        return [
            *updates[:1],
            *(
                [
                    replace(batch, old_logprobs_C=stats.logprobs_C.to(batch.token_ids_BT.device))
                    for batch, stats in self._passes(microbatches, self._scores)
                ]
                for microbatches in updates[1:]
            ),
        ]

    def _policy_objective(self, batch: Microbatch) -> tuple[Tensor, PassStats]:
        logprobs_C, entropy_C = self.policy.token_logprobs(batch, self.temperature)
        loss, num_clipped = LOSSES[self.algorithm.loss](
            self._inputs(batch, logprobs_C), self.algorithm
        )
        kl = torch.zeros((), device=loss.device)
        if self.algorithm.kl == "loss":
            reference_C = self.policy.reference_logprobs(batch, self.temperature)
            kl = kl_penalty(logprobs_C, reference_C, batch.weights_C)
        stats = PassStats(loss.item(), kl.item(), logprobs_C.detach(), entropy_C, int(num_clipped))
        return loss + self.algorithm.kl_weight * kl, stats

    @torch.no_grad()
    def _scores(self, batch: Microbatch) -> tuple[Tensor, PassStats]:
        logprobs_C, entropy_C = self.policy.token_logprobs(batch, self.temperature)
        return logprobs_C.sum(), PassStats(0.0, 0.0, logprobs_C, entropy_C, 0)

    @torch.no_grad()
    def _without_gradient(self, batch: Microbatch) -> tuple[Tensor, PassStats]:
        return self._policy_objective(batch)

    def _log_loss_objective(self, batch: Microbatch) -> tuple[Tensor, PassStats]:
        logprobs_C, entropy_C = self.policy.token_logprobs(batch, temperature=1.0)
        loss, _ = log_loss(self._inputs(batch, logprobs_C))
        return loss, PassStats(loss.item(), 0.0, logprobs_C.detach(), entropy_C, 0)

    @staticmethod
    def _inputs(batch: Microbatch, policy_logprobs_C: Tensor) -> LossInputs:
        return LossInputs(
            policy_logprobs_C=policy_logprobs_C,
            sampler_logprobs_C=batch.sampler_logprobs_C,
            advantages_C=batch.advantages_C,
            weights_C=batch.weights_C,
            sequence_C=batch.sequence_C,
            num_sequences=batch.num_sequences,
            old_logprobs_C=batch.old_logprobs_C,
        )

    def _next_rate(self, lr: float, is_scheduled: bool = True) -> None:
        """The next update's learning rate, whether or not a step is taken in it."""
        self.num_updates_done += 1
        section = self.optim.model_copy(update={"lr": lr})
        rate = learning_rate(section, self.num_updates_done, self.num_steps) if is_scheduled else lr
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_ratio", 1.0)

    def _step(self, lr: float) -> float:
        """Clips, steps, clears the gradients; returns the norm (L2) before clipping.

        Raises:
            FloatingPointError: the gradient is not finite; the parameters are left as they were.
        """
        parameters = list(self.policy.trainable().values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.optim.grad_clip))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                f"gradient norm is {norm} at update {self.num_updates_done}; lower optim.lr "
                f"({lr:g}) or set algorithm.loss='truncated_importance_sampling'"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # fresh memory is slow to touch; keep it
        return norm
