"""CUDA without a GPU: vLLM under our settings and calls, in both releases that we accept, and the
learner's graphs as machine code.

vLLM 0.26 with PyTorch 2.11 runs in its own environment (`make gpu-dry`), up to the kernels;
0.32 is the environment's own build for CPUs, whose Python code is the same.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from rl_lora.config import LoraSection
from rl_lora.errors import UserError
from rl_lora.samplers.vllm.process import VERSIONS, check_versions, import_vllm, process_kept
from rl_lora.samplers.vllm.settings import EngineOptions, engine_settings, lora_settings
from tests.gpu_dry.program import unknown_calls

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-gpu-dry"
STUBS, PLUGIN = ENVIRONMENT / "stub", ROOT / "tests" / "gpu_dry" / "plugin"
COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPECTED = {
    "is_v2_runner": True,
    "is_eager": False,
    "graphs": "FULL_AND_PIECEWISE",
    "has_graphs_without_adapter": True,
    "max_lora_rank": 1,
    "max_loras": 1,
    "lora_dtype": "torch.bfloat16",
    "has_prefix_cache": True,
    "logprobs": "processed_logprobs",
    "attention": "FLASH_ATTN",
    "flash_attention": 3,
    "num_graph_sizes": 21,
    "is_merged": True,
    "is_added": True,
    "adapters": [1],
    "unequal": [],
}


def need_environment() -> None:
    """Skips the test where the environment of `make gpu-dry` is absent."""
    if not all((STUBS / name).is_file() for name in ("libcuda.so.1", "libcudart_stub.so")):
        pytest.skip(f"needs the environment of `make gpu-dry`: {ENVIRONMENT} is absent or old")


def found_by(program: str, *arguments: str | Path, **variables: str) -> dict[str, Any]:
    """The JSON that a program of tests/gpu_dry prints last, run in the environment of
    `make gpu-dry` with these environment variables; skips the test where that is absent."""
    need_environment()
    path = ":".join(str(folder) for folder in (ROOT, ROOT / "scripts", PLUGIN))
    result = subprocess.run(
        [ENVIRONMENT / "bin" / "python", "-m", f"tests.gpu_dry.{program}", *arguments],
        cwd=ROOT,
        env=os.environ | {"LD_LIBRARY_PATH": str(STUBS), "PYTHONPATH": path} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_cuda_path_up_to_the_kernels(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**COMMON)).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    Qwen3ForCausalLM(Qwen3Config(**COMMON)).to(torch.bfloat16).save_pretrained(tmp_path / "qwen3")
    found = found_by("program", tmp_path)
    assert found == {
        "is_process_kept": True,
        "unknown_calls": [],
        "kernels": ["flash_attn_varlen_func", "rms_norm", "fwd"],
        "versions": ["0.26.0", "2.11.0+cu130"],
        "llama": EXPECTED | {"model": "LlamaForCausalLM"},
        "qwen3": EXPECTED | {"model": "Qwen3ForCausalLM"},
        "qwen3_float32": "TRITON_ATTN",
        "qwen3_asked": "TRITON_ATTN",
    }


@pytest.mark.long
@pytest.mark.timeout(900)
def test_what_is_compiled_agrees_with_its_references_in_the_older_pytorch_too() -> None:
    """On the CPU, in Python 3.12: PyTorch 2.11 once lost all gradients of a layer that 2.13 had."""
    need_environment()
    names = ("attention", "compiled", "compiled_head", "fast_paths", "lora_swiglu", "optimized")
    command = [ENVIRONMENT / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "not long", *(f"tests/nn/test_{name}.py" for name in names)]
    variables = {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("shape", ["smollm2-135m", "qwen3-0.6b"])
def test_the_learner_compiles_for_a_gpu(
    shape: str, rank: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Of a layer, forward and backward; above rank 1 each product of A and of B is one more.
    most_launches = 110 if rank == 1 else 135
    found = found_by(
        "compile_learner",
        shape,
        str(rank),
        tmp_path,
        LD_PRELOAD=str(STUBS / "libcudart_stub.so"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path_factory.getbasetemp() / "inductor"),
    )
    print(json.dumps(found))
    failed = [f"{name}: {error}" for name, error in found["failed"].items()]
    assert not failed, f"{len(failed)} of {found['kernels']} kernels: " + "\n".join(failed)
    first, *others = found["graphs"]
    assert others == [first] * 3, f"batches of {found['tokens']} tokens compiled again"
    layer = [found["forward"], found["backward"]]
    assert all(part["triton"] and part["products"] >= 7 and part["attention"] for part in layer)
    assert sum(part["launches"] for part in layer) <= most_launches, layer


def test_the_other_release_takes_the_same_calls_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    vllm = import_vllm(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    settings = engine_settings(
        tmp_path,
        EngineOptions(attention_backend="TRITON_ATTN"),
        dtype=torch.bfloat16,
        device=torch.device("cuda"),
        max_model_len=64,
    ) | lora_settings(LoraSection(), torch.bfloat16)
    with process_kept():
        assert unknown_calls(vllm) == []
        assert vllm.EngineArgs(**settings).compilation_config.cudagraph_specialize_lora


@pytest.mark.parametrize(
    ("vllm_version", "torch_version", "is_known"),
    [
        ("0.26.0", "2.11.0+cu130", True),
        ("0.26.1.post1", "2.11.1", True),
        ("0.32.0+cpu", "2.13.0", True),
        ("0.32.0", "2.11.0", False),
        ("0.26.0", "2.13.0", False),
        ("0.27.0", "2.13.0", False),
        ("0.3.2", "2.13.0", False),
        ("dev", "2.13.0", False),
    ],
)
def test_versions(vllm_version: str, torch_version: str, is_known: bool) -> None:
    if is_known:
        check_versions(vllm_version, torch_version, "fix")
        return
    told = (
        f"vLLM {vllm_version} with PyTorch {torch_version}: the sampler works with vLLM 0.26 with "
        "PyTorch 2.11 or vLLM 0.32 with PyTorch 2.13: fix"
    )
    with pytest.raises(UserError) as got:
        check_versions(vllm_version, torch_version, "fix")
    assert str(got.value) == told


def test_the_gpu_extra_takes_the_releases_of_the_table() -> None:
    import tomllib

    from packaging.requirements import Requirement

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (text,) = extras["optional-dependencies"]["gpu"]
    minors = range(20, 40)
    taken = {f"0.{n}" for n in minors if Requirement(text).specifier.contains(f"0.{n}.0")}
    assert taken == set(VERSIONS)
