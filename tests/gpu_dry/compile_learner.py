"""The learner's graphs, compiled for an H200 on a machine without a GPU; prints JSON.

    python -m tests.gpu_dry.compile_learner SHAPE RANK FOLDER     (`make gpu-dry` has what it needs)

SHAPE is one of `gpu_stages.models.SHAPES`, in two layers: the second one's graphs are those of all
further layers. With a rank above 1 lm_head has an adapter as well, for the graphs of such a head.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_stages.learn import ON_GPU, microbatches
from gpu_stages.models import make_config
from gpu_stages.stages import Context
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from rl_lora.config import LoraSection, ModelSection
from rl_lora.nn import flash
from rl_lora.nn.segments import AttentionLayout
from rl_lora.policy import Policy, open_policy
from rl_lora.types import Microbatch
from tests.gpu_dry.fake_gpu import Graph, fake_gpu

CUDA = torch.device("cuda")
TOKENS = (4096, 2048, 4095, 16_384)  # of a batch; graphs are compiled for the first one
TEMPERATURES = (1.0, 0.7)


def main() -> None:
    """Compiles for the first batch, then sees what the others compile."""
    shape, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    config = make_config(shape, Context(CUDA, folder, folder), num_layers=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    model = ModelSection(name=str(folder), device="cpu", dtype="bfloat16", compile=True)
    policy = open_policy(folder, model, LoraSection(rank=rank, lm_head=rank > 1), seed=0)
    assert policy.can_share_prompts
    batches = [microbatches(policy, ON_GPU, tokens, seed=tokens, count=1)[0] for tokens in TOKENS]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with fake_gpu() as compiled:
        policy.model.to_empty(device=CUDA)
        num_graphs = []
        for batch in map(on_gpu, batches):
            passes(policy, batch)
            num_graphs.append(len(compiled.graphs))
        attention = attention_operators(config, on_gpu(batches[0]))
    found: dict[str, Any] = {
        "tokens": [batch.num_tokens for batch in batches],
        "graphs": num_graphs,  # after each batch
        "kernels": len(compiled.kernels),
        "failed": compiled.failed,
    }
    learned = [
        g for g in compiled.graphs if not g.is_inference and "flash_parts" in "".join(g.calls)
    ]
    for name, is_backward in (("forward", False), ("backward", True)):
        graph = [g for g in learned if g.is_backward == is_backward][1]
        found[name] = figures(graph, attention[is_backward], batches[0].num_tokens)
    print(json.dumps(found))


def on_gpu(batch: Microbatch) -> Microbatch:
    """A batch of these sizes."""
    tensors = {
        name: torch.empty_like(value, device=CUDA)
        for name in Microbatch.__slots__
        if isinstance(value := getattr(batch, name), Tensor)
    }
    assert batch.layout is not None
    starts_S, families_N = (torch.empty_like(x, device=CUDA) for x in batch.layout[:2])
    layout = AttentionLayout(starts_S, families_N, batch.layout.sizes)
    return replace(batch, **tensors, layout=layout)


def passes(policy: Policy, batch: Microbatch) -> None:
    """All that a run makes of a batch: with and without gradient, and the base's log-probs."""
    parameters = list(policy.trainable().values())
    for temperature in TEMPERATURES:
        with torch.no_grad():
            policy.token_logprobs(batch, temperature)
        policy.reference_logprobs(batch, temperature)
        logprobs_C, _ = policy.token_logprobs(batch, temperature)
        torch.autograd.grad(logprobs_C.sum(), parameters)


class _Operators(TorchDispatchMode):
    """Counts operators that compute: no views, no fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        is_memory = function.is_view or "empty" in function.__name__
        self.num_calls += function.namespace == "aten" and not is_memory
        return function(*args, **(kwargs or {}))


def attention_operators(config: PretrainedConfig, batch: Microbatch) -> tuple[int, int]:
    """How many operators flash attention's two operators call, forward and backward."""
    num_tokens, scale = batch.token_ids_BT.shape[1], config.head_dim**-0.5
    query_THD, key_TJD, value_TJD = (
        torch.empty(num_tokens, heads, config.head_dim, dtype=torch.bfloat16, device=CUDA)
        for heads in (config.num_attention_heads, *[config.num_key_value_heads] * 2)
    )
    inputs = query_THD, key_TJD, value_TJD
    assert flash.can_run(query_THD)
    assert batch.layout is not None
    # What the operators run on a GPU; they themselves would return fake tensors at once.
    run, run_backward = (
        operator._init_fn for operator in (flash.attend_in_parts, flash.attend_in_parts_backward)
    )
    with _Operators() as forward:
        out_THD, lse_HT, *_ = run(*inputs, *batch.layout, scale)
    with _Operators() as backward:
        run_backward(out_THD, *inputs, out_THD, lse_HT, *batch.layout, scale)
    return forward.num_calls, backward.num_calls


def figures(graph: Graph, num_attention: int, num_tokens: int) -> dict[str, Any]:
    """Launches of a layer's graph by kind, and bytes that it reads and writes per token, weights
    included. An operator of attention counts as one launch."""
    kinds = Counter(call.split("_")[0].split(".")[0] for call in graph.calls)
    operators = kinds["torch"]
    assert operators == 1, f"one operator, attention, is not made by the compiler: {graph.calls}"
    launches = kinds["triton"] + kinds["extern"] + num_attention
    return {
        "launches": launches,
        "triton": kinds["triton"],
        "products": kinds["extern"],
        "attention": num_attention,
        "on_host": kinds["cpp"],
        "bytes_per_token": round(graph.num_bytes / num_tokens),
    }


if __name__ == "__main__":
    main()
