"""vLLM inside the learner's process: imports it, and restores what it changes."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import random
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rl_lora.errors import UserError
from rl_lora.models.shapes import head_size
from rl_lora.samplers.vllm.settings import text_config

# The releases this project was tested with, and the PyTorch that each is built against;
# pyproject.toml's extra `gpu` must agree.
VERSIONS = {"0.26": "2.11", "0.32": "2.13"}

# Read by vLLM at import or when an engine is made; the user's own values win.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # the sampler checks the length itself
    # It cannot return log-probs of the distribution sampled from, which are always needed, and vLLM
    # does not start if it is chosen but not installed.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",  # kernels for fp8 weights, compiled and warmed up at the start
    # An engine is one process; without these, vLLM searches for the machine's address in a network.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
}


def import_vllm(device: torch.device) -> SimpleNamespace:
    """The parts of vLLM that the sampler uses.

    Raises:
        UserError: vLLM is not installed, does not import, or is built for another device.
    """
    extra = "cpu" if device.type == "cpu" else "gpu"
    fix = f"`pip install rl_lora[{extra}]`, or set sampling.backend=torch"
    with process_kept():
        try:
            vllm = importlib.import_module("vllm")
            platform = importlib.import_module("vllm.platforms").current_platform
            inputs = importlib.import_module("vllm.inputs")
            sampling_params = importlib.import_module("vllm.sampling_params")
            requests = importlib.import_module("vllm.lora.request")
        except ModuleNotFoundError as error:
            if error.name == "vllm":
                raise UserError(f"vLLM is not installed: {fix}") from error
            raise UserError(f"vLLM lacks the module {error.name!r}: {fix}") from error
        except ImportError as error:
            raise UserError(f"vLLM does not import ({error}): {fix}") from error
        if platform.is_cpu() != (device.type == "cpu"):
            raise UserError(
                f"the installed vLLM is built for {platform.device_type or 'no device'}, and "
                f"model.device is {device.type}: {fix}"
            )
        check_versions(vllm.__version__, torch.__version__, fix)
        return SimpleNamespace(
            LLMEngine=vllm.LLMEngine,
            EngineArgs=vllm.EngineArgs,
            SamplingParams=vllm.SamplingParams,
            RequestOutputKind=sampling_params.RequestOutputKind,
            LoRARequest=requests.LoRARequest,
            tokens_input=inputs.tokens_input,
        )


def check_versions(vllm_version: str, torch_version: str, fix: str) -> None:
    """Raises UserError for a pair that is not in VERSIONS, e.g. '0.26.0' and '2.11.0+cu130'.

    The sampler and its CPU parts use more of vLLM than its public interface.
    """
    found = [".".join(text.split(".")[:2]) for text in (vllm_version, torch_version)]
    if VERSIONS.get(found[0]) != found[1]:
        known = " or ".join(f"vLLM {a} with PyTorch {b}" for a, b in VERSIONS.items())
        raise UserError(
            f"vLLM {vllm_version} with PyTorch {torch_version}: the sampler works with {known}: "
            f"{fix}"
        )


def keep_float32_exact() -> None:
    """Makes Triton multiply float32 as float32, for the life of the process.

    vLLM's attention and LoRA kernels for float32 keep Triton's default on NVIDIA GPUs, TF32 with 10
    bits. Kernels are compiled at their first use, so the setting must stay; it does not affect
    products of other dtypes, and the user's own value wins.
    """
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


def keep_compiled_apart(rank: int) -> None:
    """Gives each rank but the first its own cache of vLLM's compiled graphs; in `process_kept`.

    They are not all written atomically, and the nodes of a cluster may share their home directory.
    """
    if rank > 0:
        root = Path(importlib.import_module("vllm.envs").VLLM_CACHE_ROOT)
        os.environ["VLLM_CACHE_ROOT"] = str(root / f"rank_{rank}")


def check_cpu_heads(model_dir: Path) -> None:
    """Raises UserError if vLLM's attention kernels for CPUs do not support the model's heads.

    vLLM itself only finds out at the first sample.
    """
    with process_kept():
        backend = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    sizes = backend.CPUAttentionBackend.get_supported_head_sizes()
    size = head_size(text_config(model_dir))
    if size not in sizes:
        raise UserError(
            f"vLLM's CPU kernels take heads of {', '.join(map(str, sizes))}, and those of "
            f"{model_dir} are {size} wide; set sampling.backend=torch"
        )


@contextlib.contextmanager
def process_kept() -> Iterator[None]:
    """Restores what vLLM changes in its process.

    Environment (LD_PRELOAD and thread settings would reach every later child process), CPU
    affinity, PyTorch's number of threads, `torch.set_num_threads` (vLLM's CPU worker replaces it
    with a function that does nothing), the random state of Python, NumPy and PyTorch (an engine
    seeds all three), warnings, cuDNN's attention (vLLM's import switches it off in PyTorch), and
    the memory policy: the CPU worker binds the process to one NUMA node.
    """
    environment = dict(os.environ)
    num_threads = torch.get_num_threads()
    set_num_threads = torch.set_num_threads
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    has_cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if "VLLM_LOGGING_LEVEL" not in environment:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        with (
            torch_random_state_kept(),
            warnings.catch_warnings(),
            _memory_unbound(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        torch.backends.cuda.enable_cudnn_sdp(has_cudnn_attention)
        torch.set_num_threads = set_num_threads
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        if affinity is not None and os.sched_getaffinity(0) != affinity:
            os.sched_setaffinity(0, affinity)
        os.environ.clear()
        os.environ.update(environment)


def torch_random_state_kept() -> contextlib.AbstractContextManager[None]:
    """Restores PyTorch's random state, of the CPU and of a GPU in use; only in the main thread.

    The state belongs to the process: another thread that restored it would undo what the main
    thread draws meanwhile. Seeded requests draw from their own generators.
    """
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()
    is_used = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = [torch.cuda.current_device()] if is_used else []
    return torch.random.fork_rng(devices=devices)


@contextlib.contextmanager
def _memory_unbound() -> Iterator[None]:
    """Inside, `init_cpu_memory_env` of vLLM's CPU worker does nothing.

    It would bind all memory of the process, also the learner's, to one NUMA node for good.
    """
    operators: Any = torch.ops._C
    saved = operators.__dict__.get("init_cpu_memory_env")
    operators.__dict__["init_cpu_memory_env"] = lambda nodes: None
    try:
        yield
    finally:
        if saved is None:
            del operators.__dict__["init_cpu_memory_env"]
        else:
            operators.__dict__["init_cpu_memory_env"] = saved
