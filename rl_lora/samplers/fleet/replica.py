"""One engine somewhere: in a Ray actor, or behind a server. `FleetSampler` works with many."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from rl_lora.errors import EngineError, StaleAdapterError
from rl_lora.sampler import max_tokens_of
from rl_lora.seeds import sample_seeds
from rl_lora.types import Adapter, Completion, Prompt, SampleParams


class ReplicaError(EngineError):
    """A replica is unusable until it has been started again."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """The files of one published version, to be sent to where there is no shared file system.

    Example: AdapterFiles(contents={"adapter_config.json": b"...", "adapter_model.safetensors":
    b"...", "rl_lora.json": b"..."}, sha256="5e1c...")
    """

    contents: dict[str, bytes]  # by file name
    sha256: str  # over names and contents

    @classmethod
    def read(cls, adapter: Adapter) -> AdapterFiles:
        """Reads a version's directory."""
        paths = sorted(path for path in adapter.path.iterdir() if path.is_file())
        contents = {path.name: path.read_bytes() for path in paths}
        return cls(contents, _sha256(contents))

    @property
    def num_bytes(self) -> int:
        """Of all files together."""
        return sum(map(len, self.contents.values()))

    def write(self, folder: Path) -> None:
        """Writes the files to a new folder.

        Raises:
            StaleAdapterError: they are not what was sent.
        """
        if _sha256(self.contents) != self.sha256:
            raise StaleAdapterError("an adapter's files were changed on their way to a sampler")
        folder.mkdir(parents=True)
        for name, content in self.contents.items():
            if Path(name).name != name:
                raise StaleAdapterError(f"an adapter's file is named {name!r}")
            (folder / name).write_bytes(content)


def _sha256(contents: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(f"{name}\0{len(contents[name])}\0".encode())
        digest.update(contents[name])
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Proof:
    """What a replica has loaded, as it found out itself and not as it was asked.

    Example: Proof(version=3, fingerprint="9f2c...", logprobs_N=[[-1.2, -0.3], [-2.1]])
    """

    version: int  # BASE_VERSION: the base model
    fingerprint: str  # `adapters.files.fingerprint` of the tensors that arrived; base model: ""
    logprobs_N: list[list[float]]  # `Replica.token_logprobs` of the probes


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One prompt's G completions, to be sampled by one replica.

    The seeds are explicit, so that the samples do not depend on where and with what else they are
    sampled.

    Example: GroupRequest(prompt=Prompt(...), params=SampleParams(...), seeds_G=(17, 4093))
    """

    prompt: Prompt
    params: SampleParams
    seeds_G: tuple[int, ...]  # one per sample; params.seed is not used


def group_requests(prompts_N: Sequence[Prompt], params: SampleParams) -> list[GroupRequest]:
    """What each prompt's group is sampled with; without the data set's own columns, which sampling
    does not need."""
    seeds_N_G, max_tokens_N = sample_seeds(prompts_N, params), max_tokens_of(prompts_N, params)
    return [
        GroupRequest(replace(prompt, columns={}), params.plain(max_tokens), tuple(seeds_G))
        for prompt, seeds_G, max_tokens in zip(prompts_N, seeds_N_G, max_tokens_N, strict=True)
    ]


class Replica(Protocol):
    """One engine.

    Calls return at once. A future raises ReplicaError where the engine is unusable, and what is
    under way then fails as well; UserError for bad input, after which the engine is still usable.
    Futures may stay open for ever: the caller watches `progress`, and gives up with `start` or
    `close`.
    """

    name: str  # for messages: "sampler 2", "http://node7:8000"
    max_samples: int  # completions that it takes at once; known once it has started

    def start(self) -> Future[None]:
        """A new engine, with the base model; in place of the present one if there is one, whose
        open futures need not be resolved any more."""

    def load(
        self,
        adapter: Adapter | None,
        files: AdapterFiles | None,
        probes_N: Sequence[Sequence[int]],
    ) -> Future[Proof]:
        """Samples from this version from now on; None: from the base model.

        Requests sent before it are sampled from the version before; those sent afterwards from this
        one. The proof contains log-probs of the probes (token ids) under what was loaded.
        """

    def sample(self, groups: Sequence[GroupRequest]) -> list[Future[list[Completion]]]:
        """For each group its [G] completions, all of the version that was loaded last when this was
        called. Each group answers as soon as it is complete."""

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> Future[list[list[float]]]:
        """As `Sampler.token_logprobs`."""

    def progress(self) -> object:
        """Another value after every token and every finished call, as far as is known here. It is
        called about once a second, from any thread, and does not wait."""

    def close(self) -> None:
        """Frees the engine if it is ours; a second call does nothing."""
