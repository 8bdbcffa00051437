"""What tests/nn/test_sharded.py runs in one process, and by torchrun in two: the same program.

python -m tests.helpers.sharded_program FOLDER CASE... writes FOLDER/of-NUM/CASE.pt, NUM processes.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch

from rl_lora import distributed
from rl_lora.adapters.files import load_tensors
from rl_lora.batches import pack_samples
from rl_lora.config import LoraSection, ModelSection, RunConfig, RunSection, parse_as
from rl_lora.learner import Learner
from rl_lora.nn import compiled, optimized, token_logprobs
from rl_lora.policy import Policy, open_policy
from rl_lora.runs.checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from rl_lora.samplers.liveness import check_at_start
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.types import Completion, Microbatch, Prompt, SampleParams, TrainSample
from tests.helpers.tiny_models import random_gpt2, random_llama, random_mixtral

NUM_STEPS, CHECKPOINT, RATE = 3, 2, 1e-3
PROMPTS = [Prompt(f"p/{i}", "s", "q", "1", (5 + i, 6, 7)[: i + 1]) for i in range(3)]


@dataclass(frozen=True)
class Case:
    """A policy, and how it learns."""

    make: Callable[[Path], Path]
    lora: dict[str, Any]
    dtype: str = "float32"
    options: dict[str, bool] = field(default_factory=dict)
    kl_weight: float = 0.0
    shard: bool = True
    compile: bool = False


FULL, LORA = {"mode": "full"}, {"rank": 1}
CASES = {
    # Tied embeddings of 97 rows, which two ranks cannot share evenly.
    "full": Case(random_llama, FULL, options={"keep_reference": True}, kl_weight=0.1),
    "masters": Case(random_mixtral, FULL, "bfloat16", {"checkpoint_activations": True}),
    "replicas": Case(random_mixtral, FULL, shard=False),
    "lora": Case(lambda path: random_llama(path, tied=False), LORA, kl_weight=0.1),
    "compiled": Case(random_llama, LORA, kl_weight=0.1, compile=True),
    "dora": Case(random_gpt2, LORA | {"variant": "dora", "lm_head": True}, "bfloat16"),
    "experts": Case(random_mixtral, {"rank": 2}, options={"checkpoint_activations": True}),
}


class IdTokenizer:
    """Writes token ids as text."""

    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def open_case(folder: Path, name: str) -> Policy:
    """The policy of a case, sharded where there is a process group."""
    case, path = CASES[name], folder / name
    values = {"name": name, "device": "cpu", "dtype": case.dtype}
    model = parse_as(ModelSection, values | {"shard": case.shard, "compile": case.compile})
    return open_policy(path, model, LoraSection(**case.lora), seed=0, **case.options)


def microbatches(step: int) -> list[Microbatch]:
    """Three, of different lengths: a rank runs two of them, the other one and an idle one."""
    generator = torch.Generator().manual_seed(step)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 90, (count,), generator=generator).tolist())

    batches = []
    for index in range(3):
        samples = [
            TrainSample(ids(4), ids(5 + index), (-4.0,) * (5 + index), sign * 0.5, 0)
            for sign in (1.0, -0.6)
        ]
        ((batch,),) = pack_samples(samples, microbatch_tokens=10_000)
        batches.append(batch)
    return batches


def settings(folder: Path, name: str) -> RunConfig:
    """With checkpoints in FOLDER/NAME-run."""
    return RunConfig(run=RunSection(output_dir=str(folder), name=f"{name}-run"))


def learn(learner: Learner, name: str, step: int) -> dict[str, float]:
    """Metrics of one update, other than those of the machine."""
    found = learner.update([microbatches(step)], kl_weight=CASES[name].kl_weight)
    return {key: value for key, value in found.items() if not key.startswith("system/")}


def play(folder: Path, out: Path, name: str) -> dict[str, Any]:
    """Three updates of a case, a checkpoint before the last, a version, samples of it."""
    policy = open_case(folder, name)
    assert policy.is_sharded == (CASES[name].shard and distributed.world_size() > 1)
    base = policy.base_fingerprint()
    start = policy.fingerprint()
    sampler = TorchSampler(
        policy,
        tokenizer=IdTokenizer(),
        end_token_ids=(2,),
        max_model_len=64,  # type: ignore[arg-type]
    )
    probe = check_at_start(policy, sampler, PROMPTS[1:], out / f"{name}-probe", None)
    assert policy.fingerprint() == start
    learner = Learner(policy, RATE)
    metrics = []
    for step in range(1, NUM_STEPS + 1):
        metrics.append(learn(learner, name, step))
        if step == CHECKPOINT:
            save_checkpoint(step, learner, settings(out, name))
    adapter = policy.publish(NUM_STEPS, out / f"{name}-versions")
    sampler.set_adapter(adapter)
    policy.check_base(base)
    # Rank 1 samples all prompts, and other ranks none: they run different numbers of passes.
    own = PROMPTS if distributed.rank() == distributed.world_size() - 1 else []
    samples = sampler.sample(own, SampleParams(2, 8, temperature=0.8, seed=1))
    (samples,) = filter(None, distributed.gather(samples, "sampling"))
    return {
        "base": base,
        "start": start,
        "probe": probe,
        "metrics": metrics,
        "fingerprint": adapter.fingerprint,
        "file": load_tensors(adapter.path),
        "tokens": [[list(c.token_ids) for c in group] for group in samples],
        "logprobs": [logprob for group in samples for c in group for logprob in logprobs_of(c)],
        "weights": {n: t.clone() for n, t in policy.published_tensors().items()},
    }


def logprobs_of(completion: Completion) -> tuple[float, ...]:
    """The sampler's, by token."""
    return completion.sampler_logprobs_T


def resume(folder: Path, source: Path, name: str) -> dict[str, Any]:
    """The last update again, from the checkpoint that SOURCE/NAME-run has."""
    policy = open_case(folder, name)
    learner = Learner(policy, RATE)
    load_checkpoint(checkpoint_path(settings(source, name).run.folder, CHECKPOINT), learner)
    metrics = learn(learner, name, NUM_STEPS)
    return {
        "metrics": metrics,
        "weights": {n: t.clone() for n, t in policy.published_tensors().items()},
    }


def main(folder: Path, names: list[str]) -> None:
    """All cases; those whose checkpoint of one process is there are resumed, too."""
    out = folder / f"of-{distributed.world_size()}"
    for name in names:
        found = play(folder, out, name)
        if (folder / "of-1").is_dir():
            found["resumed"] = resume(folder, folder / "of-1", name)
        if distributed.is_main():
            torch.save(found, out / f"{name}.pt")


def eager_kernels() -> contextlib.ExitStack:
    """Layers are traced, forwards and backwards, but Inductor, which takes minutes, is left out."""
    patches = contextlib.ExitStack()
    patches.enter_context(mock.patch.object(compiled, "_backend", return_value="aot_eager"))
    patches.enter_context(mock.patch.object(token_logprobs, "_compiled", lambda function: function))
    return patches


if __name__ == "__main__":
    optimized._BUCKET_BYTES = 20_000  # several all-reduces
    with distributed.joined("cpu", 60), eager_kernels():
        main(Path(sys.argv[1]), sys.argv[2:])
