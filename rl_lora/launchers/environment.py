"""What `accelerate launch`, torchrun and clusters' launchers tell a process by its environment."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from rl_lora.errors import UserError

_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several, or as the only one of them."""
    sizes = [int(os.environ.get(name, 0)) for name in _SIZES]
    return "RANK" in os.environ or max(sizes) > 1


def launched_rank() -> int:
    """The number that a launcher has given this process, which may not have joined yet; else 0."""
    return next((int(os.environ[name]) for name in _RANKS if name in os.environ), 0)


def check_launch() -> None:
    """Raises UserError where accelerate has started one process instead of several."""
    asked_for = "MASTER_PORT" in os.environ and "ACCELERATE_DYNAMO_BACKEND" in os.environ
    if asked_for and not is_launched():
        raise UserError(
            "accelerate has started one process where several were asked for, as this machine has "
            "no two GPUs: add --multi_gpu to `accelerate launch` (it works without GPUs)"
        )


def num_restarts() -> int:
    """How often torchrun has started this node's processes again after a failure (--max_restarts).

    0 on nodes where none has failed.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def rendezvous_options(timeout: timedelta) -> dict[str, Any]:
    """Options of init_process_group with which the ranks find one another after a restart.

    torchrun keeps its store, where they would find the addresses of the ranks before them
    (pytorch#135712). On several nodes TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is the only way, as the
    nodes count their restarts separately.
    """
    if not num_restarts() or int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1:
        return {}
    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store = PrefixStore(f"restart {num_restarts()}", store)
    return {"store": store, "rank": rank, "world_size": world_size}
