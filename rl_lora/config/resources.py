"""Where a job's sampling runs (docs/samplers.md)."""

from __future__ import annotations

from pydantic import Field

from rl_lora.config.section import Section


class ResourcesSection(Section):
    """Where sampling runs: in the learner's process, in Ray actors, or on servers."""

    # Engines. More than one run in Ray actors (extra `ray`), started by the job itself unless
    # ray_address says otherwise.
    samplers: int = Field(1, ge=1)
    # GPUs of each of Ray's engines, 0 or 1; none: 1 if the learner has a GPU.
    gpus_per_sampler: int | None = Field(None, ge=0, le=1)
    # local: a Ray of this job on this machine; auto: the cluster that this machine belongs to; or a
    # cluster's address. none: local if there are several samplers.
    ray_address: str | None = Field(None, min_length=1)
    servers: tuple[str, ...] = ()  # addresses of running `vllm serve`, each http://HOST:PORT
    # A folder that this machine and the servers see under the same path, through which they get the
    # adapters; none: the run's folder.
    servers_folder: str | None = Field(None, min_length=1)

    @property
    def uses_ray(self) -> bool:
        """Whether sampling runs in Ray actors."""
        return self.samplers > 1 or self.ray_address is not None

    @property
    def is_remote(self) -> bool:
        """Whether sampling runs outside the learner's process."""
        return self.num_elsewhere > 0

    @property
    def num_elsewhere(self) -> int:
        """Engines outside the learner's process."""
        return len(self.servers) or (self.samplers if self.uses_ray else 0)
