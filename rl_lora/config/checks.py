"""Checks of settings that contradict each other; every message names a fix that works."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rl_lora.errors import nearest

if TYPE_CHECKING:
    from rl_lora.config import (
        AlgorithmSection,
        EnvironmentSection,
        EvalSection,
        LoraSection,
        ModelSection,
        OptimSection,
        ResourcesSection,
        RewardSection,
        RunSection,
        SamplingSection,
    )

_MAX_SERVED_RANK = 512  # vLLM's
# Lowest temperature above 0, by back end. vLLM silently raises a lower one to its minimum (0.32,
# sampling_params); far lower ones overflow float32 logits.
MIN_TEMPERATURE = {"vllm": 0.01, "torch": 1e-6}
# sampling.backend -> "module:Class", the form in which a user's own class is given as well.
SAMPLERS = {
    "vllm": "rl_lora.samplers.vllm.sampler:VllmSampler",
    "torch": "rl_lora.samplers.torch_sampler:TorchSampler",
}
# environment.name -> likewise.
ENVIRONMENTS = {
    "calculator": "rl_lora.environments.calculator:Calculator",
    "retry": "rl_lora.environments.retry:Retry",
}


def check_backend(backend: str) -> str:
    """The name. Raises ValueError if it is neither a row of SAMPLERS nor "module:Class"."""
    return _known_or_own(backend, SAMPLERS)


def _known_or_own(given: str, table: Mapping[str, str]) -> str:
    module, _, name = given.partition(":")
    if given in table or (all(map(str.isidentifier, module.split("."))) and name.isidentifier()):
        return given
    raise ValueError(f"{nearest(given, table)}, or your own as 'module:Class'")


def check_environment_name(name: str | None) -> str | None:
    """The name. Raises ValueError if it is neither a row of ENVIRONMENTS nor "module:Class"."""
    return None if name is None else _known_or_own(name, ENVIRONMENTS)


def check_environment(
    environment: EnvironmentSection, resources: ResourcesSection, max_staleness: int
) -> None:
    """Raises ValueError for settings without an environment, or turns of one sample that samplers
    elsewhere would take with different adapter versions."""
    if environment.name is None:
        if environment != type(environment)():
            raise ValueError(
                "[environment] has no effect without environment.name; set it to calculator, retry "
                "or your own module:Class, or remove the section"
            )
    elif resources.is_remote and max_staleness:
        raise ValueError(
            f"environment.name={environment.name!r}: all turns of a sample must come from one "
            f"adapter version, and samplers elsewhere switch in between with "
            f"sampling.max_staleness={max_staleness}; set it to 0"
        )


def check_kl(algorithm: AlgorithmSection) -> None:
    """Raises ValueError for a KL without weight, or an estimator without use or of no gradient."""
    kl, estimator = algorithm.kl, algorithm.kl_estimator
    if kl != "none" and algorithm.kl_weight == 0:
        raise ValueError(
            f"algorithm.kl={kl!r} has no effect with kl_weight=0; set algorithm.kl_weight or "
            "algorithm.kl='none'"
        )
    if kl == "none" and estimator is not None:
        raise ValueError(
            f"algorithm.kl_estimator={estimator!r} has no effect with algorithm.kl='none'; set "
            "algorithm.kl and algorithm.kl_weight, or remove it"
        )
    if kl == "loss" and estimator == "k1":
        raise ValueError(
            "algorithm.kl_estimator='k1' in the loss has a gradient whose mean is zero; set "
            "algorithm.kl_estimator='k2', or algorithm.kl='reward', which uses k1"
        )
    if kl == "reward" and estimator in ("k2", "k3"):
        raise ValueError(
            f"algorithm.kl_estimator={estimator!r} in the reward does not give the gradient of the "
            "KL, and k1 does; remove algorithm.kl_estimator, or set algorithm.kl='loss'"
        )


def check_entropy(algorithm: AlgorithmSection) -> None:
    """Raises ValueError for a floor of an entropy that nothing raises."""
    if algorithm.entropy_floor is not None and algorithm.entropy_weight == 0:
        raise ValueError(
            f"algorithm.entropy_floor={algorithm.entropy_floor:g} has no effect with "
            "entropy_weight=0; set algorithm.entropy_weight, or remove it"
        )


def check_penalties(
    algorithm: AlgorithmSection, reward: RewardSection, sampling: SamplingSection
) -> None:
    """Raises ValueError for a penalty of all lengths, or one that makes MaxRL's rewards
    negative."""
    if reward.overlong_tokens > sampling.max_tokens:
        raise ValueError(
            f"reward.overlong_tokens={reward.overlong_tokens} is more than sampling.max_tokens="
            f"{sampling.max_tokens}, and every completion would be penalized; lower it"
        )
    name = "algorithm.kl='reward'" if algorithm.kl == "reward" else "reward.overlong_tokens"
    if algorithm.advantage == "maxrl" and (algorithm.kl == "reward" or reward.overlong_tokens):
        raise ValueError(
            f"algorithm.advantage='maxrl' is defined for rewards that are not negative, and {name} "
            "makes them negative; remove it, or set algorithm.advantage='grpo'"
        )


def check_pushes(run: RunSection, lora: LoraSection) -> None:
    """Raises ValueError for pushes of a run that has no adapters."""
    if run.push_to is not None and lora.mode == "full":
        raise ValueError(
            f"run.push_to={run.push_to!r} pushes adapters, and lora.mode='full' has none; remove it"
        )


def check_gdpo(algorithm: AlgorithmSection, reward: RewardSection) -> None:
    """Raises ValueError for GDPO of one reward, or with one that its weight cannot scale."""
    if algorithm.advantage != "gdpo":
        return
    if max(1, len(reward.terms)) + bool(reward.overlong_tokens) < 2:
        raise ValueError(
            "algorithm.advantage='gdpo' normalizes several rewards one by one, and there is only "
            "one; list them in reward.terms, or set algorithm.advantage='grpo'"
        )
    if algorithm.kl == "reward":
        raise ValueError(
            "algorithm.advantage='gdpo' normalizes each reward within its group, and "
            "algorithm.kl='reward' would lose its scale; set algorithm.kl='loss'"
        )


def check_variant(lora: LoraSection, optim: OptimSection) -> None:
    """Raises ValueError for adapter settings with full fine-tuning."""
    if lora.mode == "full" and lora.variant != "lora":
        raise ValueError(
            f"lora.variant={lora.variant!r} needs an adapter, and lora.mode='full' has none; "
            "remove one of them"
        )
    if lora.mode == "full" and optim.lora_plus_ratio != 1:
        raise ValueError(
            f"optim.lora_plus_ratio={optim.lora_plus_ratio:g} sets the learning rate of the "
            "adapter's B, and lora.mode='full' has no adapter; remove one of them"
        )


def check_quantize(model: ModelSection, lora: LoraSection) -> None:
    """Raises ValueError for a quantized base that is trained, sharded or compiled."""
    if model.quantize is None:
        return
    setting = f"model.quantize={model.quantize!r}"
    if lora.mode == "full":
        raise ValueError(
            f"{setting} is of a frozen base, and lora.mode='full' trains all weights; set "
            "lora.mode='lora', or remove model.quantize"
        )
    if model.shard:
        raise ValueError(
            f"{setting}: quantized weights are not divided among processes; set model.shard=false, "
            "or remove model.quantize"
        )
    if model.compile:
        raise ValueError(
            f"{setting}: compiled layers do not take quantized weights; set model.compile=false, "
            "or remove model.quantize"
        )


def check_resources(
    resources: ResourcesSection, lora: LoraSection, sampling: SamplingSection
) -> None:
    """Raises ValueError for samplers in two places, or servers that cannot serve the policy."""
    if resources.gpus_per_sampler is not None and not resources.uses_ray:
        raise ValueError(
            f"resources.gpus_per_sampler={resources.gpus_per_sampler} is of samplers in Ray, and "
            "this job has none; set resources.samplers to 2 or more, or resources.ray_address, or "
            "remove it"
        )
    if not resources.servers:
        if resources.servers_folder is not None:
            raise ValueError(
                "resources.servers_folder is where resources.servers read adapters, and there are "
                "none; remove it"
            )
        return
    if resources.uses_ray:
        given = "samplers" if resources.samplers > 1 else "ray_address"
        raise ValueError(
            f"resources.servers: the samplers run either on these servers or in Ray "
            f"(resources.{given}={getattr(resources, given)!r}); remove one of the two"
        )
    for url in resources.servers:
        _check_server_address(url)
    if len(set(resources.servers)) < len(resources.servers):
        raise ValueError("resources.servers has an address twice; each is one engine: remove one")
    if sampling.backend != "vllm":
        raise ValueError(
            f"resources.servers are vLLM's, and sampling.backend={sampling.backend!r}; set "
            'sampling.backend="vllm", or remove resources.servers'
        )
    if lora.mode == "full":
        raise ValueError(
            "resources.servers take adapters, and lora.mode='full' trains the whole model; set "
            "lora.mode='lora', or resources.samplers instead of resources.servers"
        )
    if lora.lm_head:
        raise ValueError(
            "lora.lm_head=true with resources.servers: vLLM's servers on CPUs add the output "
            "layer's adapter to the base model as well, and on GPUs leave it out of the log-probs "
            "of given tokens (vllm#51594); set lora.lm_head=false"
        )
    for name in ("eager", "attention_backend", "merge_adapter", "memory_fraction"):
        if getattr(sampling, name) is not None:
            raise ValueError(
                f"sampling.{name} has no effect on resources.servers, which have their own flags; "
                "remove it"
            )


def _check_server_address(url: str) -> None:
    """Raises ValueError for one that is not http(s)://HOST[:PORT][/PATH]. A password is not shown:
    addresses are in records and messages."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
        is_address = is_address and parts.port != 0 and not (parts.query or parts.fragment)
        is_address = is_address and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # a port that is no number, or brackets of IPv6 that do not close
        is_address = False
    if "@" in url:
        raise ValueError(
            "resources.servers: an address with a user or password would be in the run's records; "
            "leave them out, and set the environment variable VLLM_API_KEY to the server's key"
        )
    if not is_address:
        raise ValueError(f"resources.servers: {url!r} is not an address; write http://HOST:PORT")


