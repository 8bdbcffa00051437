"""Decoder layers compiled in place, each as one graph with lengths left open.

Layers of one kind share their graphs. There are a few for all of a run: with and without gradient,
the first layer's (nothing before it needs a gradient), and the base's where the adapter is off.
What the graphs keep for the backward pass is chosen by the compiler within a budget.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rl_lora.errors import UserError
from rl_lora.nn.experts import has_experts

_MAX_GRAPHS = 64  # of one kind of layer in this process, over all its models and dtypes


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, GradientCheckpointingLayer]]:
    """The model's decoder layers with their names."""
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield name, module


def compile_layers(model: nn.Module, *, keeps_activations: bool = True) -> None:
    """Compiles the decoder layers for passes without a KV cache; decoding stays eager.

    A layer with experts stays eager as well: which experts run depends on the tokens. A warning
    names such layers.

    Args:
        model: with its adapter.
        keeps_activations: False: a layer keeps only its input for the backward pass, and computes
            itself again. transformers' checkpoints, which do the same, are switched off.

    Raises:
        UserError: at the first pass, if the compiler fails.
    """
    layers = dict(decoder_layers(model))
    eager = [name for name, layer in layers.items() if has_experts(layer)]
    if eager:
        warnings.warn(
            f"model.compile: {len(eager)} of {len(layers)} layers have experts and are not "
            f"compiled, {eager[0]} first",
            stacklevel=2,
        )
    for name, layer in layers.items():
        if name not in eager:
            layer.gradient_checkpointing = False
            layer.forward = _CompiledForward(layer.forward, 1.0 if keeps_activations else 0.0)


class _CompiledForward:
    """A layer's forward method, compiled for passes without a KV cache."""

    def __init__(self, forward: Callable[..., Any], activation_budget: float) -> None:
        self.eager = forward
        backend = _backend(activation_budget)
        self.compiled = torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            return self.eager(*args, **kwargs)
        config = torch._dynamo.config
        if config.recompile_limit < _MAX_GRAPHS:  # newer PyTorch: each thread has its own
            config.recompile_limit = _MAX_GRAPHS
        if not config.specialize_float:  # the adapter's scaling is a constant
            config.specialize_float = True
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            what = " ".join(str(error).split("\n")[:2])  # of further lines, most are its own stack
            raise UserError(f"{what}; model.compile=false runs the layers uncompiled") from error


@cache
def _backend(activation_budget: float) -> Callable[[torch.fx.GraphModule, Sequence[Tensor]], Any]:
    """Inductor, keeping that share of the activations which it would keep for speed."""

    def compiled(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        from torch._functorch import config
        from torch._inductor import config as inductor_config
        from torch._inductor.compile_fx import compile_fx

        # Inputs of the adapter's products (a norm's output, the MLP's inner product) are computed
        # again from what is kept anyway, in one pass over memory. On CUDA, reductions over rows and
        # over columns are not joined: that depends on the number of tokens, and would compile
        # again for other numbers.
        with (
            config.patch(
                activation_memory_budget=activation_budget,
                ban_recompute_materialized_backward=False,
            ),
            inductor_config.patch({"triton.mix_order_reduction": False}),
        ):
            return compile_fx(graph, inputs)

    return compiled
