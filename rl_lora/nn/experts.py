"""LoRA on a mixture's experts: one adapter per expert, of rank lora.rank / active experts.

'LoRA Without Regret' (section on MoE): if `num_experts_per_tok` experts are active for a token,
each has an adapter of rank R / that number, so that a token uses R in all. transformers keeps a
layer's experts in two tensors, gate_up_proj [E, 2 I, D] and down_proj [E, D, I]; there are separate
adapters for gate, up and down. On disk every expert has separate names, those of the model's files,
which PEFT and vLLM read (`EXPERT_NAMES`). The router has no adapter.

Letters: E experts, I expert width, N tokens, K active experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from rl_lora.config import LoraSection
from rl_lora.errors import UserError
from rl_lora.nn.context import CONTEXT
from rl_lora.nn.sharded import gathered
from rl_lora.seeds import mix_seed

PARTS = ("gate_proj", "up_proj", "down_proj")
ROUTERS = ("gate", "router", "shared_expert_gate")  # linear layers that select or weight experts
NUM_EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")  # in config.json
_ADVICE = "use lora.layers='attention'"
_PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How a model's files, and with them PEFT and vLLM, name its experts' matrices.

    Example, Mixtral: ExpertNames(parts=("w1", "w3", "w2"), block="block_sparse_moe")
    """

    parts: tuple[str, str, str] = PARTS  # gate, up, down
    block: str = "mlp"  # the name of the module `mlp` around router and experts

    def outside(self, name: str) -> str:
        """A module's or tensor's name in files; names outside the block are unchanged."""
        return name if self.block == "mlp" else name.replace(".mlp.", f".{self.block}.")


EXPERT_NAMES = {
    "mixtral": ExpertNames(("w1", "w3", "w2"), "block_sparse_moe"),
    "olmoe": ExpertNames(),
    "qwen2_moe": ExpertNames(),
    "qwen3_moe": ExpertNames(),
}


def expert_rank(rank: int, num_active: int) -> int:
    """Rank of one expert's adapter.

    Raises:
        UserError: the rank is not a multiple of the number of active experts.
    """
    if rank % num_active:
        raise UserError(
            f"lora.rank={rank} is divided among {num_active} active experts; set a multiple of "
            f"{num_active}"
        )
    return rank // num_active


def check_rank(config: PretrainedConfig, lora: LoraSection) -> None:
    """Checks lora.rank against the model's config, before its weights are read.

    Raises:
        UserError: experts are to get adapters, and the rank is not a multiple of the active ones
            or the model's experts are not supported.
    """
    if lora.mode == "full" or lora.layers == "attention" or not is_mixture(config):
        return
    expert_rank(lora.rank, num_active_experts(config))
    _check_kind(str(config.get_text_config().model_type))


def is_mixture(config: PretrainedConfig) -> bool:
    """Whether a model of this config has experts."""
    text = config.get_text_config()
    return any(getattr(text, key, None) for key in NUM_EXPERTS_KEYS)


def num_active_experts(config: PretrainedConfig) -> int:
    """Experts active for a token by the config; 1 for a model without experts."""
    return int(getattr(config.get_text_config(), "num_experts_per_tok", None) or 1)


