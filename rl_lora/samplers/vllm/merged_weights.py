"""Adds the adapter to the engine's own copy of the weights, in float32.

For each adapter version they are made again from the model's files, as W + scaling * B A: nothing
drifts, neither the files nor the learner's weights are touched, and decoding is as fast as without
an adapter. In a narrower dtype the sum would round the adapter away (an update is often below
bfloat16's step), so that vLLM's LoRA layers are used; on a GPU those take no float32.

On a CPU vLLM computes with packed copies of the weights. They can be freed while the learner works
(`unload`); making them takes half a percent of a step (LOG.md). On a GPU it computes with the plain
weights, which are written in place: CUDA graphs read them by their addresses.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rl_lora.adapters.files import fingerprint, load_tensors
from rl_lora.adapters.peft_files import LowRank, lora_settings, low_rank_terms
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.types import Adapter


def read_terms(adapter: Adapter) -> dict[str, LowRank]:
    """An adapter's terms, from its directory.

    Raises:
        UserError: it cannot be read, or is not a LoRA or rsLoRA of linear layers.
        StaleAdapterError: the directory's weights are not those of the handle.
    """
    settings = lora_settings(adapter.path)
    if settings["variant"] == "dora":
        raise UserError(f"{adapter.path}: a DoRA adapter is not served; set sampling.backend=torch")
    tensors = load_tensors(adapter.path)
    if fingerprint(tensors) != adapter.fingerprint:
        raise StaleAdapterError(
            f"{adapter.path} was changed after {adapter.name} was published (tensors)"
        )
    return {
        layer: LowRank(term.a_RI.float(), term.b_OR.float(), term.scaling)
        for layer, term in low_rank_terms(tensors, adapter.path).items()
    }


class MergedWeights:
    """The linear layers of an engine's model, made again from the model's files.

    Letters: O outputs, I inputs of one layer in the files; the engine joins q, k and v, or gate and
    up, in one layer.
    """

    def __init__(self, model: nn.Module, model_dir: Path) -> None:
        """Finds each linear layer's weights in the model's files.

        Raises:
            LookupError: a layer whose weights are unknown; the engine is unchanged.
        """
        self._files = _files_by_tensor(model_dir)
        self._layers = [
            self._layer(module, name, _joined(model, name, self._files))
            for name, module in _linear_layers(model)
        ]
        if not self._layers:
            raise LookupError("no linear layer")
        self._weight_of = {part.layer: part.weight for one in self._layers for part in one.parts}
        self._wanted: dict[str, LowRank] = {}
        self._is_loaded = True  # the base, as vLLM loaded it

    def _layer(self, module: Any, name: str, layers: list[str]) -> _Layer:
        parts = [_Part(layer, _weight(layer, self._files)) for layer in layers]
        is_packed = hasattr(module, "cpu_linear")
        if not is_packed:
            shapes = [self._files[part.weight][1] for part in parts]
            wanted = (sum(shape[0] for shape in shapes), shapes[0][1])
            if tuple(module.weight.shape) != wanted:
                found = tuple(module.weight.shape)
                raise LookupError(f"{name} has weights of {found}, and the files of {wanted}")
        return _Layer(module, parts, is_packed)

    def set_target(self, terms: dict[str, LowRank]) -> None:
        """Sets what the next `load` loads.

        Raises:
            UserError: a term for a layer that the model lacks, or of another size.
        """
        self._check(terms)
        self._is_loaded = self._is_loaded and not terms and not self._wanted
        self._wanted = terms

    def load(self) -> bool:
        """Loads the base plus the target's terms unless that is done; returns whether it did."""
        if self._is_loaded:
            return False
        self._load(self._wanted)
        return True

    def _check(self, terms: dict[str, LowRank]) -> None:
        for name, term in terms.items():
            if name not in self._weight_of:
                raise UserError(f"the adapter has a layer {name!r}, which the model lacks")
            shape = self._files[self._weight_of[name]][1]
            found = [term.b_OR.shape[0], term.a_RI.shape[1]]
            if found != shape:
                raise UserError(f"the adapter of {name!r} is for {found} weights, not {shape}")

    def _load(self, terms: dict[str, LowRank]) -> None:
        self._is_loaded = False
        for module, parts, is_packed in self._layers:
            if is_packed:
                weights_OI = [self._merged(part, terms.get(part.layer)) for part in parts]
                _pack(module, weights_OI[0] if len(weights_OI) == 1 else torch.cat(weights_OI))
            else:
                sizes = [self._files[part.weight][1][0] for part in parts]
                for part, rows_OI in zip(parts, module.weight.data.split(sizes), strict=True):
                    self._write(rows_OI, part, terms.get(part.layer))
        for device in {one.module.weight.device for one in self._layers if not one.is_packed}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the engine may compute on another stream
        self._is_loaded = True

    def _merged(self, part: _Part, term: LowRank | None) -> Tensor:
        # Opened each time: what was read stays resident until the file is closed.
        with safe_open(self._files[part.weight][0], framework="pt") as opened:
            weight_OI = opened.get_tensor(part.weight).float()
            if term is None:
                return weight_OI.clone()
            return torch.addmm(weight_OI, term.b_OR, term.a_RI, alpha=term.scaling)

    @torch.inference_mode()
    def _write(self, rows_OI: Tensor, part: _Part, term: LowRank | None) -> None:
        with safe_open(self._files[part.weight][0], framework="pt") as opened:
            rows_OI.copy_(opened.get_tensor(part.weight))
        if term is not None:
            # In float64, for which there is no TF32, and which is rounded once, after the sum.
            b_OR, a_RI = (factor.to(rows_OI.device).double() for factor in (term.b_OR, term.a_RI))
            rows_OI.add_(b_OR @ a_RI, alpha=term.scaling)

    def unload(self) -> None:
        """Frees packed weights; the engine cannot run before the next `load`."""
        self._is_loaded = False
        for module, _, is_packed in self._layers:
            if is_packed:
                module.cpu_linear = _refuse