def check_served(lora: LoraSection, sampling: SamplingSection, resources: ResourcesSection) -> None:
    """Raises ValueError for adapters that the sampler cannot serve, or staleness without vLLM."""
    in_turns = _in_turns(sampling)
    if sampling.max_staleness and sampling.backend == "torch" and not resources.is_remote:
        # vLLM serves no DoRA adapters.
        other = "" if lora.variant == "dora" else ', or sampling.backend="vllm"'
        raise ValueError(
            f"sampling.max_staleness={sampling.max_staleness}: the torch sampler uses the weights "
            f"that the learner is updating at the same time; set sampling.max_staleness=0{other}, "
            "or give it weights elsewhere by resources.samplers=2"
        )
    if sampling.backend != "vllm" or lora.mode == "full":
        return
    if lora.variant == "dora":
        raise ValueError(
            "lora.variant='dora': vLLM serves no DoRA adapters; set sampling.backend=\"torch\""
            + in_turns
        )
    if lora.variant in ("pissa", "olora") and lora.rank > _MAX_SERVED_RANK // 2:
        raise ValueError(
            f"lora.variant={lora.variant!r} is served as an adapter of twice its rank, and vLLM "
            f"takes ranks up to {_MAX_SERVED_RANK}: lower lora.rank={lora.rank} to "
            f'{_MAX_SERVED_RANK // 2}, or set sampling.backend="torch"{in_turns}'
        )


