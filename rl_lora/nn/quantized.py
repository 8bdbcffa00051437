"""A frozen base in 8 or 4 bits (QLoRA, Dettmers et al., arXiv 2305.14314), by bitsandbytes.

    int8   each row by its largest absolute value (LLM.int8(), arXiv 2208.07339, of weights only)
    nf4    blocks of 64 in NormalFloat's 16 values, the scales in 8 bits (double quantization)

Quantized are the linear layers except lm_head, whether or not they have an adapter; embedding,
norms and biases stay as they are. A `QuantizedWeight` stands in for a layer's weight: any product
with it is one with the dequantized weight, which is made for that product and then freed, forward
and backward. So the rest of the code reads `layer.weight` as ever. Departure from the paper: it
computes in bfloat16 whatever the base's dtype, and this in `model.dtype`.

Quantization runs on the CPU, so that the base is the same on any device.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterator
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rl_lora.errors import UserError
from rl_lora.nn.experts import has_experts, is_mixture

_BLOCK, _SCALES_BLOCK = 64, 256  # weights to a scale, scales to one of the second quantization
_aten = torch.ops.aten


class QuantizedWeight(Tensor):
    """A frozen weight [O, I], or a transposed view of one, that is kept quantized.

    It has the shape, dtype and device of the weight that it stands for. Written to, it raises.

    Args:
        kind: "int8" or "nf4".
        parts: int8: values int8 [O, I], each row's largest absolute value, float32 [O]. nf4: values
            uint8 [O * I / 2, 1], scales uint8, scales of the scales float32, and their offset.
        shape: [O, I].
        dtype: of the dequantized weight.
        is_transposed: whether this is the view [I, O].
    """

    kind: str
    parts: tuple[Tensor, ...]
    stored_shape: tuple[int, ...]
    is_transposed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # limits: what a tensor is made of
    @staticmethod
    def __new__(
        cls,
        kind: str,
        parts: tuple[Tensor, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        is_transposed: bool = False,
    ) -> Self:
        self: Self = torch.Tensor._make_wrapper_subclass(
            cls,
            shape[::-1] if is_transposed else shape,
            strides=(1, shape[1]) if is_transposed else (shape[1], 1),
            dtype=dtype,
            device=parts[0].device,
        )
        self.kind, self.parts, self.is_transposed = kind, parts, is_transposed
        self.stored_shape = tuple(shape)
        return self

    def dequantized(self) -> Tensor:
        """A new plain tensor of the same shape and dtype."""
        library = _library()
        if self.kind == "int8":
            weight_OI = library.int8_vectorwise_dequant(*self.parts).to(self.dtype)
        else:
            values, scales, scales_of_scales, offset = self.parts
            inner = library.QuantState(
                scales_of_scales, None, _codes(values.device), _SCALES_BLOCK, None, torch.float32
            )
            shape = torch.Size(self.stored_shape)
            state = library.QuantState(
                scales, shape, None, _BLOCK, "nf4", self.dtype, offset, inner
            )
            weight_OI = library.dequantize_4bit(values, state)
        return weight_OI.T if self.is_transposed else weight_OI

    @property
    def stored_bytes(self) -> int:
        """Of the quantized values and their scales."""
        return sum(part.nbytes for part in self.parts)

    def _like(self, parts: tuple[Tensor, ...], *, transposes: bool = False) -> QuantizedWeight:
        is_transposed = self.is_transposed != transposes
        return QuantizedWeight(self.kind, parts, self.stored_shape, self.dtype, is_transposed)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if func in (_aten.t.default, _aten.permute.default):  # of two axes, permuted: `.T`
            return first._like(first.parts, transposes=True)
        if func is _aten.detach.default:
            return first._like(first.parts)
        if func is _aten._to_copy.default and kwargs.get("dtype", first.dtype) == first.dtype:
            device = kwargs.get("device")
            return first._like(tuple(part.to(device) for part in first.parts))
        if isinstance(first, QuantizedWeight) and func._schema.is_mutable:
            raise RuntimeError(f"a quantized weight is frozen, and {func} writes to it")
        args, kwargs = tree_map_only(QuantizedWeight, QuantizedWeight.dequantized, (args, kwargs))
        return func(*args, **kwargs)

    # `nn.Module.to` keeps the attributes of a tensor that has these two.
    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        raise NotImplementedError("compiled layers do not take a quantized base")

    @staticmethod
    def __tensor_unflatten__(*_: Any) -> Any:
        raise NotImplementedError("compiled layers do not take a quantized base")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.kind}, {list(self.shape)}, {self.dtype})"


def check_quantizable(config: PretrainedConfig) -> None:
    """Raises UserError for a mixture of experts, or without bitsandbytes: before weights are
    read."""
    if is_mixture(config):
        raise _no_experts()
    _library()


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """The layers of a model without an adapter that `quantize_layers` quantizes, with their names.

    Raises:
        UserError: the model has experts, which are not linear layers.
    """
    if has_experts(model):
        raise _no_experts()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name, module


def quantized_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(outputs, inputs) of `quantized_layers`."""
    shapes = []
    for _, layer in quantized_layers(model):
        weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        shapes.append((int(weight.shape[0]), int(weight.shape[1])))
    return shapes


