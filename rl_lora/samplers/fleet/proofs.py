"""Whether a replica has loaded what was sent: the proof is compared with the learner's policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl_lora import distributed
from rl_lora.policy import Policy
from rl_lora.sampler import BASE_VERSION
from rl_lora.samplers.fleet.replica import Proof
from rl_lora.samplers.liveness import distance, policy_logprobs, probe_tokens, tolerances
from rl_lora.types import Adapter, Prompt


class Prover:
    """Knows what a version's proof must say.

    Args:
        policy: the learner's.
        prompts: whose last tokens are scored.
        max_kl: `sampling.max_kl`.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], max_kl: float | None) -> None:
        self.policy = policy
        self.probes_N = probe_tokens(prompts)
        _, self._limit = tolerances(policy.dtype, max_kl)

    def expected(self, adapter: Adapter | None) -> torch.Tensor | None:
        """The policy's log-probs of the probes, one after another, in nats; None where it no longer
        has this version. If the policy is sharded, all ranks call it."""
        policy = self.policy
        if adapter is None:
            if not policy.has_base:
                return None
            return policy_logprobs(policy, self.probes_N, adapter_off=True)
        has_version = policy.fingerprint() == adapter.fingerprint
        if policy.is_sharded:  # only rank 0 may have gathered the weights
            has_version = distributed.gather(has_version, f"the proof of {adapter.name}")[0]
        return policy_logprobs(policy, self.probes_N) if has_version else None

    def fault(self, proof: Proof, adapter: Adapter | None, expected: torch.Tensor | None) -> str:
        """What is wrong with a proof; empty: nothing."""
        version = BASE_VERSION if adapter is None else adapter.version
        if proof.version != version:
            return f"it answered with adapter version {proof.version}, and {version} was sent"
        if adapter is not None and proof.fingerprint != adapter.fingerprint:
            return f"it loaded other weights than those of {adapter.name}"
        if expected is None:
            return ""
        found = torch.tensor([value for logprobs in proof.logprobs_N for value in logprobs])
        if found.shape != expected.shape:
            return f"it scored {len(found)} fixed tokens of {len(expected)}"
        if (apart := distance(found, expected)) < self._limit:
            return ""
        return (
            f"its log-probs of fixed tokens are not the policy's: mean |difference| {apart:.2e} "
            f"nats, limit {self._limit:.0e}"
        )
