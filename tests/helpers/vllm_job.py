"""One process of a job whose ranks have vLLM engines; started by torchrun. See `main`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from rl_lora import distributed
from rl_lora.config import LoraSection
from rl_lora.errors import OtherProcessError, UserError
from rl_lora.models.device import pick_device, pick_dtype
from rl_lora.samplers.vllm import settings
from rl_lora.samplers.vllm.sampler import EngineOptions, VllmSampler
from rl_lora.types import Adapter, Completion, Prompt, SampleParams

PROMPTS = [Prompt(f"p/{i}", "s", "q", "1", tuple(range(3 + i, 9 + 6 * i))) for i in range(6)]
SHARES = [[4], [0, 1, 2, 3, 5]]  # of rank 0 and of rank 1
PARAMS = SampleParams(num_samples=3, max_tokens=12, temperature=0.8, seed=7)
LONGER = replace(PARAMS, max_tokens=30, seed=8)  # more steps, which only rank 0 takes


def open_sampler(model_dir: Path) -> VllmSampler:
    """With LoRA layers, as on a GPU."""
    policy: Any = SimpleNamespace(
        model_dir=model_dir,
        lora=LoraSection(rank=1),
        quantize=None,
        dtype=pick_dtype("float32", torch.device("cpu")),
        device=pick_device("cpu"),
    )
    options = EngineOptions(merge_adapter=False)
    return VllmSampler(policy, max_model_len=80, max_num_seqs=16, end_token_ids=[2], engine=options)


def fail_to_open(model_dir: Path) -> None:
    """An engine whose KV cache is larger than the memory, as vLLM finds out late."""
    with mock.patch.object(settings, "cpu_cache_bytes", return_value=1 << 60):
        open_sampler(model_dir)


def sampled(
    sampler: VllmSampler, versions: list[Adapter | None], share: list[int]
) -> dict[str, list[list[list[Any]]]]:
    """By version: for each prompt of the share its completions' token ids and log-probs."""
    found = {}
    for adapter in versions:
        sampler.set_adapter(adapter)
        groups = sampler.sample([PROMPTS[index] for index in share], PARAMS)
        sampler.release_memory()
        found[str(adapter and adapter.version)] = [list(map(_plain, group)) for group in groups]
    return found


def _plain(completion: Completion) -> list[Any]:
    return [list(completion.token_ids), list(completion.sampler_logprobs_T)]


def error_of(call: Callable[[], Any]) -> str:
    """The text of the UserError that the call must raise."""
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("no error")


def sums() -> list[float]:
    """1 + 2, added up over the ranks: in the default group, in a new one, and by a group's name."""
    own = torch.tensor([float(distributed.rank() + 1)])
    distributed.add_up(by_default := own.clone(), "adding up")
    group = dist.new_group(backend="gloo")
    dist.all_reduce(by_new := own.clone(), group=group)
    by_name = functional.all_reduce(own, "sum", group.group_name)
    return [float(by_default), float(by_new), float(functional.wait_tensor(by_name))]


def main(folder: Path, versions: list[Adapter | None]) -> None:
    """What rank r did goes to folder/r.json.

    The engines of the two ranks are never in step: only rank 1's first one fails, in the midst of
    its start, and the ranks sample different numbers of prompts and tokens.
    """
    done: dict[str, Any] = {}
    rank = distributed.rank()
    hook, before = sys.excepthook, sums()
    if rank == 1:
        done["failed"] = error_of(lambda: fail_to_open(folder / "model"))
    with contextlib.closing(open_sampler(folder / "model")) as sampler:
        done["groups"] = [dist.get_world_size(), dist.get_rank()]
        if rank == 0:
            sampler.sample(PROMPTS[:2], LONGER)
            done["too long"] = error_of(
                lambda: sampler.sample(PROMPTS, replace(PARAMS, max_tokens=90))
            )
        done["sampled"] = sampled(sampler, versions, SHARES[rank])
        done["sums"] = [before, sums()]
        if rank == 1:
            done["scored"] = sampler.token_logprobs([PROMPTS[0].token_ids])
    done["sums"].append(sums())
    is_rays = sys.excepthook.__module__ == "ray._private.worker"  # vLLM imports it, if it is there
    done["is_same_hook"] = is_rays or sys.excepthook is hook
    (folder / f"{rank}.json").write_text(json.dumps(done))
    if rank == 1:
        fail_to_open(folder / "model")
    distributed.gather(None, "sampling")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    adapters = [Adapter(**{**one, "path": Path(one["path"])}) for one in json.loads(sys.argv[2])]
    try:
        with distributed.joined("cpu", timeout_s=120):
            main(out, [*adapters, None])
    except (OtherProcessError, UserError) as error:
        if distributed.is_speaker():
            print(f"rank {distributed.rank()} ends: {error}", file=sys.stderr)
        sys.exit(2)
