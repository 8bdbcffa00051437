"""The size of a microbatch where optim.microbatch_tokens leaves it to the machine."""

from __future__ import annotations

import torch

from rl_lora import distributed
from rl_lora.config import ModelSection, OptimSection
from rl_lora.config.sft import SftConfig
from rl_lora.planning.memory import LOADED, default_tokens, fitting_microbatch, learner_memory
from rl_lora.policy import Policy


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
    and activations have free_bytes to share; `most` tokens at most."""
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
    return fitting_microbatch([p for p in parts if p.part not in LOADED], most, free_bytes)
