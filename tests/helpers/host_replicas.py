"""Replicas whose engines are in this process, each with its thread: a fleet without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from rl_lora.config import LoraSection, ModelSection, SamplingSection
from rl_lora.samplers.fleet.hosted import EngineSpec, Host
from rl_lora.samplers.fleet.replica import AdapterFiles, GroupRequest, Proof, ReplicaError
from rl_lora.types import Adapter, Completion


def torch_spec(model_dir: Path, *, max_num_seqs: int) -> EngineSpec:
    return EngineSpec(
        ModelSection(name=str(model_dir), device="cpu", dtype="float32"),
        LoraSection(),
        SamplingSection(backend="torch", max_num_seqs=max_num_seqs),
        end_token_ids=(2,),
        max_model_len=64,
    )


class HostReplica:
    """A `Replica` on a `Host`; after `num_groups` groups it fails once."""

    def __init__(self, name: str, spec: EngineSpec, *, num_groups: int | None = None) -> None:
        self.name, self.max_samples = name, 0
        self._spec, self.num_groups = spec, num_groups
        self.host: Host | None = None

    @property
    def _host(self) -> Host:
        assert self.host is not None
        return self.host

    def start(self) -> Future[None]:
        self.close()
        self.host = Host(self._spec, num_threads=1)
        # One after another: transformers does not load two models in two threads at once.
        self.max_samples = self.host.started.result(300)
        started: Future[None] = Future()
        started.set_result(None)
        return started

    def load(
        self, adapter: Adapter | None, files: AdapterFiles | None, probes_N: Sequence[Sequence[int]]
    ) -> Future[Proof]:
        return self._host.load(adapter, files, probes_N)

    def sample(self, groups: Sequence[GroupRequest]) -> list[Future[list[Completion]]]:
        return [self._sample(group, len(groups) - place) for place, group in enumerate(groups, 1)]

    def _sample(self, group: GroupRequest, num_to_come: int) -> Future[list[Completion]]:
        future = self._host.sample(group, num_to_come)
        if self.num_groups is None:
            return future
        self.num_groups -= 1
        if self.num_groups >= 0:
            return future
        self.num_groups = None
        failed: Future[list[Completion]] = Future()
        failed.set_exception(ReplicaError("the engine is gone"))
        return failed

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> Future[list[list[float]]]:
        return self._host.token_logprobs(token_ids_N)

    def progress(self) -> object:
        return None if self.host is None else (self._host.progress() or object())

    def close(self) -> None:
        if self.host is not None:
            self.host.close()
