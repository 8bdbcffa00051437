"""A job's parameters and compute per token, counted exactly without reading any weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from rl_lora.config import LoraSection
from rl_lora.models.shapes import HEAD_NAMES
from rl_lora.nn.experts import ExpertCounts, expert_counts
from rl_lora.nn.lora import as_linear, target_names
from rl_lora.nn.variants import num_magnitudes, served_rank


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Numbers of parameters.

    Example, rank 256 on all layers of Llama-3.1-8B: ParameterCounts(base=8030261248,
    active=8030261248, adapter=671088640, lm_head_adapter=33882112, trainable=671088640,
    num_targets=224)
    """

    base: int  # a tied lm_head counts once
    active: int  # used per token: all, except in a mixture of experts
    adapter: int  # on the chosen layers, without lm_head
    lm_head_adapter: int  # added by an adapter on lm_head
    trainable: int  # given lora.mode and lora.lm_head
    num_targets: int  # matrices with an adapter, lm_head included if it has one
    fixed: int = 0  # trainable ones independent of the rank: DoRA's magnitudes

    @property
    def adapter_with_lm_head(self) -> int:
        """The article's count, which includes an adapter on lm_head."""
        return self.adapter + self.lm_head_adapter


@dataclass(frozen=True, slots=True)
class MatmulCounts:
    """Multiply-adds of the linear layers per token, forward and backward.

    Example, one 4096 x 4096 layer at rank 1: MatmulCounts(lora=33579008, full=50331648)
    """

    lora: int  # 2 N^2 + 6 N R for a square layer with an adapter, 2 N^2 for one without
    full: int  # 3 N^2

    @property
    def ratio(self) -> float:
        """LoRA / full; 2/3 at low rank ('LoRA Without Regret', section on compute)."""
        return self.lora / self.full


def parameter_counts(model: nn.Module, lora: LoraSection) -> ParameterCounts:
    """Counts for a base model on the meta device, or a loaded one.

    An adapter has rank x (d_in + d_out) parameters per layer, and d_out more with DoRA. In a
    mixture each expert's adapter has rank / active experts, so E experts, K of them active, have
    E / K times the parameters of a dense layer of an expert's size.

    Raises:
        UserError: the model has no layers of the chosen kind, or the rank is not a multiple of its
            active experts.
    """
    base = sum(parameter.numel() for parameter in model.parameters())
    experts = _expert_counts(model, lora)
    sizes = {
        name: lora.rank * (layer.in_features + layer.out_features)
        + num_magnitudes(lora.variant, layer.out_features)
        for name, layer in _targets(model, lora.model_copy(update={"lm_head": True}))
    }
    lm_head = sum(size for name, size in sizes.items() if _is_lm_head(name))
    adapter = sum(sizes.values()) - lm_head + experts.adapter
    return ParameterCounts(
        base=base,
        active=base - experts.weights + experts.active_weights,
        adapter=adapter,
        lm_head_adapter=lm_head,
        trainable=base if lora.mode == "full" else adapter + lm_head * lora.lm_head,
        num_targets=len(sizes)
        - (0 if lora.lm_head else sum(map(_is_lm_head, sizes)))
        + (experts.num_matrices if experts.adapter else 0),
        fixed=sum(
            num_magnitudes(lora.variant, own.out_features) for _, own in _targets(model, lora)
        ),
    )


def matmul_counts(model: nn.Module, lora: LoraSection) -> MatmulCounts:
    """Multiply-adds per token. Full fine-tuning takes the article's 3 N^2: forward, and backward
    twice.

    With LoRA the frozen W needs no gradient (2 N^2), and A and B take 3 R (d_in + d_out), with R
    twice the rank for PiSSA and OLoRA. DoRA's norms are computed per pass, not per token. In a
    mixture only the active experts count; its routers, E columns wide, are ignored.
    """
    adapted = {name for name, _ in _targets(model, lora)}
    experts = _expert_counts(model, lora)
    full_total = 3 * experts.active_weights
    lora_total = 2 * experts.active_weights + 3 * experts.active_adapter
    for name, module in model.named_modules():
        if (layer := as_linear(module)) is not None:
            weights = layer.in_features * layer.out_features
            full_total += 3 * weights
            lora_total += 2 * weights
            if name in adapted:
                lora_total += 3 * served_rank(lora) * (layer.in_features + layer.out_features)
    return MatmulCounts(lora=lora_total, full=full_total)


def _targets(model: nn.Module, lora: LoraSection) -> Iterator[tuple[str, nn.Linear]]:
    for name in target_names(model, lora):
        layer = as_linear(model.get_submodule(name))
        assert layer is not None
        yield name, layer


def _expert_counts(model: nn.Module, lora: LoraSection) -> ExpertCounts:
    """The experts' counts, with adapters if the settings give them any."""
    is_adapted = lora.mode == "lora" and lora.layers != "attention"
    return expert_counts(model, lora.rank if is_adapted else 0)


def _is_lm_head(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in HEAD_NAMES
