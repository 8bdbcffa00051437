"""Settings that only together make no sense, each told with the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rl_lora.errors import UserError, nearest

if TYPE_CHECKING:
    from rl_lora.config import EvalSection, LoraSection, OptimSection, SamplingSection

_MAX_SERVED_RANK = 512  # vLLM's
# The lowest temperature over 0 by back end. vLLM takes its own in place of a lower one, silently
# (0.32, sampling_params); logits over a far lower one are no float32 numbers any more.
MIN_TEMPERATURE = {"vllm": 0.01, "torch": 1e-6}
# sampling.backend -> "module:Class", the form in which a user's own class is given as well.
SAMPLERS = {
    "vllm": "rl_lora.samplers.vllm.sampler:VllmSampler",
    "torch": "rl_lora.samplers.torch_sampler:TorchSampler",
}


def check_backend(backend: str) -> str:
    """The name. Raises ValueError if it is neither a row of SAMPLERS nor "module:Class"."""
    module, _, name = backend.partition(":")
    if backend in SAMPLERS or (
        all(map(str.isidentifier, module.split("."))) and name.isidentifier()
    ):
        return backend
    raise ValueError(f"{nearest(backend, SAMPLERS)}, or your own as 'module:Class'")


def check_variant(lora: LoraSection, optim: OptimSection) -> None:
    """Raises ValueError for settings of adapters in full fine-tuning."""
    if lora.mode == "full" and lora.variant != "lora":
        raise ValueError(
            f"lora.variant={lora.variant!r} is an adapter's, and lora.mode='full' has none; "
            "leave one of them out"
        )
    if lora.mode == "full" and optim.lora_plus_ratio != 1:
        raise ValueError(
            f"optim.lora_plus_ratio={optim.lora_plus_ratio:g} is a rate of the adapter's B, and "
            "lora.mode='full' has none; leave one of them out"
        )


def check_full_dtype(lora: LoraSection, dtype: str) -> None:
    """Raises UserError for full fine-tuning in bfloat16, where 20 steps at a rate of 1e-5 move 2 %
    of the weights: the rest is rounded away. An adapter is in float32 whatever the base's dtype."""
    if lora.mode == "full" and dtype == "bfloat16":
        raise UserError(
            "lora.mode='full' trains the weights in the model's own dtype, here bfloat16, whose "
            "rounding swallows most steps; set model.dtype='float32'"
        )


def check_served(lora: LoraSection, sampling: SamplingSection) -> None:
    """Raises ValueError for adapters that the sampler does not serve, and overlap without vLLM."""
    if sampling.overlap and sampling.backend == "torch":
        raise ValueError(
            "sampling.overlap=true: the torch sampler computes with the weights that the learner "
            'changes meanwhile; set sampling.backend="vllm", or leave overlap out'
        )
    if sampling.backend != "vllm" or lora.mode == "full":
        return
    if lora.variant == "dora":
        raise ValueError(
            "lora.variant='dora': vLLM serves no DoRA adapters; set sampling.backend=\"torch\""
        )
    if lora.variant in ("pissa", "olora") and lora.rank > _MAX_SERVED_RANK // 2:
        raise ValueError(
            f"lora.variant={lora.variant!r} is served as an adapter of twice its rank, and vLLM "
            f"takes ranks up to {_MAX_SERVED_RANK}: lower lora.rank={lora.rank} to "
            f'{_MAX_SERVED_RANK // 2}, or set sampling.backend="torch"'
        )


def check_temperatures(sampling: SamplingSection, evaluation: EvalSection) -> None:
    """Raises ValueError for a temperature that the back end cannot sample at."""
    lowest = MIN_TEMPERATURE.get(sampling.backend, MIN_TEMPERATURE["torch"])
    other = ', or set sampling.backend="torch"' if sampling.backend == "vllm" else ""
    for section, value, greedy in (
        ("sampling", sampling.temperature, ""),
        ("eval", evaluation.temperature, "0 (greedy) or "),
    ):
        if 0 < value < lowest:
            raise ValueError(
                f"{section}.temperature={value:g} is lower than the {sampling.backend} sampler "
                f"takes: set {greedy}{lowest:g} or more{other}"
            )
