"""Whether a replica has loaded what was sent: the proof is compared with the learner's policy."""

from __future__ import annotations

from collections.abc import Sequence

from rl_lora import distributed
from rl_lora.errors import StaleAdapterError
from rl_lora.policy import Policy
from rl_lora.sampler import BASE_VERSION
from rl_lora.samplers.fleet.replica import Proof
from rl_lora.samplers.liveness import base_probe, compare, make_probe
from rl_lora.types import Adapter, Probe, Prompt


class Prover:
    """Knows what a version's proof must say.

    Args:
        policy: the learner's.
        prompts: whose last tokens are scored.
        max_kl: `sampling.max_kl`.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], max_kl: float | None) -> None:
        self._policy, self._prompts, self._max_kl = policy, prompts, max_kl

    def probe(self, adapter: Adapter | None) -> Probe | None:
        """The policy's log-probs under this version; None where they can no longer be had.

        Where the version does not bring them along, the policy computes them, in the main thread
        and on all ranks.
        """
        policy, prompts, max_kl = self._policy, self._prompts, self._max_kl
        if adapter is None:
            return base_probe(policy, prompts, max_kl) if policy.has_base else None
        if adapter.probe is not None:
            return adapter.probe
        has_version = policy.fingerprint() == adapter.fingerprint
        # Of a sharded policy only rank 0 has gathered the weights.
        if distributed.gather(has_version, f"the proof of {adapter.name}")[0]:
            return make_probe(policy, prompts, max_kl)
        return None

    def fault(self, proof: Proof, adapter: Adapter | None, probe: Probe | None) -> str:
        """What is wrong with a proof; empty: nothing."""
        version = BASE_VERSION if adapter is None else adapter.version
        if proof.version != version:
            return f"it answered with adapter version {proof.version}, and {version} was sent"
        if adapter is not None and proof.fingerprint != adapter.fingerprint:
            return f"it loaded other weights than those of {adapter.name}"
        if probe is None:
            return ""
        expected = [len(logprobs) for logprobs in probe.logprobs_N]
        if (lengths := [len(logprobs) for logprobs in proof.logprobs_N]) != expected:
            return f"it scored {lengths} fixed tokens of {expected}"
        try:
            compare(probe, proof.logprobs_N)
        except StaleAdapterError as error:
            return str(error)
        return ""
