"""The LoRA layer: y = W x + (alpha / rank) B (A x), W never written to.

A starts uniform in +-1/sqrt(d_in) (kaiming_uniform with a = sqrt 5, as PEFT's), B at zero
('LoRA Without Regret', set-up). Names and shapes follow PEFT, so that saved adapters load there.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rl_lora.config import LoraSection
from rl_lora.errors import UserError
from rl_lora.lora_products import lora_products
from rl_lora.sampler import mix_seed

_ATTENTION_PARTS = ("attn", "attention")
_SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_MLP_PARTS = ("mlp", "feed_forward", "ffn")


_state = threading.local()  # learner threads work at once; siblings' waiting outputs, adapters off


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank term beside it.

    lora_A is [rank, d_in] and lora_B [d_out, rank], float32 whatever the base's dtype: the
    optimizer's steps are too small for bfloat16. Siblings (q, k and v; gate and up) are computed
    together by the first that is called, and the others hand out what waits for them.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        device = base.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same A on any device
        bound = 1 / math.sqrt(base.in_features)
        lora_A_RI = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A_RI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.siblings: tuple[LoraLinear, ...] = (self,)  # layers that see the same input, this too

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that looks at a linear layer's dtype or shape."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        if getattr(_state, "is_off", False):
            return self.base(x)
        waiting: dict[LoraLinear, tuple[Tensor, Tensor]] = _state.__dict__.setdefault("waiting", {})
        known_x, known_out = waiting.pop(self, (None, None))
        if known_x is x and known_out is not None:
            return known_out
        outputs = dict(zip(self.siblings, lora_products(x, self.siblings), strict=True))
        own = outputs.pop(self)
        waiting.update({layer: (x, out) for layer, out in outputs.items()})
        return own


def target_names(model: nn.Module, section: LoraSection) -> list[str]:
    """Full names of the linear layers that get an adapter, in the model's order.

    Raises:
        UserError: the model has no such layers, or keeps expert weights outside linear layers.
    """
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.rsplit(".", 1)[-1] == "lm_head":
            if section.lm_head:
                names.append(name)
        elif section.layers == "all" or section.layers == _kind(name):
            names.append(name)
    if not any(not name.endswith("lm_head") for name in names):
        raise UserError(
            f"lora.layers={section.layers!r}: {type(model).__name__} has no linear layer of that "
            "kind; use lora.layers='all'"
        )
    experts = [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]
    if experts and section.layers != "attention":
        raise UserError(
            f"{type(model).__name__} keeps its experts in one tensor ({experts[0]}), which has no "
            "adapter here yet; use lora.layers='attention'"
        )
    return names


def attach_lora(model: nn.Module, section: LoraSection, seed: int) -> list[str]:
    """Freezes the model and puts a LoraLinear over each target; returns the targets' names."""
    model.requires_grad_(False)
    names = target_names(model, section)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        parent, _, child = name.rpartition(".")
        layer = LoraLinear(base, section.rank, section.alpha, mix_seed(seed, "lora_A", name))
        setattr(model.get_submodule(parent), child, layer)
    for parent in {name.rpartition(".")[0] for name in names}:
        _join_siblings(model.get_submodule(parent))
    return names


def _join_siblings(parent: nn.Module) -> None:
    """Layers that the model calls one after another on the same input are computed together."""
    for group in _SHARED_INPUTS:
        layers = [getattr(parent, name, None) for name in group]
        joined = tuple(layer for layer in layers if isinstance(layer, LoraLinear))
        for layer in joined:
            layer.siblings = joined


@contextlib.contextmanager
def adapters_off() -> Iterator[None]:
    """The base alone, for what this thread computes."""
    before = getattr(_state, "is_off", False)
    _state.is_off = True
    try:
        yield
    finally:
        _state.is_off = before


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapter's layers with the names of the linear layers they stand for."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def _kind(name: str) -> str | None:
    """Attention or mlp, by the names of the modules that the layer lies in."""
    parents = name.split(".")[:-1]
    for part in reversed(parents):
        if any(word in part for word in _ATTENTION_PARTS):
            return "attention"
        if any(word in part for word in _MLP_PARTS):
            return "mlp"
    return None
