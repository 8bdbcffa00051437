"""The LoRA layer: y = W x + (alpha / rank) B (A x), W never written to.

A starts uniform in +-1/sqrt(d_in) (kaiming_uniform with a = sqrt 5, as PEFT's), B at zero
('LoRA Without Regret', set-up); other starts and scales are in `variants`. Names and shapes follow
PEFT, so that it loads saved adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rl_lora.config import LoraSection
from rl_lora.errors import UserError
from rl_lora.nn.context import CONTEXT
from rl_lora.nn.experts import ROUTERS, attach_expert_lora, check_experts, has_experts
from rl_lora.nn.lora_matmul import lora_product
from rl_lora.nn.lora_swiglu import join_swiglu
from rl_lora.nn.variants import Magnitude, initial_factors, is_shifted, scaling_of, shifted_factors
from rl_lora.seeds import mix_seed

BASE_PREFIX = ".base."  # a LoraLinear's inner layer, in parameter names
_ATTENTION_PARTS = ("attn", "attention")
_MLP_PARTS = ("mlp", "feed_forward", "ffn")


class LoraLinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank term.

    lora_A is [rank, d_in] and lora_B [d_out, rank], float32 whatever the base's dtype: the
    optimizer's steps are too small for bfloat16.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, seed: int, variant: str = "lora"
    ) -> None:
        super().__init__()
        self.base = base
        self.scaling = scaling_of(variant, alpha, rank)
        device = base.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same A on any device
        bound = 1 / math.sqrt(base.in_features)
        lora_A_RI = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(lora_A_RI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.is_shifted = is_shifted(variant)
        if self.is_shifted:  # PiSSA, OLoRA: the start, and its frozen copy that is subtracted
            start = initial_factors(variant, base.weight.detach(), rank, self.scaling)
            self.lora_A, self.lora_B = (nn.Parameter(tensor) for tensor in start)
            self.register_buffer("lora_A0", start[0].clone())
            self.register_buffer("lora_B0", start[1].clone())
        self.magnitude = Magnitude(base.weight) if variant == "dora" else None

    @property
    def weight(self) -> Tensor:
        """The base's weight, for code that reads a linear layer's dtype or shape."""
        return self.base.weight

    def factors(self) -> list[Tensor]:
        """[A, B] of the low-rank term, with gradient; twice the rank where a start is subtracted.

        Their product times the scaling is both computed and served.
        """
        if not self.is_shifted:
            return [self.lora_A, self.lora_B]
        return shifted_factors(*self.state().values())

    def state(self) -> dict[str, Tensor]:
        """The layer's tensors other than the base's, by PEFT's names; not copied."""
        tensors: dict[str, Tensor] = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        if self.is_shifted:
            tensors["lora_A0.weight"] = self.get_buffer("lora_A0")
            tensors["lora_B0.weight"] = self.get_buffer("lora_B0")
        if self.magnitude is not None:
            tensors["lora_magnitude_vector"] = self.magnitude.value
        return tensors

    def published(self) -> dict[str, Tensor]:
        """This layer's tensors in a saved adapter, by PEFT's names."""
        if not self.is_shifted:
            return self.state()
        return dict(zip(("lora_A.weight", "lora_B.weight"), self.factors(), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] to [..., d_out]."""
        if not CONTEXT.has_adapter:
            return self.base(x)
        weight, bias = self.base.weight, self.base.bias
        a_RI, b_OR = self.factors()
        if self.magnitude is None:
            return lora_product(x, weight, bias, a_RI, b_OR, self.scaling)
        out = lora_product(x, weight, None, a_RI, b_OR, self.scaling)
        return self.magnitude(out, weight, bias, self.lora_A, self.lora_B, self.scaling)


def target_names(model: nn.Module, section: LoraSection) -> list[str]:
    """Full names of the linear layers that get an adapter, in the model's order.

    A mixture's routers get none, and its experts are not linear layers (`experts`).

    Raises:
        UserError: the model has no such layers, or experts that adapters do not support.
    """
    is_mixture = has_experts(model)
    if is_mixture and section.layers != "attention" and section.mode == "lora":
        check_experts(model)
        if section.variant != "lora":
            raise UserError(
                f"lora.variant={section.variant!r}: the experts of {type(model).__name__} support "
                "plain LoRA only; set lora.variant='lora' or lora.layers='attention'"
            )
    names = []
    has_layers = False
    for name, module in model.named_modules():
        last = name.rsplit(".", 1)[-1]
        if not isinstance(module, nn.Linear | Conv1D) or (is_mixture and last in ROUTERS):
            continue
        if module is head_of(model):
            if section.lm_head:
                names.append(name)
        elif section.layers == "all" or section.layers == _kind(name):
            has_layers = True
            names.append(name)
    if not has_layers and not (is_mixture and section.layers != "attention"):
        what = "linear layer" if section.layers == "all" else "linear layer of that kind"
        fix = "lora.mode='full'" if section.layers == "all" else "lora.layers='all'"
        raise UserError(
            f"lora.layers={section.layers!r}: {type(model).__name__} has no {what}; set {fix}"
        )
    return names


def as_linear(layer: nn.Module) -> nn.Linear | None:
    """A linear layer itself; of GPT-2's Conv1D, whose weight is [d_in, d_out], a linear layer over
    a transposed view of it; None of any other layer."""
    if not isinstance(layer, Conv1D):
        return layer if isinstance(layer, nn.Linear) else None
    linear = nn.Linear(layer.nx, layer.nf, device="meta")
    linear.weight = nn.Parameter(layer.weight.T, requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear


def head_of(model: nn.Module) -> nn.Module | None:
    """lm_head, whatever the model calls it (GPT-NeoX: embed_out)."""
    find = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = find() if find is not None else getattr(model, "lm_head", None)
    return head


def attach_lora(model: nn.Module, section: LoraSection, seed: int) -> list[str]:
    """Freezes the model and replaces each target by a LoraLinear; returns the targets' names.

    Unless section.layers is "attention", a mixture's experts get a LoraExperts per layer.
    """
    model.requires_grad_(False)
    names = target_names(model, section)
    if section.layers != "attention" and has_experts(model):
        attach_expert_lora(model, section.rank, section.alpha, seed)
    for name in names:
        base = as_linear(model.get_submodule(name))
        assert base is not None
        parent, _, child = name.rpartition(".")
        own_seed = mix_seed(seed, "lora_A", name)
        layer = LoraLinear(base, section.rank, section.alpha, own_seed, section.variant)
        setattr(model.get_submodule(parent), child, layer)
    for parent in {name.rpartition(".")[0] for name in names}:
        join_swiglu(model.get_submodule(parent))
    return names


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """The adapter's layers with the names of the linear layers that they replace."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def _kind(name: str) -> str | None:
    """Attention or mlp, by the names of the modules around the layer."""
    parents = name.split(".")[:-1]
    for part in reversed(parents):
        if any(word in part for word in _ATTENTION_PARTS):
            return "attention"
        if any(word in part for word in _MLP_PARTS):
            return "mlp"
    return None
