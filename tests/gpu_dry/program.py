"""The CUDA path of VllmSampler without a GPU, up to the kernels: prints what was found, as JSON.

    python -m tests.gpu_dry.program FOLDER        (`make gpu-dry` makes its environment)

Import, versions, engine settings, the calls we make, and for two model shapes the model as vLLM
builds it for CUDA, with an adapter of ours hot-loaded into it.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open

from rl_lora.adapters.files import save_adapter
from rl_lora.config import LoraSection, ModelSection
from rl_lora.nn.lora import lora_layers
from rl_lora.policy import open_policy
from rl_lora.samplers.vllm.merged_weights import MergedWeights, read_terms
from rl_lora.samplers.vllm.process import import_vllm, process_kept
from rl_lora.samplers.vllm.settings import EngineOptions, engine_settings, lora_settings
from rl_lora.types import Adapter

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
CONTEXT = 1024


def main() -> None:
    """Everything, in one process: vLLM's state is one per process."""
    folder = Path(sys.argv[1])
    import triton.backends

    triton.backends.backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    before = (dict(os.environ), torch.backends.cuda.cudnn_sdp_enabled())
    vllm = import_vllm(CUDA)
    found: dict[str, Any] = {
        "is_process_kept": before == (dict(os.environ), torch.backends.cuda.cudnn_sdp_enabled()),
        "unknown_calls": unknown_calls(vllm),
    }
    shapes = {name: path for name in ("llama", "qwen3") if (path := folder / name).is_dir()}
    with process_kept():
        import vllm as package

        found["kernels"] = kernels()
        found["versions"] = [package.__version__, torch.__version__]
        for name, path in shapes.items():
            found[name] = configured(vllm, path)
        found[f"{name}_float32"] = configured(vllm, path, dtype=torch.float32)["attention"]
        found[f"{name}_asked"] = configured(vllm, path, attention_backend="TRITON_ATTN")[
            "attention"
        ]
        for number, (name, path) in enumerate(shapes.items()):
            found[name] |= hot_loaded(vllm, path, folder / "adapters", number)
    print(json.dumps(found))


def kernels() -> list[str]:
    """What `gpu_stages.libraries` calls, of the libraries that load without a GPU, too."""
    import vllm._custom_ops  # noqa: F401  # loads the kernels
    import vllm.vllm_flash_attn as flash
    from gpu_stages.libraries import flash_attention, heads

    signature, found = inspect.signature(flash.flash_attn_varlen_func), []

    def call(**keywords: Any) -> torch.Tensor:
        signature.bind(**keywords)
        found.append("flash_attn_varlen_func")
        return keywords["q"]

    with mock.patch.object(flash, "flash_attn_varlen_func", call):
        flash_attention(*heads(CPU, torch.bfloat16))
    operators = {"rms_norm": torch.ops._C, "fwd": torch.ops._vllm_fa3_C}
    return found + [name for name, library in operators.items() if hasattr(library, name)]


def unknown_calls(vllm: SimpleNamespace) -> list[str]:
    """Calls and fields of vLLM, as the sampler uses them, that this version does not take."""
    engine, me = vllm.LLMEngine, None
    calls = {
        "add_request": (engine.add_request, (me, "0", [1], me), {"lora_request": None}),
        "abort_request": (engine.abort_request, (me, ["0"]), {}),
        "step": (engine.step, (me,), {}),
        "has_unfinished_requests": (engine.has_unfinished_requests, (me,), {}),
        "add_lora": (engine.add_lora, (me, None), {}),
        "list_loras": (engine.list_loras, (me,), {}),
        "reset_prefix_cache": (engine.reset_prefix_cache, (me,), {}),
        "sleep": (engine.sleep, (me,), {"level": 1}),
        "wake_up": (engine.wake_up, (me,), {}),
        "get_tokenizer": (engine.get_tokenizer, (me,), {}),
        "apply_model": (engine.apply_model, (me, len), {}),
        "collective_rpc": (
            engine.collective_rpc,
            (me, "reload_weights"),
            {"kwargs": {"weights_path": "x"}},
        ),
        "from_engine_args": (engine.from_engine_args, (None,), {}),
        "tokens_input": (vllm.tokens_input, ([1],), {}),
        "LoRARequest": (vllm.LoRARequest, ("name", 1, "path"), {}),
        "SamplingParams": (
            vllm.SamplingParams,
            (),
            {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "max_tokens": 1,
                "stop": None,
                "stop_token_ids": [1],
                "ignore_eos": True,
                "seed": 0,
                "logprobs": 0,
                "prompt_logprobs": 0,
                "flat_logprobs": True,
                "detokenize": False,
                "output_kind": vllm.RequestOutputKind.FINAL_ONLY,
            },
        ),
    }
    wrong = []
    for name, (function, arguments, keywords) in calls.items():
        try:
            inspect.signature(function).bind(*arguments, **keywords)
        except TypeError as error:
            wrong.append(f"{name}: {error}")
    request = vllm.LoRARequest("name", 1, "path")
    if (request.lora_name, request.lora_int_id) != ("name", 1):
        wrong.append("LoRARequest: its fields")
    from vllm.v1.worker.gpu_worker import Worker

    if not hasattr(Worker, "reload_weights"):
        wrong.append("Worker.reload_weights")
    return wrong


