"""The size of a microbatch where optim.microbatch_tokens leaves it to the machine."""

from __future__ import annotations

import torch

from rl_lora import distributed
from rl_lora.config import ModelSection, OptimSection
from rl_lora.config.sft import SftConfig
from rl_lora.planning.memory import LOADED, default_tokens, largest_microbatch, learner_memory
from rl_lora.policy import Policy

_STEP = 256  # sizes are multiples of it, so that small changes of the free memory change nothing
_USABLE = 0.75  # of the free memory, since activations are only estimated


def default_microbatch_tokens(policy: Policy, optim: OptimSection) -> int:
    """`default_tokens`; on a GPU fewer if its free memory is too small."""
    most = default_tokens(policy.device.type, policy.model.config.get_text_config().hidden_size)
    if policy.device.type == "cpu":
        return most
    free, _ = torch.cuda.mem_get_info(policy.device)
    cached = torch.cuda.memory_reserved(policy.device) - torch.cuda.memory_allocated(policy.device)
    return fitting_tokens(policy, optim, most, free + cached)


def fitting_tokens(policy: Policy, optim: OptimSection, most: int, free_bytes: int) -> int:
    """The largest microbatch for a policy whose weights are loaded, and whose gradients, optimizer
    and activations have free_bytes to share; from _STEP to `most` tokens."""
    dtype = str(policy.dtype).removeprefix("torch.")
    job = SftConfig(
        model=ModelSection(
            device=str(policy.device),
            dtype=dtype,
            shard=policy.is_sharded,
            quantize=policy.quantize,
        ),
        lora=policy.lora,
        optim=optim,
    )
    num_base = sum(p.numel() for p in policy.model.parameters())
    num_trainable = sum(p.numel() for p in policy.trainable().values())
    num_ranks = distributed.world_size()
    parts = learner_memory(job, policy.model.config, num_base, num_trainable, most, num_ranks)
    to_come = [part for part in parts if part.part not in LOADED]
    tokens = min(most, largest_microbatch(to_come, most, int(_USABLE * free_bytes)))
    return max(_STEP, tokens - tokens % _STEP)
