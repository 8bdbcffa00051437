"""Makes a vLLM engine, and does to one what vLLM has no call for."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pydantic import ValidationError

from rl_lora import distributed
from rl_lora.adapters.files import check_published
from rl_lora.config import LoraSection
from rl_lora.errors import EngineError, StaleAdapterError, UserError
from rl_lora.samplers import cpu_memory
from rl_lora.samplers.vllm.kept_classes import classes_kept
from rl_lora.samplers.vllm.merged_weights import MergedWeights
from rl_lora.samplers.vllm.own_group import keep_job_groups, own_group
from rl_lora.samplers.vllm.process import keep_compiled_apart, keep_float32_exact, process_kept
from rl_lora.samplers.vllm.settings import text_config
from rl_lora.types import Adapter, Completion

_NO_LORA_TYPES = ("gpt2",)  # model types whose class in vLLM (0.32) has no LoRA layers


def check_device(device: torch.device, lora: LoraSection, model_dir: Path) -> None:
    """Raises UserError for a device or an adapter that vLLM does not serve correctly."""
    model_type = text_config(model_dir).model_type
    if lora.mode == "lora" and model_type in _NO_LORA_TYPES:
        raise UserError(
            f"model {model_dir}: vLLM serves no adapters on {model_type}; set "
            'sampling.backend="torch"'
        )
    if device.index and distributed.world_size() == 1:
        raise UserError(
            f"model.device={str(device)!r}: vLLM takes the first visible GPU; set "
            f"CUDA_VISIBLE_DEVICES={device.index} and model.device='cuda'"
        )
    if lora.mode == "lora" and lora.lm_head and device.type != "cpu":
        raise UserError(
            "lora.lm_head=true: vLLM on GPUs leaves lm_head's adapter out of the log-probs of "
            "given tokens (vllm#51594), which the check for a live adapter needs; set "
            "lora.lm_head=false or sampling.backend=torch"
        )


def make_engine(vllm: SimpleNamespace, settings: dict[str, Any], on_cpu: bool) -> Any:
    """A vllm.LLMEngine. Raises UserError if vLLM refuses the model or a setting."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_kept())
        keep_job_groups()
        stack.enter_context(own_group("gloo" if on_cpu else "nccl"))
        settle_classes = stack.enter_context(classes_kept())
        if on_cpu:
            from rl_lora.samplers.vllm import cpu_lora as vllm_cpu_lora
            from rl_lora.samplers.vllm import cpu_norm as vllm_cpu_norm

            stack.enter_context(vllm_cpu_lora.installed())
            if settings["enforce_eager"] and (priorities := vllm_cpu_norm.priorities()):
                settings = settings | {"ir_op_priority": priorities}
        else:
            keep_compiled_apart(distributed.rank())
            if settings.get("dtype") == "float32":
                keep_float32_exact()
        try:
            engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**settings))
            settle_classes(engine)
            if on_cpu:
                from rl_lora.samplers.vllm import cpu_sampling as vllm_cpu_sampler

                engine.collective_rpc(vllm_cpu_sampler.install)
            return engine
        except ModuleNotFoundError as error:
            raise UserError(
                f"vLLM's installation lacks {error.name}: install vLLM with all that it needs "
                "(rl_lora[gpu] or rl_lora[cpu]), or set sampling.backend=torch"
            ) from error
        except ValueError as error:
            reason, fix = one_line(error), "sampling.backend=torch serves any of transformers"
            if "Free memory" in reason:  # other processes use the GPU
                fix = "end what else runs on the GPU, or lower sampling.memory_fraction"
            elif "cache" in reason:  # it does not hold one sequence
                fix = (
                    "lower sampling.max_tokens or data.max_prompt_tokens, or raise "
                    "sampling.memory_fraction (GPU)"
                )
            raise UserError(f"vLLM does not serve {settings['model']}: {reason}; {fix}") from error


