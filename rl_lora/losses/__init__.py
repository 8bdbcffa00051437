"""Policy-gradient losses: pure functions of flat tensors over the C completion tokens.

A loss takes `LossInputs` and keyword options, and returns (loss, num_clipped): the loss is a scalar
sum(weights_C * loss_C), so the mask and the step-wide denominator come in through weights_C and
nothing is divided here; num_clipped is the number of tokens whose gradient the bounds drop.
Log-probs are in nats at the sampling temperature. To add a loss, write the function and its row in
`LOSSES`; to use one from outside the package, pass it to `Learner.update` or write
`algorithm.loss = "module:function"`. Its keywords are its options: [algorithm] sets them by name,
checked against their annotations. `needs` declares what else it requires. `MASKS` drop tokens that
are too far off the sampler, before any loss sees them.

Which loss uses which ratio:

- `importance_sampling` and its truncated form: policy / SAMPLER, the very distribution that the
  tokens came from. `dppo_tv` and `dppo_kl` as well, and they bound the distance to it.
- Losses with bounds (`ppo`, `gspo`, `cispo`, `sapo`): the bounded ratio is policy / old, old being
  the policy itself when the step began, as the papers define it: it is 1 until the policy moves,
  however the sampler rounds and however old its version is. It is multiplied by old / sampler, a
  weight without gradient, truncated at `ratio_cap`: the decoupled objective (arXiv 2110.00641) with
  truncated importance sampling (Ionides 2008; V-trace, arXiv 1802.01561, section 4.1).
"""

from __future__ import annotations

from rl_lora.losses.bounded import cispo, dppo_kl, dppo_tv, gspo, ppo, sapo
from rl_lora.losses.inputs import LossFn, LossInputs, Needs, needs, needs_of
from rl_lora.losses.masks import MASKS, MaskFn
from rl_lora.losses.terms import MAX_LOG_RATIO, Estimator, entropy_bonus, k3, kl_penalty
from rl_lora.losses.unbounded import (
    importance_sampling,
    log_loss,
    truncated_importance_sampling,
)

__all__ = [
    "LOSSES",
    "MASKS",
    "MAX_LOG_RATIO",
    "Estimator",
    "LossFn",
    "LossInputs",
    "MaskFn",
    "Needs",
    "cispo",
    "dppo_kl",
    "dppo_tv",
    "entropy_bonus",
    "gspo",
    "importance_sampling",
    "k3",
    "kl_penalty",
    "log_loss",
    "needs",
    "needs_of",
    "ppo",
    "sapo",
    "truncated_importance_sampling",
]

LOSSES: dict[str, LossFn] = {
    "importance_sampling": importance_sampling,
    "truncated_importance_sampling": truncated_importance_sampling,
    "ppo": ppo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
}