class LoraExperts(nn.Module):
    """A layer's experts with a trainable low-rank term added to each of their three matrices.

    lora_A[part] is [E, R, d_in] and lora_B[part] [E, d_out, R], float32. A starts uniform in
    +-1/sqrt(d_in), from a different seed for each expert; B at zero.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.base = base
        self.scaling = alpha / rank
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        num_experts, sides = part_sides(base)
        gate_up = base.gate_up_proj
        assert isinstance(gate_up, Tensor)
        device = gate_up.device
        for part, (d_in, d_out) in sides.items():
            a_ERI = torch.stack(
                [_uniform(rank, d_in, mix_seed(seed, part, e)) for e in range(num_experts)]
            )
            self.lora_A[part] = nn.Parameter(a_ERI.to(device))
            zeros = torch.zeros(num_experts, d_out, rank, device=device)
            self.lora_B[part] = nn.Parameter(zeros)

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.lora_B["down_proj"].shape[0])

    def forward(self, hidden_ND: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' experts: N tokens [N, D], their experts [N, K] and weights [N, K]."""
        if not CONTEXT.has_adapter:
            out: Tensor = self.base(hidden_ND, top_k_index, top_k_weights)
            return out
        # One cast and one split per part: the gradient of E slices would be E whole tensors.
        low = {
            part: list(
                zip(
                    self.lora_A[part].to(hidden_ND.dtype).unbind(),
                    self.lora_B[part].to(hidden_ND.dtype).unbind(),
                    strict=True,
                )
            )
            for part in PARTS
        }
        out_ND = torch.zeros_like(hidden_ND)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # transformers' mark for tokens of other devices
                continue
            token, place = torch.where(top_k_index == expert)
            one = self._expert(
                hidden_ND[token], int(expert), {part: low[part][int(expert)] for part in PARTS}
            )
            weighted = one * top_k_weights[token, place, None]
            out_ND.index_add_(0, token, weighted.to(out_ND.dtype))
        return out_ND

    def _expert(self, x: Tensor, expert: int, low: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        gate, up = functional.linear(x, self.base.gate_up_proj[expert]).chunk(2, dim=-1)  # type: ignore[index]
        gate = gate + self._low_rank(x, *low["gate_proj"])
        up = up + self._low_rank(x, *low["up_proj"])
        inner = self.base.act_fn(gate) * up  # type: ignore[operator]
        out = functional.linear(inner, self.base.down_proj[expert])  # type: ignore[index]
        return out + self._low_rank(inner, *low["down_proj"])

    def _low_rank(self, x: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        return self.scaling * (x @ a_RI.T @ b_OR.T)


def part_sides(experts: nn.Module) -> tuple[int, dict[str, tuple[int, int]]]:
    """(E, (d_in, d_out) of each part) of a module that keeps its experts in two tensors."""
    gate_up = experts.gate_up_proj
    assert isinstance(gate_up, Tensor)
    num_experts, width, hidden = gate_up.shape[0], gate_up.shape[1] // 2, gate_up.shape[2]
    sides = {"gate_proj": (hidden, width), "up_proj": (hidden, width)}
    return num_experts, sides | {"down_proj": (width, hidden)}


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """Sizes of a mixture's experts, over all layers.

    Example, two layers of 4 experts, 2 active, 32 x 24, rank 4: ExpertCounts(num_matrices=24,
    weights=18432, active_weights=9216, adapter=2688, active_adapter=1344)
    """

    num_matrices: int = 0  # gate, up and down of each expert
    weights: int = 0
    active_weights: int = 0  # those that one token uses
    adapter: int = 0  # parameters of all experts' adapters
    active_adapter: int = 0  # those that one token uses: rank x (d_in + d_out) of three matrices


def expert_counts(model: nn.Module, rank: int) -> ExpertCounts:
    """Counts of a base model; rank is that of all active experts together.

    Raises:
        UserError: the rank is not a multiple of the active experts.
    """
    found = [part_sides(module) for _, module in expert_modules(model)]
    if not found:
        return ExpertCounts()
    num_active = num_active_experts(model.config)  # type: ignore[arg-type]
    one_rank = expert_rank(rank, num_active)
    one_weights = [sum(i * o for i, o in sides.values()) for _, sides in found]
    one_adapter = [one_rank * sum(i + o for i, o in sides.values()) for _, sides in found]
    num_experts = [count for count, _ in found]
    return ExpertCounts(
        num_matrices=sum(len(PARTS) * count for count in num_experts),
        weights=sum(n * w for n, w in zip(num_experts, one_weights, strict=True)),
        active_weights=num_active * sum(one_weights),
        adapter=sum(n * a for n, a in zip(num_experts, one_adapter, strict=True)),
        active_adapter=num_active * sum(one_adapter),
    )


def expert_size(layer: LoraExperts, part: str) -> Tensor:
    """About the output size of a part's base weights for a unit input: their std x sqrt(d_in)."""
    weight = layer.base.down_proj if part == "down_proj" else layer.base.gate_up_proj
    assert isinstance(weight, Tensor)
    return gathered(weight).float().std() * weight.shape[-1] ** 0.5


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that keep a layer's experts in tensors of three axes, with their names.

    Of a LoraExperts, the base module inside is yielded.
    """
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        is_adapter = isinstance(module, nn.ParameterDict)
        if not is_adapter and "down_proj" in own and own["down_proj"].dim() == 3:
            yield name, module


def check_experts(model: nn.Module) -> ExpertNames:
    """Names of the model's experts.

    Raises:
        UserError: adapters do not support how the model keeps its experts.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    names_outside = _check_kind(str(config.model_type))
    names = [name for name, _ in expert_modules(model)]
    covered = tuple(f"{name}." for name in names)
    for name, parameter in model.named_parameters():
        is_inside = name.startswith(covered) if covered else False
        if parameter.dim() == 3 and "expert" in name and not is_inside:
            raise UserError(f"{type(model).__name__} keeps experts in {name}; {_ADVICE}")
    for name, module in expert_modules(model):
        own = dict(module.named_parameters(recurse=False))
        if own.keys() != {"gate_up_proj", "down_proj"}:
            raise UserError(
                f"{type(model).__name__}: the experts of {name} are {sorted(own)}, not "
                f"gate_up_proj and down_proj; {_ADVICE}"
            )
    return names_outside


def _check_kind(kind: str) -> ExpertNames:
    if kind not in EXPERT_NAMES:
        known = ", ".join(sorted(EXPERT_NAMES))
        raise UserError(
            f"adapters on the experts of model type {kind!r} are not supported, those on {known} "
            f"are; {_ADVICE}"
        )
    return EXPERT_NAMES[kind]


def has_experts(model: nn.Module) -> bool:
    """Whether any parameters look like experts kept in one tensor."""
    return any(p.dim() == 3 and "expert" in n for n, p in model.named_parameters())


def attach_expert_lora(model: nn.Module, rank: int, alpha: float, seed: int) -> list[str]:
    """Puts a LoraExperts over every layer's experts; returns their names. The base is frozen.

    Args:
        model: a mixture of `EXPERT_NAMES`.
        rank: that of all active experts together.
        alpha: an expert's term is scaled by alpha over the expert's rank.
        seed: of A.

    Raises:
        UserError: the rank is not a multiple of the active experts, or adapters do not support how
            the model keeps its experts.
    """
    check_experts(model)
    one_rank = expert_rank(rank, num_active_experts(model.config))  # type: ignore[arg-type]
    names: list[str] = []
    for name, module in list(expert_modules(model)):
        module.requires_grad_(False)
        layer = LoraExperts(module, one_rank, alpha, mix_seed(seed, "experts", name))
        if not names:
            _check_formula(model, name, layer)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        names.append(name)
    return names


@torch.no_grad()
def _check_formula(model: nn.Module, name: str, layer: LoraExperts) -> None:
    """Raises UserError where the layer, with B at zero, does not compute what the base computes."""
    weight = layer.base.gate_up_proj
    assert isinstance(weight, Tensor)
    hidden, device = weight.shape[-1], weight.device
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(_PROBE_TOKENS, hidden, generator=generator).to(device, weight.dtype)
    index_NK = torch.arange(_PROBE_TOKENS, device=device).unsqueeze(-1) % layer.num_experts
    weights_NK = torch.ones_like(index_NK, dtype=weight.dtype)
    expected = layer.base(x_ND, index_NK, weights_NK).float()
    found = layer(x_ND, index_NK, weights_NK).float()
    tolerance = 1e-4 if weight.dtype == torch.float32 else 3e-2
    if not float((found - expected).norm()) <= tolerance * float(expected.norm()):
        raise UserError(
            f"{type(model).__name__}: the experts of {name} do not compute "
            f"down(act(gate) * up); {_ADVICE}"
        )


def expert_adapters(model: nn.Module) -> Iterator[tuple[str, LoraExperts]]:
    """The adapted experts with the names of the modules that they replace."""
    for name, module in model.named_modules():
        if isinstance(module, LoraExperts):
            yield name, module


def adapted_parts(model: nn.Module) -> tuple[str, ...]:
    """The names of gate, up and down of the adapted experts in files; () without any."""
    if not any(True for _ in expert_adapters(model)):
        return ()
    return _names_of(model).parts


def expert_tensors(model: nn.Module) -> dict[str, Tensor]:
    """lora_A [R, d_in] and lora_B [d_out, R] of every expert under PEFT's names
    (`...mlp.experts.3.gate_proj.lora_A.weight`), which vLLM reads too: views of the parameters."""
    tensors: dict[str, Tensor] = {}
    for name, module in expert_adapters(model):
        names = _names_of(model)
        for part, outside in zip(PARTS, names.parts, strict=True):
            for expert in range(module.num_experts):
                stem = f"base_model.model.{names.outside(name)}.{expert}.{outside}"
                tensors[f"{stem}.lora_A.weight"] = module.lora_A[part][expert].detach()
                tensors[f"{stem}.lora_B.weight"] = module.lora_B[part][expert].detach()
    return tensors


def split_experts(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's weights under the names of the model's files: views, one matrix per expert.

    The names of a model without experts, or with experts not in `EXPERT_NAMES`, are unchanged.
    """
    kind = model.config.get_text_config().model_type  # type: ignore[operator, union-attr]
    fused = {f"{name}." for name, _ in expert_modules(model)}
    if kind not in EXPERT_NAMES or not fused:
        return tensors
    names = EXPERT_NAMES[kind]
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner, _, last = name.rpartition(".")
        if f"{owner}." not in fused:
            out[names.outside(name)] = tensor
            continue
        gate, up, down = names.parts
        for expert in range(tensor.shape[0]):
            stem = f"{names.outside(owner)}.{expert}"
            if last == "down_proj":
                out[f"{stem}.{down}.weight"] = tensor[expert]
                continue
            half = tensor.shape[1] // 2
            out[f"{stem}.{gate}.weight"] = tensor[expert, :half]
            out[f"{stem}.{up}.weight"] = tensor[expert, half:]
    return out


def _names_of(model: nn.Module) -> ExpertNames:
    return EXPERT_NAMES[model.config.get_text_config().model_type]  # type: ignore[operator, union-attr]


def _uniform(rank: int, d_in: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same A on any device
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound, generator=generator)