@contextlib.contextmanager
def engine_errors() -> Iterator[None]:
    """What vLLM raises inside as an EngineError: the engine's state is unknown afterwards."""
    try:
        yield
    except (EngineError, StaleAdapterError, UserError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise EngineError(f"vLLM failed ({reason})") from error


def num_tokens_under_way(engine: Any) -> int:
    """Tokens of the unfinished requests, those sampled so far included; for any thread."""
    requests = list(engine.engine_core.engine_core.scheduler.requests.values())
    return sum(request.num_tokens for request in requests)


def load_lora(engine: Any, request: Any) -> None:
    """Has the engine's LoRA layers compute with this adapter and no other.

    Raises:
        UserError: vLLM refuses it.
        StaleAdapterError: vLLM did not load it.
    """
    try:
        engine.add_lora(request)
    except ValueError as error:
        raise UserError(
            f"vLLM does not load adapter {request.lora_path}: {one_line(error)}"
        ) from error
    if (held := engine.list_loras()) != {request.lora_int_id}:
        raise StaleAdapterError(
            f"vLLM has adapters {sorted(held)} after {request.lora_name} "
            f"(id {request.lora_int_id}) was loaded"
        )


def merged_weights(engine: Any, model_dir: Path, *, is_required: bool) -> MergedWeights | None:
    """Weights to merge adapters into; None, with a warning, if the engine has unknown layers.

    Raises:
        UserError: it has, and is_required.
    """
    (model,) = engine.apply_model(lambda model: model)
    try:
        return MergedWeights(model, model_dir)
    except LookupError as error:
        if is_required:
            raise UserError(
                f"adapters on {model_dir} cannot be merged into vLLM's weights: {error.args[0]}; "
                'leave sampling.merge_adapter out on a CPU, set model.dtype="bfloat16" on a GPU'
            ) from error
        warnings.warn(
            f"adapters go through vLLM's LoRA layers, which are slower: {error.args[0]}",
            stacklevel=2,
        )
        return None


def release_cpu_memory(engine: Any, merged: MergedWeights | None) -> None:
    """Frees the merged weights, and returns the KV cache's pages, which are zero afterwards."""
    if merged is not None:
        merged.unload()
    engine.collective_rpc(_forget_cache)
    cpu_memory.trim()


def _forget_cache(worker: Any) -> None:
    cpu_memory.forget(worker.model_runner.kv_caches)


def compiler_stance(never_compiles: bool) -> contextlib.AbstractContextManager[object]:
    """No compilation in an eager engine on a CPU.

    At the first sample vLLM compiles the ranking of log-probs, which is not used here; that takes
    14 s on two cores.
    """
    if never_compiles:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def load_weights(engine: Any, path: Path, *, on_cpu: bool) -> None:
    """Replaces the engine's weights by those of a directory; its prefix cache stays."""
    with process_kept():
        engine.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        if on_cpu:
            engine.apply_model(repack_head)


def repack_head(model: torch.nn.Module) -> None:
    """Packs a tied lm_head again.

    On a CPU vLLM computes with a packed copy of each weight. `reload_weights` packs those that it
    finds in the file; a tied lm_head is not among them and would keep its old copy.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead":
            module.quant_method.process_weights_after_loading(module)  # type: ignore[operator,union-attr]


def check_files(adapter: Adapter, *, with_tensors: bool) -> None:
    """Raises UserError if a published version's directory or weights are missing, and, for an
    adapter, StaleAdapterError as `check_published`."""
    if not adapter.is_full:
        check_published(adapter, with_tensors=with_tensors)
    elif not adapter.path.is_dir():
        raise UserError(f"adapter directory {adapter.path} does not exist")
    elif not any(adapter.path.glob("*.safetensors")):
        raise UserError(f"weights directory {adapter.path} holds no *.safetensors file")


def check_adapter(answered: Any, wanted: Any) -> None:
    """Raises StaleAdapterError if an output names another adapter than the one wanted."""
    found = None if answered is None else (answered.lora_name, answered.lora_int_id)
    expected = None if wanted is None else (wanted.lora_name, wanted.lora_int_id)
    if found != expected:
        raise StaleAdapterError(f"vLLM answered under adapter {found}, not {expected}")


def one_line(error: ValueError) -> str:
    """The error's first sentence; for a validation error, that of its first error."""
    text = str(error.errors()[0]["msg"]) if isinstance(error, ValidationError) else str(error)
    return " ".join(text.removeprefix("Value error, ").split()).split(". ")[0]


def completion_of(output: Any, tokenizer: Any, version: int) -> Completion:
    """The record of a finished request. Raises EngineError where it was not ended by sampling."""
    answer = output.outputs[0]
    if answer.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a sample with {answer.finish_reason!r}")
    token_ids = tuple(answer.token_ids)
    assert answer.logprobs.token_ids == list(token_ids)
    return Completion(
        token_ids=token_ids,
        text=tokenizer.decode(list(token_ids), skip_special_tokens=True),
        sampler_logprobs_T=tuple(answer.logprobs.logprobs),
        is_truncated=answer.finish_reason == "length",
        adapter_version=version,
    )
