"""Frees the GPU for the learner while the engine is idle: vLLM's sleep mode, level 1.

Weights and adapter slots wait in the host's memory, and the KV cache is dropped. Addresses stay the
same, so that CUDA graphs remain valid; the graphs themselves and the workspaces stay on the GPU.

The alternative would be one copy of the base for both, the learner's weights as views of the
engine's joined ones (q, k and v; gate and up). That saves one copy of the base, but depends on the
layout that each of vLLM's models and releases chooses (padded, transposed, quantized), and the
larger part, the KV cache, would have to be freed all the same.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from rl_lora.errors import StaleAdapterError, UserError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def put_to_sleep(engine: Any) -> list[int]:
    """Takes an idle engine's weights and KV cache off the GPU; it must not be asleep already.

    Returns:
        What `wake` compares the weights with.
    """
    (sums,) = engine.apply_model(checksums)
    engine.sleep(level=1)
    return list(sums)


def wake(engine: Any, sums: list[int]) -> None:
    """Brings back what `put_to_sleep` took away, which had returned `sums`.

    Raises:
        UserError: it does not fit next to what the learner holds; the engine is unusable then.
        StaleAdapterError: weights or adapter slots are not what they were.
    """
    torch.cuda.empty_cache()  # vLLM takes its memory from the driver, past PyTorch's cache
    try:
        engine.wake_up()
    except RuntimeError as error:
        raise UserError(
            f"the GPU has no room to wake the sampler next to the learner ({error}); lower "
            "sampling.memory_fraction, and end what else runs on the GPU"
        ) from error
    (found,) = engine.apply_model(checksums)
    if list(found) != sums:
        raise StaleAdapterError(
            "the sampler's weights or adapter changed while it slept: their checksums differ"
        )


def wake_to_close(engine: Any) -> None:
    """Maps a sleeping engine's memory again before it is shut down.

    vLLM (0.26, 0.32) frees addresses as if memory were behind them, and would report the driver's
    error in the next engine of the process (vllm#36651).
    """
    torch.cuda.empty_cache()
    try:
        engine.wake_up()
    except RuntimeError as error:
        warnings.warn(
            f"a sleeping vLLM engine is closed without being woken ({error}); another one may not "
            "start in this process",
            stacklevel=2,
        )


@torch.no_grad()
def checksums(model: nn.Module) -> list[int]:
    """The sum of the bits, read as integers, of each tensor that the engine's model computes with:
    parameters, buffers and adapter slots."""
    slots = [
        slot
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("_stacked")
        for slot in (value if isinstance(value, tuple | list) else (value,))
    ]
    tensors = [*model.parameters(), *model.buffers(), *slots]
    sums = [_bits(tensor).sum(dtype=torch.int64) for tensor in tensors if tensor.numel()]
    # One transfer in place of one for each tensor.
    return torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])