def check_temperatures(sampling: SamplingSection, evaluation: EvalSection) -> None:
    """Raises ValueError for a temperature that the back end cannot sample at."""
    lowest = MIN_TEMPERATURE.get(sampling.backend, MIN_TEMPERATURE["torch"])
    for section, value, greedy in (
        ("sampling", sampling.temperature, ""),
        ("eval", evaluation.temperature, "0 (greedy) or "),
    ):
        if 0 < value < lowest:
            is_torch_able = sampling.backend == "vllm" and value >= MIN_TEMPERATURE["torch"]
            torch = f', or set sampling.backend="torch"{_in_turns(sampling)}'
            other = torch if is_torch_able else ""
            raise ValueError(
                f"{section}.temperature={value:g} is below the minimum of the {sampling.backend} "
                f"sampler; set {greedy}{lowest:g} or more{other}"
            )


def _in_turns(sampling: SamplingSection) -> str:
    """What the torch sampler also needs, as the end of a sentence."""
    return " and sampling.max_staleness=0" if sampling.max_staleness else ""


def unbounded_staleness(algorithm: AlgorithmSection, sampling: SamplingSection) -> str | None:
    """A warning where samples may be several versions old and nothing bounds their ratios."""
    is_bounded = algorithm.loss != "importance_sampling" or algorithm.mask != "none"
    if sampling.max_staleness < 2 or is_bounded:
        return None
    return (
        f"sampling.max_staleness={sampling.max_staleness}: algorithm.loss='importance_sampling' "
        "does not bound the ratios of old samples; 'truncated_importance_sampling' and 'cispo' do "
        "(algorithm.ratio_cap), or algorithm.mask='token' leaves out tokens that are far off"
    )
