"""Sampling with vLLM in the learner's own process.

One process, because two whose OpenMP threads compete for the same cores lose more than handing over
an adapter costs, and because the weights of full fine-tuning are then replaced without a copy.
vLLM is imported when the first sampler is made; what it changes in the process (environment,
threads, random state) is restored (`process`).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from transformers import AutoConfig

from rl_lora.errors import EngineError, StaleAdapterError, UserError
from rl_lora.launchers.interruption import check, unbroken
from rl_lora.models.dequantized import dequantized_dir
from rl_lora.models.resolve import context_length
from rl_lora.sampler import BASE_VERSION, Groups, OnGroup, OnProgress, Stops, max_tokens_of
from rl_lora.samplers import cpu_memory
from rl_lora.samplers.end_tokens import end_token_ids as model_end_token_ids
from rl_lora.samplers.vllm.engine import (
    check_adapter,
    check_device,
    check_files,
    compiler_stance,
    completion_of,
    engine_errors,
    load_lora,
    load_weights,
    make_engine,
    merged_weights,
    num_tokens_under_way,
    release_cpu_memory,
)
from rl_lora.samplers.vllm.merged_weights import MergedWeights, read_terms
from rl_lora.samplers.vllm.process import (
    check_cpu_heads,
    import_vllm,
    process_kept,
    torch_random_state_kept,
)
from rl_lora.samplers.vllm.requests import check_request, sampling_settings
from rl_lora.samplers.vllm.settings import (
    EngineOptions,
    ServedPolicy,
    check_mixture,
    check_model,
    engine_settings,
    lora_settings,
    merges_adapter,
    with_memory_fraction,
)
from rl_lora.samplers.vllm.sleep import put_to_sleep, wake, wake_to_close
from rl_lora.samplers.watchdog import Hang
from rl_lora.seeds import sample_seeds
from rl_lora.types import Adapter, Completion, Prompt, SampleParams

__all__ = ["EngineOptions", "VllmSampler"]

_Request = tuple[Sequence[int], Any]  # token ids, vllm.SamplingParams
_CONTEXT = 2048  # tokens of prompt and completion, unless max_model_len says otherwise


class VllmSampler:
    """A `Sampler` on an in-process vLLM engine; only one may be open at a time."""

    has_own_weights = True
    batches_continuously = True  # `stream`
    _rests = False  # while the learner works
    _num_finished = 0  # requests, of all calls
    _open: ClassVar[weakref.ref[VllmSampler] | None] = None  # vLLM's state is one per process

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        end_token_ids: Sequence[int] | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        on_progress: OnProgress | None = None,
        engine: EngineOptions | None = None,
    ) -> None:
        """Loads the policy's base model into an engine.

        Args:
            policy: whose versions are served.
            end_token_ids: tokens that end a completion; None: the model's.
            max_model_len: of prompt and completion; None: the model's context, at most 2,048.
            max_num_seqs: sequences decoded at once; None: as suits the machine.
            on_progress: called after each finished sample.
            engine: further options; None: the defaults.

        Raises:
            UserError: vLLM is missing, for another device, or does not serve the model or context.
        """
        lora, device, engine = policy.lora, policy.device, engine or EngineOptions()
        model_dir = dequantized_dir(policy.model_dir, policy.quantize, dtype := policy.dtype)
        if max_model_len is None:
            max_model_len = min(_CONTEXT, context_length(AutoConfig.from_pretrained(model_dir)))
        self._on_cpu, self._is_full = device.type == "cpu", lora.mode == "full"
        check_model(model_dir, max_model_len)
        check_device(device, lora, model_dir)
        merges = merges_adapter(engine.merge_adapter, lora, dtype=dtype, device=device)
        check_mixture(model_dir, device, merges=merges)
        self._vllm = import_vllm(device)
        if self._on_cpu:
            check_cpu_heads(model_dir)
        if VllmSampler._open is not None and VllmSampler._open() is not None:
            raise RuntimeError("another VllmSampler is open in this process; close() it first")
        self.max_model_len = max_model_len
        self.on_progress = on_progress
        self._model_dir = model_dir
        self._adapter: Adapter | None = None
        self._known: dict[str, tuple[int, str]] = {}  # adapter name -> (vLLM's id, fingerprint)
        self._checksums: list[int] = []  # of the weights of an engine that sleeps on a GPU
        settings = engine_settings(
            model_dir,
            engine if self._on_cpu else with_memory_fraction(engine, device),
            dtype=dtype,
            device=device,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
        )
        self._never_compiles = self._on_cpu and settings["enforce_eager"]
        is_required = bool(engine.merge_adapter) or not self._on_cpu
        self._open_engine(settings, lora_settings(lora, dtype), merges, is_required=is_required)
        self._tokenizer = self._engine.get_tokenizer()
        if end_token_ids is None:
            end_token_ids = model_end_token_ids(model_dir, self._tokenizer)
        self._end_token_ids = list(end_token_ids)
        VllmSampler._open = weakref.ref(self)
        self.release_memory()

    def _open_engine(
        self, settings: dict[str, Any], layers: dict[str, Any], merges: bool, *, is_required: bool
    ) -> None:
        """With merged weights, or with LoRA layers if these are asked for or merging fails."""
        make = partial(make_engine, self._vllm, on_cpu=self._on_cpu)
        self._engine = make(settings if merges else settings | layers)
        self._merged: MergedWeights | None = None
        if merges:
            self._merged = merged_weights(self._engine, self._model_dir, is_required=is_required)
            if self._merged is None:
                self._shut_down()
                self._engine = make(settings | layers)

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Samples from this version from now on; None: from the base model.

        Raises:
            UserError: the directory or its weights are missing, or do not fit the base or rank.
            StaleAdapterError: the name was used for other weights, or vLLM did not load it.
            EngineError: the engine failed.
        """
        engine = self._live_engine()
        if adapter is not None:
            if adapter.is_full != self._is_full:
                raise ValueError(
                    f"{adapter.name}: is_full={adapter.is_full} in a sampler made for "
                    f"lora.mode={'full' if self._is_full else 'lora'!r}"
                )
            check_files(adapter, with_tensors=self._merged is None)  # else `read_terms` does
        if self._merged is not None:
            if adapter is not None:
                self._check_name(adapter)
            self._merged.set_target(read_terms(adapter) if adapter else {})
            self._adapter = adapter
            return
        with engine_errors():
            self._wake()
            if self._is_full:
                path = self._model_dir if adapter is None else adapter.path
                load_weights(engine, path, on_cpu=self._on_cpu)
                self._reset_cache()
            elif adapter is not None:
                load_lora(engine, self._lora_request(adapter))
        self._adapter = adapter

    def sample(
        self,
        prompts_N: Sequence[Prompt],
        params: SampleParams,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """[N][G] completions, in the prompts' order, the same ones for the same arguments.

        Log-probs are those of the distribution sampled from: at params.temperature (temperature 0:
        at 1) and after top_p, in nats. Each sample has its own seed, so that up to rounding it does
        not depend on the rest of the batch (except for the same prompt further ahead in it). The
        tokens that spell a stop string are kept.

        Raises:
            UserError: a prompt and max_tokens together exceed the context, or a temperature that
                vLLM would change.
            StaleAdapterError: vLLM answered with another adapter than the one that was set.
            EngineError: the engine failed.
        """
        check_request(prompts_N, params, self.max_model_len)
        stops = Stops.of(params.stop, self._tokenizer)
        requests: dict[str, _Request] = {}
        seeds_N_G, caps_N = sample_seeds(prompts_N, params), max_tokens_of(prompts_N, params)
        for prompt, seeds_G, cap in zip(prompts_N, seeds_N_G, caps_N, strict=True):
            own = replace(params, max_tokens=cap)
            for seed in seeds_G:
                options = self._sampling_params(own, stops, seed)
                requests[str(len(requests))] = (prompt.token_ids, options)
        groups = Groups(len(prompts_N), params.num_samples, on_group)

        def on_output(output: Any) -> None:
            groups.add(int(output.request_id), self._completion(output))

        self._run(requests, self.on_progress, on_output)
        return groups.all()

    def token_logprobs(self, token_ids_N: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probs of given sequences, in nats at temperature 1, with the adapter that was set.

        Those of tokens 1, 2, ... given the tokens before: one fewer than the sequence has tokens.

        Raises:
            UserError: a sequence exceeds the context.
        """
        for token_ids in token_ids_N:
            if len(token_ids) > self.max_model_len:
                raise UserError(
                    f"a sequence of {len(token_ids)} tokens exceeds the sampler's context of "
                    f"{self.max_model_len}; raise max_model_len"
                )
        params = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False
        )
        requests = {
            str(n): (token_ids, params)
            for n, token_ids in enumerate(token_ids_N)
            if len(token_ids) > 1
        }
        outputs = self._run(requests, None)
        logprobs_N: list[list[float]] = []
        for n, token_ids in enumerate(token_ids_N):
            if len(token_ids) <= 1:
                logprobs_N.append([])
                continue
            scored = outputs[str(n)].prompt_logprobs
            assert scored.token_ids == list(token_ids[1:])
            logprobs_N.append(list(scored.logprobs))
        return logprobs_N

    def progress(self) -> tuple[int, int]:
        """Another value after every token, for any thread."""
        engine = self._engine
        return self._num_finished, 0 if engine is None else num_tokens_under_way(engine)

    @engine_errors()
    def release_memory(self) -> None:
        """Frees the memory that only sampling needs; the next call takes it again.

        On a GPU the engine sleeps (`sleep`). On a CPU these are the KV cache's pages and the merged
        weights, which the next call makes again in half a percent of a step.
        """
        engine = self._live_engine()
        if self._rests or engine.has_unfinished_requests():
            return
        self._reset_cache()
        if self._on_cpu:
            release_cpu_memory(engine, self._merged)
        else:
            self._checksums = put_to_sleep(engine)
        self._rests = True

    def close(self) -> None:
        """Frees the engine's weights, cache and process groups; a second call does nothing."""
        if self._engine is None:
            return
        self._shut_down()
        VllmSampler._open = None

    @engine_errors()
    def _shut_down(self) -> None:
        self._merged = None
        if self._rests and not self._on_cpu:
            wake_to_close(self._engine)
        with process_kept():
            self._engine.engine_core.shutdown()
            self._engine = None
            gc.collect()

    def _wake(self) -> None:
        """Takes back the memory that was released, and loads the target weights if need be."""
        if self._rests:
            if self._on_cpu:
                cpu_memory.trim()  # what the learner freed
            else:
                wake(self._engine, self._checksums)
            self._rests = False
        if self._merged is not None and self._merged.load():
            self._reset_cache()

    def _live_engine(self) -> Any:
        if self._engine is None:
            raise RuntimeError("this VllmSampler is closed")
        return self._engine

    def _check_name(self, adapter: Adapter) -> int:
        """vLLM's number for the adapter's name. Raises StaleAdapterError as `set_adapter` says."""
        known = self._known.setdefault(adapter.name, (len(self._known) + 1, adapter.fingerprint))
        if known[1] != adapter.fingerprint:
            raise StaleAdapterError(
                f"adapter name {adapter.name!r} was used before for other weights; vLLM's prefix "
                "cache is keyed by the name, so each version needs its own"
            )
        return known[0]

    def _lora_request(self, adapter: Adapter) -> Any:
        return self._vllm.LoRARequest(adapter.name, self._check_name(adapter), str(adapter.path))

    def _reset_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise StaleAdapterError("vLLM kept its prefix cache although the weights changed")

    def _sampling_params(self, params: SampleParams, stops: Stops, seed: int) -> Any:
        settings = sampling_settings(params, stops, seed, self._end_token_ids)
        settings["output_kind"] = self._vllm.RequestOutputKind.FINAL_ONLY
        return self._vllm.SamplingParams(**settings, flat_logprobs=True)

    def _run(
        self,
        requests: dict[str, _Request],
        on_progress: OnProgress | None,
        on_output: Callable[[Any], None] | None = None,
        more: Callable[[], dict[str, _Request]] = dict,
    ) -> dict[str, Any]:
        """The final output of each request, checked to come from the adapter that was set.

        more: called before every step; its requests are sampled as well.
        """
        engine = self._live_engine()
        with engine_errors():
            self._wake()
        has_own_layers = not self._is_full and self._merged is None
        lora = self._lora_request(self._adapter) if self._adapter and has_own_layers else None
        outputs: dict[str, Any] = {}
        num_tokens = 0
        try:
            with compiler_stance(self._never_compiles), torch_random_state_kept(), unbroken():
                new = requests
                while new or engine.has_unfinished_requests():
                    if on_output is not None:
                        check()  # for signals: what is sampled can be abandoned
                    with engine_errors():
                        for key, (token_ids, params) in new.items():
                            tokens = self._vllm.tokens_input(list(token_ids))
                            engine.add_request(key, tokens, params, lora_request=lora)
                        step = engine.step()
                    for output in step:
                        if not output.finished:
                            continue
                        check_adapter(output.lora_request, lora)
                        outputs[output.request_id] = output
                        self._num_finished += 1
                        num_tokens += len(output.outputs[0].token_ids)
                        if on_progress is not None:
                            on_progress(len(outputs), len(requests), num_tokens)
                        if on_output is not None:
                            on_output(output)
                    requests |= (new := more())
        except (EngineError, Hang):
            raise  # the engine is not used again
        except BaseException:
            engine.abort_request([key for key in requests if key not in outputs])
            raise
        return outputs

    def _completion(self, output: Any) -> Completion:
        version = BASE_VERSION if self._adapter is None else self._adapter.version
        return completion_of(output, self._tokenizer, version)
