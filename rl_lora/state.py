"""The state of a run between two steps: its published versions and its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rl_lora import distributed
from rl_lora.adapters.files import is_writer, remove_old, save_adapter, saved_version
from rl_lora.adapters.handover import keep_version, memory_folder
from rl_lora.build import RunContext
from rl_lora.data.stream import PromptStream
from rl_lora.errors import KlLimitError
from rl_lora.learner import Learner
from rl_lora.runs.checkpoint import (
    checkpoint_steps,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from rl_lora.runs.log import stored, unstored
from rl_lora.runs.start import Start
from rl_lora.sampler import switches_while_sampling
from rl_lora.samplers.liveness import make_probe
from rl_lora.types import Adapter, Probe, RolloutGroup


@dataclass
class State:
    """Where a run is between two steps: with the learner's own state, all that a checkpoint holds.

    Example: State(stream=PromptStream(...), position={"epoch": 0, "position": 32, ...}, step=2,
    adapter=Adapter(version=2, ...), older=[Adapter(version=1, ...)])
    """

    stream: PromptStream
    position: dict[str, Any]  # of the stream, where the next step's prompts begin
    step: int = 0  # steps done, which is also the version of the adapter
    adapter: Adapter | None = None  # the newest version; None: not published yet
    # Those before it: one, or the sampling.max_staleness that batches under way are sampled from.
    older: list[Adapter] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)  # the step's, if its line is to come

    def advance(self, groups_N: Sequence[RolloutGroup], position: dict[str, Any]) -> None:
        """One more step is done: it has learned from these groups, whose prompts the stream gave
        up to this position."""
        self.step, self.position = self.step + 1, self.stream.observe(groups_N, position)


@contextlib.contextmanager
def with_handover(job: RunContext) -> Iterator[RunContext]:
    """On a GPU, a job whose adapters are published in memory; the run's folder gets those of
    checkpoints (`save`). On a CPU, and for whole models, the job as it is."""
    if job.policy.device.type == "cpu" or job.config.lora.mode == "full":
        yield job
        return
    tensors = job.policy.published_tensors().values()
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    num_versions = 3 + _num_older(job)
    with memory_folder(job.config.run.folder, num_versions * num_bytes) as folder:
        yield replace(job, handover=folder)


def publish(job: RunContext, state: State) -> Adapter:
    """Writes the policy as the present step's version, and deletes versions no longer needed."""
    adapters = job.handover or job.config.run.folder / "adapters"
    adapter = save_adapter(
        job.policy,
        adapters,
        version=state.step,
        run_name=job.config.run.name,
        on_each_node=job.handover is not None,
    )
    if job.config.sampling.max_staleness or switches_while_sampling(job.sampler):
        probe = make_probe(job.policy, job.prompts.eval, job.config.sampling.max_kl)
        adapter = replace(adapter, probe=probe)
    if state.adapter is not None:
        state.older = [*state.older, state.adapter][-_num_older(job) :]
    state.adapter = adapter
    if is_writer(on_each_node=job.handover is not None):
        _remove_old(job, adapters, state.step)
    return adapter


def _remove_old(job: RunContext, adapters: Path, step: int) -> None:
    """Deletes versions that neither this process nor a resumed run needs."""
    keep = set(range(step - _num_older(job), step + 1))
    if max_staleness := job.config.sampling.max_staleness:
        for saved in checkpoint_steps(job.config.run.folder):
            keep |= set(range(saved - max_staleness, saved))
    remove_old(adapters, keep=keep)


def _num_older(job: RunContext) -> int:
    """Versions that are kept next to the newest one: an engine may not have loaded it yet."""
    return max(1, job.config.sampling.max_staleness)


def save(job: RunContext, learner: Learner, state: State, inputs: dict[str, Any]) -> None:
    """Writes a checkpoint atomically, and deletes the oldest ones.

    Args:
        job: the run.
        learner: whose policy, optimizer and step count are saved.
        state: the rest that is saved.
        inputs: hashes of base model and data, which `restore` compares.
    """
    if job.handover is not None and distributed.is_main():
        adapters = job.config.run.folder / "adapters"
        for adapter in (*state.older, *filter(None, [state.adapter])):
            keep_version(adapter, adapters)
        _remove_old(job, adapters, state.step)
    more: dict[str, Any] = {"stream": state.position, "inputs": inputs}
    more["metrics"] = stored(state.metrics)
    more["older"] = [
        {
            "version": one.version,
            "fingerprint": one.fingerprint,
            "probe": one.probe and asdict(one.probe),
        }
        for one in (state.older if job.config.sampling.max_staleness else [])
    ]
    save_checkpoint(state.step, learner, job.config, **more)


def save_once(job: RunContext, learner: Learner, state: State, inputs: dict[str, Any]) -> None:
    """As `save`, unless the step's checkpoint is there."""
    if not has_checkpoint(job.config.run.folder, state.step):
        save(job, learner, state, inputs)


@contextlib.contextmanager
def saved_at_limit(
    job: RunContext, learner: Learner, state: State, inputs: dict[str, Any]
) -> Iterator[None]:
    """Writes a checkpoint of the last whole step, unless there is one, if the block ends in a
    KlLimitError; that error comes before the step at hand has learned."""
    try:
        yield
    except KlLimitError:
        save_once(job, learner, state, inputs)
        raise


def restore(
    job: RunContext, learner: Learner, stream: PromptStream, start: Start, inputs: dict[str, Any]
) -> State:
    """Loads what `save` wrote into learner and stream. Raises UserError if it is damaged."""
    assert start.checkpoint is not None
    config = job.config
    saved = load_checkpoint(start.checkpoint, learner)
    stream.load_state_dict(saved["stream"], has_other_rows=start.has_other_data("train", inputs))
    state = State(stream, stream.state_dict(), saved["step"])
    state.metrics = unstored(saved.get("metrics", {}))  # an earlier version has not saved them
    if not switches_while_sampling(job.sampler):  # one that does samples from the newest version
        state.older = _older(config.run.folder / "adapters", saved)
    return state


def _older(adapters: Path, saved: dict[str, Any]) -> list[Adapter]:
    """The older versions that a checkpoint names. Raises UserError as `saved_version`."""
    older = saved.get("older")
    if older is None:  # an earlier release: the version before, if sampling overlapped learning
        is_needed = saved["config"]["sampling"].get("overlap") and saved["step"]
        before = {"version": saved["step"] - 1, "fingerprint": saved["previous"], "probe": None}
        older = [before] if is_needed else []
    found = []
    for one in older:
        adapter = saved_version(adapters / f"v{one['version']:06d}", one["fingerprint"])
        found.append(replace(adapter, probe=one["probe"] and _probe(**one["probe"])))
    return found


def _probe(token_ids_N: list[list[int]], logprobs_N: list[list[float]], limit: float) -> Probe:
    """A probe as JSON keeps it."""
    return Probe(tuple(map(tuple, token_ids_N)), tuple(map(tuple, logprobs_N)), limit)
