"""A fleet in a job of several ranks: rank 0 has it, and the groups travel to the other ranks."""

from __future__ import annotations

from collections.abc import Sequence

from rl_lora import distributed
from rl_lora.sampler import OnGroup
from rl_lora.samplers.fleet.fleet import FleetSampler
from rl_lora.samplers.fleet.proofs import Prover
from rl_lora.types import Adapter, Completion, Prompt, SampleParams


class RankSampler:
    """A rank's `Sampler`, of which rank 0 has the engines.

    The other ranks take part in what is collective: a policy's log-probs where its weights are
    sharded, and those that the engines computed.

    Args:
        fleet: None on ranks above 0.
        prover: the fleet's.
    """

    has_own_weights = True
    switches_while_sampling = True
    is_on_rank_0 = True

    def __init__(self, fleet: FleetSampler | None, prover: Prover) -> None:
        self._fleet, self._prover = fleet, prover

    @property
    def num_restarts(self) -> int:
        """Of the replicas; 0 on ranks above 0."""
        return 0 if self._fleet is None else self._fleet.num_restarts

    def set_adapter(self, adapter: Adapter | None) -> None:
        """On rank 0 as `FleetSampler.set_adapter`; the others do not wait for it."""
        if self._fleet is None:
            self._prover.probe(adapter)
        else:
            self._fleet.set_adapter(adapter)

    def sample(
        self,
        prompts_N: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """As the protocol says, on rank 0; on the others, of no prompts."""
        if self._fleet is None:
            assert not prompts_N, "only rank 0 samples"
            return []
        return self._fleet.sample(prompts_N, params, on_group)

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        """As the protocol says; all ranks call it."""

        def ask() -> list[list[float]]:
            assert self._fleet is not None
            return self._fleet.token_logprobs(token_ids_N)

        return distributed.from_main(ask, "the samplers' log-probs")

    def metrics(self) -> dict[str, float]:
        """The fleet's; empty on ranks above 0."""
        return {} if self._fleet is None else self._fleet.metrics()

    def release_memory(self) -> None:
        """Nothing to free."""

    def close(self) -> None:
        """Closes the fleet."""
        if self._fleet is not None:
            self._fleet.close()