def engine_config(vllm: SimpleNamespace, path: Path, dtype: torch.dtype, **sampling: Any) -> Any:
    """vLLM's own settings, made of ours."""
    settings = engine_settings(
        path,
        EngineOptions(**sampling),
        dtype=dtype,
        device=CUDA,
        max_model_len=CONTEXT,
    )
    settings |= lora_settings(LoraSection(rank=1), dtype)
    return vllm.EngineArgs(**settings).create_engine_config()


def configured(
    vllm: SimpleNamespace, path: Path, *, dtype: torch.dtype = torch.bfloat16, **sampling: Any
) -> dict[str, Any]:
    """What vLLM makes of our settings for a model."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.attention.selector import get_attn_backend

    config = engine_config(vllm, path, dtype, **sampling)
    compilation, lora = config.compilation_config, config.lora_config
    with set_current_vllm_config(config):
        backend = get_attn_backend(64, dtype, "auto", use_mla=False)
        flash_version = get_flash_attn_version()
    return {
        "is_v2_runner": bool(config.use_v2_model_runner),
        "is_eager": config.model_config.enforce_eager,
        "graphs": compilation.cudagraph_mode.name,
        "num_graph_sizes": len(compilation.cudagraph_capture_sizes),
        "has_graphs_without_adapter": compilation.cudagraph_specialize_lora,
        "max_lora_rank": lora.max_lora_rank,
        "max_loras": lora.max_loras,
        "lora_dtype": str(lora.lora_dtype),
        "has_prefix_cache": config.cache_config.enable_prefix_caching,
        "logprobs": config.model_config.logprobs_mode,
        "attention": backend.get_name(),
        "flash_attention": flash_version,
    }


def hot_loaded(vllm: SimpleNamespace, path: Path, folder: Path, number: int) -> dict[str, Any]:
    """vLLM's model for CUDA, built on the CPU, and an adapter of ours loaded into it."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.model_executor.model_loader import get_model

    section = ModelSection(name=str(path), device="cpu", dtype="bfloat16")
    policy = open_policy(path, section, LoraSection(rank=1), seed=0)
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    adapter = save_adapter(policy, folder, version=number, run_name="dry")
    config = engine_config(vllm, path, torch.bfloat16)
    config.device_config.device = CPU
    with set_current_vllm_config(config):
        if number == 0:
            store = f"file://{folder.resolve()}/store"
            init_distributed_environment(1, 0, store, 0, backend="gloo")
            ensure_model_parallel_initialized(1, 1)
        model = get_model(vllm_config=config)
        is_merged = merges(model, path, adapter)
        manager = LRUCacheWorkerLoRAManager(config, CPU, getattr(model, "embedding_modules", {}))
        manager.create_lora_manager(model, config)
        torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign,assignment]
        is_added = manager.add_adapter(vllm.LoRARequest(adapter.name, 1, str(adapter.path)))
    return {
        "model": type(model).__name__,
        "is_merged": is_merged,
        "is_added": is_added,
        "adapters": sorted(manager.list_adapters()),
        "unequal": unequal(manager._adapter_manager.modules, dict(list(lora_layers(policy.model)))),
    }


def merges(model: Any, path: Path, adapter: Adapter) -> bool:
    """Whether an adapter is merged into the plain weights of vLLM's model, and taken out again."""
    merged, layer = MergedWeights(model, path), "model.layers.1.self_attn.k_proj"
    with safe_open(path / "model.safetensors", framework="pt") as opened:
        weight_OI = opened.get_tensor(f"{layer}.weight")
        start = len(opened.get_tensor(layer.replace("k_proj", "q_proj") + ".weight"))
    place_OI = model.model.layers[1].self_attn.qkv_proj.weight.data[start:][: len(weight_OI)]
    term = read_terms(adapter)[layer]
    merged.set_target(read_terms(adapter))
    merged.load()
    wanted_OI = (weight_OI + term.scaling * term.b_OR.double() @ term.a_RI.double()).bfloat16()
    is_merged = torch.equal(place_OI, wanted_OI) and not torch.equal(place_OI, weight_OI)
    merged.set_target({})
    merged.load()
    return is_merged and torch.equal(place_OI, weight_OI)


def unequal(modules: dict[str, Any], layers: dict[str, Any]) -> list[str]:
    """Our layers whose A or scaled B vLLM does not hold, of all layers of the policy."""
    joined = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2)}
    joined |= {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    wrong = []
    for name, layer in layers.items():
        stem, _, leaf = name.rpartition(".")
        target, part = joined.get(leaf, (leaf, 0))
        module = modules[f"{stem}.{target}"]
        a_RI = module.lora_a_stacked[part][0, 0, : layer.lora_A.shape[0]]
        b_OR = module.lora_b_stacked[part][0, 0, :, : layer.lora_B.shape[1]]
        wanted_RI = layer.lora_A.detach().bfloat16()
        wanted_OR = layer.lora_B.detach().bfloat16().float() * layer.scaling
        is_near = torch.allclose(b_OR.float(), wanted_OR, rtol=1e-2)
        if not (torch.equal(a_RI, wanted_RI) and is_near and bool(b_OR.any())):
            wrong.append(name)
    return wrong


if __name__ == "__main__":
    main()