class _Part(NamedTuple):
    """A layer of the files within a layer of the engine: its name, and its weight's."""

    layer: str
    weight: str


class _Layer(NamedTuple):
    """A layer of the engine, and whether it computes with a packed copy of its weights."""

    module: Any
    parts: list[_Part]
    is_packed: bool


def _joined(model: nn.Module, name: str, files: Container[str]) -> list[str]:
    """Names in the files of the layers that the engine's layer joins.

    The files may already have them joined (GLM 4), which the engine's mapping does not say.
    """
    if f"{name}.weight" in files:
        return [name]
    owner, _, last = name.rpartition(".")
    joined: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    return [f"{owner}.{part}".lstrip(".") for part in joined.get(last, [last])]


def _linear_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """The engine's linear layers; lm_head only where its weights are packed: else they may be the
    embedding's."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LinearBase):
            assert isinstance(module, nn.Module)
            if not isinstance(module.quant_method, UnquantizedLinearMethod):
                raise LookupError(f"{name} is quantized")
            if hasattr(module, "cpu_linear") and getattr(module, "weight", torch.empty(0)).numel():
                raise LookupError(f"{name} computes with its plain weight")
            found.append((name, module))
        elif isinstance(module, ParallelLMHead) and name.endswith("lm_head"):
            if hasattr(module, "cpu_linear"):
                found.append((name, module))
    return found


def _pack(module: Any, weight_OI: Tensor) -> None:
    """vLLM's own packing; the plain weight is dropped. A tied lm_head keeps the embedding's."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    kept = module.weight
    module.weight = nn.Parameter(_padded(module, weight_OI), requires_grad=False)
    dispatch_cpu_unquantized_gemm(module, remove_weight=False)
    module.weight = kept


def _padded(module: Any, weight_OI: Tensor) -> Tensor:
    """With rows of zeros up to the engine's vocabulary, if the layer has one."""
    missing = getattr(module, "num_embeddings_padded", weight_OI.shape[0]) - weight_OI.shape[0]
    return nn.functional.pad(weight_OI, (0, 0, 0, missing)) if missing else weight_OI


def _weight(layer: str, files: dict[str, tuple[Path, list[int]]]) -> str:
    """Name of a layer's weight in the files; for a tied lm_head, the embedding's.

    Raises:
        LookupError: the files have no such weight.
    """
    tied = [name for name in files if name.endswith("embed_tokens.weight")]
    for name in (f"{layer}.weight", *(tied if layer == "lm_head" else ())):
        if name in files:
            return name
    raise LookupError(f"the model's files have no weight of {layer}")


def _files_by_tensor(model_dir: Path) -> dict[str, tuple[Path, list[int]]]:
    """Tensor name -> (the safetensors file that has it, its shape)."""
    found = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a dict
                found[name] = path, opened.get_slice(name).get_shape()
    return found


def _refuse(*arguments: Any) -> Tensor:
    raise RuntimeError("the engine's weights were dropped and not loaded again")
