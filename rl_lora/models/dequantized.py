"""The weights that a quantized base computes with, as a model directory: for engines with their own
copy of the weights, and for other tools."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from rl_lora.errors import UserError
from rl_lora.models.resolve import ModelEntry, made
from rl_lora.models.shapes import build_on_meta
from rl_lora.nn.quantized import check_quantizable, dequantized_weight, quantized_layers

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def dequantized_dir(model_dir: Path, quantize: str | None, dtype: torch.dtype) -> Path:
    """The model's directory; with model.quantize one of the same model whose layers have the
    dequantized values, in `dtype`: to the bit the learner's.

    It is as large as the unquantized model. Made at the first call, one weight file at a time, it
    is kept in the cache; weight files of another size or date make another one.

    Raises:
        UserError: bitsandbytes is missing, or the files lack a layer's weight.
    """
    if quantize is None:
        return model_dir
    state = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in _weight_files(model_dir)]
    key = hashlib.sha256(repr((str(model_dir.resolve()), state)).encode()).hexdigest()[:12]
    name = f"{model_dir.name}-{quantize}-{str(dtype).removeprefix('torch.')}"
    write = partial(_write, model_dir, quantize, dtype)
    return made(ModelEntry(name, f"{model_dir}, dequantized", key, write), write)


def _weight_files(model_dir: Path) -> list[Path]:
    return sorted(model_dir.glob("*.safetensors"))


def _write(model_dir: Path, kind: str, dtype: torch.dtype, target: Path) -> None:
    config = AutoConfig.from_pretrained(model_dir)
    check_quantizable(config)
    layers = {f"{n}.weight": layer for n, layer in quantized_layers(build_on_meta(config))}
    for source in model_dir.iterdir():
        if source.is_file() and not source.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(source, target / source.name)
    for file in _weight_files(model_dir):
        tensors = load_file(file)
        for name in tensors.keys() & layers.keys():
            weight = tensors[name].to(dtype)
            tensors[name] = dequantized_weight(layers.pop(name), weight, kind)
        save_file(tensors, target / file.name, metadata={"format": "pt"})
    if layers:
        raise UserError(
            f"model {model_dir}: its files have no {min(layers)}, and vLLM's copy of a quantized "
            "base is made from them; set sampling.backend='torch', or remove model.quantize"
        )
