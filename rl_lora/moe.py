"""LoRA on the experts of a mixture, one adapter an expert, of rank total / active experts.

'LoRA Without Regret' (section on MoE): with `num_experts_per_tok` experts at work on a token, each
has an adapter of rank R / that number, so that a token meets R in all. transformers keeps the
experts of a layer in two tensors, gate_up_proj [E, 2 I, D] and down_proj [E, D, I]; the adapters
lie beside them, for gate, up and down apart, as PEFT and vLLM name them.

Not in `attach_lora` yet: the trainer still refuses `lora.layers` with experts (README, limits). The
router has no adapter. Letters: E experts, I expert width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from rl_lora.config import LoraSection
from rl_lora.errors import UserError
from rl_lora.sampler import mix_seed

PARTS = ("gate_proj", "up_proj", "down_proj")


def expert_rank(rank: int, num_active: int) -> int:
    """Rank of one expert's adapter.

    Raises:
        UserError: the rank is not a multiple of the number of active experts.
    """
    if rank % num_active:
        raise UserError(
            f"lora.rank={rank} is shared by {num_active} active experts; take a multiple of "
            f"{num_active}"
        )
    return rank // num_active


class LoraExperts(nn.Module):
    """A layer's experts with a trainable low-rank term beside each of their three matrices.

    lora_A[part] is [E, R, d_in] and lora_B[part] [E, d_out, R], float32. A starts uniform in
    +-1/sqrt(d_in), each expert's from a seed of its own; B at zero.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.is_on = True
        gate_up, down = base.gate_up_proj, base.down_proj
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        num_experts, width, hidden = gate_up.shape[0], gate_up.shape[1] // 2, gate_up.shape[2]
        sides = {"gate_proj": (hidden, width), "up_proj": (hidden, width)}
        sides["down_proj"] = (width, hidden)
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for part, (d_in, d_out) in sides.items():
            a_ERI = torch.stack(
                [_uniform(rank, d_in, mix_seed(seed, part, e)) for e in range(num_experts)]
            )
            self.lora_A[part] = nn.Parameter(a_ERI.to(down.device))
            zeros = torch.zeros(num_experts, d_out, rank, device=down.device)
            self.lora_B[part] = nn.Parameter(zeros)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.lora_B["down_proj"].shape[0])

    def forward(self, hidden_ND: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' experts: N tokens [N, D], their experts [N, K] and weights [N, K]."""
        out_ND = torch.zeros_like(hidden_ND)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # transformers marks tokens of other devices so
                continue
            token, place = torch.where(top_k_index == expert)
            one = self._expert(hidden_ND[token], int(expert))
            weighted = one * top_k_weights[token, place, None]
            out_ND.index_add_(0, token, weighted.to(out_ND.dtype))
        return out_ND

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        gate_up = functional.linear(x, self.base.gate_up_proj[expert])  # type: ignore[index]
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate + self._low_rank(x, "gate_proj", expert)
        up = up + self._low_rank(x, "up_proj", expert)
        inner = self.base.act_fn(gate) * up  # type: ignore[operator]
        out = functional.linear(inner, self.base.down_proj[expert])  # type: ignore[index]
        return out + self._low_rank(inner, "down_proj", expert)

    def _low_rank(self, x: Tensor, part: str, expert: int) -> Tensor | float:
        if not self.is_on:
            return 0.0
        a_RI, b_OR = self.lora_A[part][expert].to(x.dtype), self.lora_B[part][expert].to(x.dtype)
        return self.scaling * (x @ a_RI.T @ b_OR.T)


def _uniform(rank: int, d_in: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same A on any device
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that keep a layer's experts in two tensors, with their names."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if {"gate_up_proj", "down_proj"} <= own.keys() and own["down_proj"].dim() == 3:
            yield name, module


def attach_expert_lora(model: nn.Module, section: LoraSection, seed: int) -> list[str]:
    """Puts a LoraExperts over every layer's experts; returns their names. The base is frozen.

    Raises:
        UserError: the rank is no multiple of the active experts, or the experts are laid out in a
            way that is not known here (biases, transposed or interleaved tensors).
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    num_active = int(config.num_experts_per_tok)
    rank = expert_rank(section.rank, num_active)
    names = []
    for name, module in list(expert_modules(model)):
        own = dict(module.named_parameters(recurse=False))
        hidden = config.hidden_size
        if own.keys() != {"gate_up_proj", "down_proj"} or own["down_proj"].shape[1] != hidden:
            raise UserError(
                f"{type(model).__name__}: the experts of {name} are laid out in a way that has no "
                "adapter here; use lora.layers='attention'"
            )
        module.requires_grad_(False)
        layer = LoraExperts(module, rank, section.alpha, mix_seed(seed, "experts", name))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        names.append(name)
    return names


def expert_tensors(model: nn.Module) -> dict[str, Tensor]:
    """lora_A [R, d_in] and lora_B [d_out, R] of every expert under PEFT's names
    (`...mlp.experts.3.gate_proj.lora_A.weight`), which vLLM reads."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraExperts):
            continue
        for part in PARTS:
            for expert in range(module.num_experts):
                stem = f"base_model.model.{name}.{expert}.{part}"
                tensors[f"{stem}.lora_A.weight"] = module.lora_A[part][expert].detach()
                tensors[f"{stem}.lora_B.weight"] = module.lora_B[part][expert].detach()
    return tensors