def quantize_layers(model: nn.Module, kind: str) -> None:
    """Replaces the layers' weights by quantized ones, one after another, on the CPU.

    Raises:
        UserError: as `quantized_layers`, or bitsandbytes is missing.
    """
    for _, layer in list(quantized_layers(model)):
        assert isinstance(layer.weight, Tensor)
        weight = quantized_weight(layer, layer.weight, kind)
        layer.weight = nn.Parameter(weight, requires_grad=False)


def dequantized_weight(layer: nn.Module, weight: Tensor, kind: str) -> Tensor:
    """What the layer computes with where `weight` is quantized; contiguous."""
    return quantized_weight(layer, weight, kind).dequantized().contiguous()


@torch.no_grad()
def quantized_weight(layer: nn.Module, weight: Tensor, kind: str) -> QuantizedWeight:
    """The weight of a linear layer, or of a Conv1D (GPT-2), which has it as [I, O]."""
    is_transposed = isinstance(layer, Conv1D)
    weight_OI = (weight.T if is_transposed else weight).detach().contiguous()
    library = _library()
    if kind == "int8":
        values, scale_O, _ = library.int8_vectorwise_quant(weight_OI)
        parts: tuple[Tensor, ...] = (values, scale_O)
    else:
        values, state = library.quantize_4bit(
            weight_OI, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        parts = (values, state.absmax, state.state2.absmax, state.offset)
    return QuantizedWeight(kind, parts, tuple(weight_OI.shape), weight_OI.dtype, is_transposed)


def stored_bytes(num_rows: int, num_columns: int, kind: str) -> int:
    """Of a quantized weight [num_rows, num_columns] with its scales."""
    number = num_rows * num_columns
    if kind == "int8":
        return number + 4 * num_rows
    num_scales = math.ceil(number / _BLOCK)
    return math.ceil(number / 2) + num_scales + 4 * math.ceil(num_scales / _SCALES_BLOCK) + 4


def _no_experts() -> UserError:
    return UserError(
        "model.quantize: the experts of a mixture are not linear layers and would stay "
        "unquantized; remove model.quantize"
    )


@cache
def _library() -> Any:
    """bitsandbytes.functional. Raises UserError where it is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "model.quantize needs bitsandbytes, which is not installed; install it (pip install "
            "'rl-lora[quant]'), or remove model.quantize"
        )
    return importlib.import_module("bitsandbytes.functional")


@cache
def _codes(device: torch.device) -> Tensor:
    """The 256 values of a scale in 8 bits, float32."""
    codes: Tensor = _library().create_dynamic_map().to(device)
    return codes
