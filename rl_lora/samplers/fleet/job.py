"""The samplers of a job as [resources] describes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rl_lora import distributed
from rl_lora.config import RunConfig, SamplingSection
from rl_lora.policy import Policy
from rl_lora.sampler import OnProgress, Sampler
from rl_lora.samplers.fleet.fleet import FleetSampler
from rl_lora.samplers.fleet.proofs import Prover
from rl_lora.samplers.fleet.ranks import RankSampler
from rl_lora.samplers.fleet.replica import Replica
from rl_lora.types import Prompt

if TYPE_CHECKING:
    from rl_lora.samplers.fleet.ray_start import RayCluster


# limits: what samplers are made with, as keywords
def make_fleet(
    config: RunConfig,
    policy: Policy,
    prompts_N: Sequence[Prompt],
    *,
    sampling: SamplingSection,
    end_token_ids: tuple[int, ...],
    max_model_len: int,
    on_warning: Callable[[str], None],
    on_progress: OnProgress | None = None,
) -> Sampler:
    """The job's sampler where `resources.is_remote`; of several ranks rank 0 has the engines.

    Args:
        config: the job.
        policy: whose versions they sample from.
        prompts_N: whose tokens replicas score to prove a version.
        sampling: the job's, as resolved for this machine.
        end_token_ids: tokens that end a completion.
        max_model_len: of prompt and completion.
        on_warning: called with one line for each replica that fails.
        on_progress: called with (completions done, in all, tokens sampled).

    Raises:
        UserError: they cannot be used.
        EngineError: none could be started.
    """
    prover = Prover(policy, prompts_N, sampling.max_kl)
    fleet: FleetSampler | None = None
    if distributed.is_main():
        at_end: Callable[[], None] | None = None
        replicas: Sequence[Replica]
        if config.resources.servers:
            from rl_lora.samplers.fleet.server_job import server_replicas

            replicas = server_replicas(
                config.resources,
                sampling,
                policy,
                tokenizer=policy.tokenizer,
                end_token_ids=end_token_ids,
                max_model_len=max_model_len,
                folder=config.run.folder / "served",
            )
        else:
            cluster = open_ray(config, policy)
            at_end = cluster.close
            replicas = ray_replicas(cluster, config, policy, sampling, end_token_ids, max_model_len)
        fleet = FleetSampler(
            replicas,
            prover,
            max_restarts=sampling.max_restarts,
            timeout_s=sampling.timeout_s,
            on_warning=on_warning,
            on_progress=on_progress,
            at_end=at_end,
        )
    if distributed.world_size() == 1:
        assert fleet is not None
        return fleet
    return RankSampler(fleet, prover)


def open_ray(config: RunConfig, policy: Policy) -> RayCluster:
    """Ray, with room for the job's samplers. Raises UserError as `join_ray`."""
    from rl_lora.samplers.fleet.ray_start import join_ray

    resources, on_gpu = config.resources, policy.device.type == "cuda"
    gpus = resources.gpus_per_sampler
    return join_ray(
        resources.ray_address or "local",
        num_samplers=resources.samplers,
        gpus_per_sampler=int(on_gpu) if gpus is None else gpus,
        num_learner_gpus=distributed.local_size() if on_gpu else 0,
    )


# limits: what samplers are made with
def ray_replicas(
    cluster: RayCluster,
    config: RunConfig,
    policy: Policy,
    sampling: SamplingSection,
    end_token_ids: tuple[int, ...],
    max_model_len: int,
) -> list[Replica]:
    """One replica for each of `resources.samplers`, with the learner's dtype; not started yet."""
    from rl_lora.samplers.fleet.hosted import EngineSpec
    from rl_lora.samplers.fleet.ray_replica import RayReplica, ShippedFiles

    device = "cuda" if cluster.gpus_per_sampler else "cpu"
    dtype = str(policy.dtype).removeprefix("torch.")
    model = config.model.model_copy(update={"device": device, "dtype": dtype, "compile": None})
    spec = EngineSpec(model, config.lora, sampling, end_token_ids, max_model_len)
    shipped = ShippedFiles()
    return [
        RayReplica(f"sampler {number}", cluster, spec, shipped)
        for number in range(1, config.resources.samplers + 1)
    ]
