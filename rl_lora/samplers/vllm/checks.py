"""What is known of a job before its engine is built: whether vLLM takes it, and if it compiles."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from rl_lora.config import RunConfig, SamplingSection
from rl_lora.models.device import pick_device, pick_dtype
from rl_lora.samplers.vllm.engine import check_device
from rl_lora.samplers.vllm.process import import_vllm
from rl_lora.samplers.vllm.settings import check_mixture, is_worth_compiling, merges_adapter


def check_vllm(model_dir: Path, config: RunConfig) -> None:
    """Refuses what vLLM would refuse, before the data is read and the model is loaded.

    Raises:
        UserError: vLLM does not support the device, adapter, model or setting, or is not installed.
    """
    device = pick_device(config.model.device)
    check_device(device, config.lora, model_dir)
    # On a CPU "auto" is decided by a timing, later; the sampler checks it again then.
    is_open = config.model.dtype == "auto" and device.type == "cpu"
    dtype = torch.float32 if is_open else pick_dtype(config.model.dtype, device)
    merges = merges_adapter(config.sampling.merge_adapter, config.lora, dtype=dtype, device=device)
    check_mixture(model_dir, device, merges=merges)
    # Last: whoever hears to install vLLM can then use it.
    if importlib.util.find_spec("vllm") is None:
        import_vllm(device)  # which says how to get it


def with_compilation(
    config: RunConfig,
    device: torch.device,
    num_steps: int,
    on_note: Callable[[str], None],
) -> SamplingSection:
    """[sampling], with eager=false if the config leaves it open and the job is long, on a CPU."""
    section = config.sampling
    if config.resources.servers:
        return section
    is_open = section.backend == "vllm" and section.eager is None and device.type == "cpu"
    if not (is_open and is_worth_compiling(section, num_steps)):
        return section
    on_note(
        "a long job: vLLM compiles the model first, a minute or two; sampling.eager=true if not"
    )
    return section.model_copy(update={"eager": False})
