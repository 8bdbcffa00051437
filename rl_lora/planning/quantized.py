"""What a quantized base takes: counted exactly, from the shapes of its layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from rl_lora.models.shapes import build_on_meta
from rl_lora.nn.quantized import quantized_shapes, stored_bytes


@dataclass(frozen=True, slots=True)
class QuantizedBase:
    """Bytes of a base with model.quantize.

    Example, SmolLM2-135M in nf4 and float32: QuantizedBase(num_bytes=168156792, layer=3538944)
    """

    num_bytes: int  # quantized layers with their scales, and all else in the model's dtype
    layer: int  # of the largest layer's dequantized weight, which one product needs


def quantized_base(
    model_config: PretrainedConfig, num_base: int, kind: str, dtype: torch.dtype
) -> QuantizedBase:
    """Args: num_base: parameters of the base. kind: model.quantize. dtype: of the model.

    Raises:
        UserError: the model has experts.
    """
    shapes = quantized_shapes(build_on_meta(model_config))
    sizes = [rows * columns for rows, columns in shapes]
    stored = sum(stored_bytes(rows, columns, kind) for rows, columns in shapes)
    # bitsandbytes dequantizes int8 in float32 only.
    first = 4 if kind == "int8" and dtype != torch.float32 else 0
    return QuantizedBase(
        num_bytes=stored + (num_base - sum(sizes)) * dtype.itemsize,
        layer=max(sizes) * (dtype.itemsize + first),
    )
