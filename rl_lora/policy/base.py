"""What both kinds of policy have in common."""

from __future__ import annotations

import contextlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from rl_lora import distributed
from rl_lora.config import LoraSection, ModelSection, parse_as
from rl_lora.config.checks import check_quantize
from rl_lora.errors import UserError
from rl_lora.models.architectures import check_architecture
from rl_lora.models.device import pick_device, pick_dtype
from rl_lora.models.forward import can_share_prompts, token_logprobs
from rl_lora.models.load import load_model
from rl_lora.models.resolve import load_tokenizer, resolve_model
from rl_lora.nn.compiled import compile_layers
from rl_lora.nn.context import adapters_off
from rl_lora.nn.deterministic import deterministic, fix_num_threads
from rl_lora.nn.experts import check_rank
from rl_lora.nn.model_state import check_shapes
from rl_lora.nn.optimized import Optimized
from rl_lora.nn.quantized import check_quantizable, quantize_layers
from rl_lora.nn.sharded import is_to_be_sharded, whole_weights
from rl_lora.types import Adapter, Microbatch


class Policy(ABC):
    """A causal language model, what of it is trained, and how it scores tokens.

    `Policy.load` and `open_policy` make the kind that the settings ask for: `LoraPolicy` or
    `FullPolicy`.

    Raises:
        UserError: the model directory holds no causal language model that this class can score.
    """

    has_base: ClassVar[bool]  # whether the base model can be had, by switching the adapter off

    # limits: the settings, and what of them only training needs
    def __init__(
        self,
        model_dir: Path,
        model: ModelSection,
        lora: LoraSection,
        *,
        seed: int,
        checkpoint_activations: bool = False,
        keep_reference: bool = False,
    ) -> None:
        self.model_dir = model_dir
        self.base_name = model.name
        self.base_revision = model.revision
        self.lora = lora
        self.device = pick_device(model.device)
        fix_num_threads(self.device)
        self.dtype = pick_dtype(model.dtype, self.device)
        config = AutoConfig.from_pretrained(model_dir)
        check_architecture(config, model_dir)
        check_rank(config, lora)
        self.quantize = model.quantize
        if self.quantize is not None:
            check_quantizable(config)
        self.is_sharded = is_to_be_sharded(model, lora)  # whether a rank holds a share of the base
        self.model: PreTrainedModel = load_model(model_dir, self.dtype)
        if self.quantize is not None:
            quantize_layers(self.model, self.quantize)
        if not self.is_sharded:
            self.model.to(self.device)  # type: ignore[arg-type]  # its stubs know no device
        self.target_names: list[str] = []  # layers with an adapter
        self.expert_names: tuple[str, ...] = ()  # gate, up and down of adapted experts in files
        self._make_trainable(seed)
        self.can_share_prompts = can_share_prompts(self.model)
        if keep_reference:
            self._keep_reference()
        self._has_checkpoints = checkpoint_activations
        if checkpoint_activations:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        compiles = self.device.type == "cuda" and self.quantize is None
        self.is_compiled = compiles if model.compile is None else model.compile
        if self.is_compiled:
            compile_layers(self.model, keeps_activations=not checkpoint_activations)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    # limits: what most programs set of [model] and [lora]
    @staticmethod
    def load(
        name: str,
        rank: int = 1,
        *,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        **lora: Any,
    ) -> Policy:
        """A policy by its base model's name.

        Args:
            name: the embedded model, a local directory or a hub id, as `model.name`.
            rank: of the adapter.
            seed: of the adapter's start.
            device, dtype, quantize: as in [model].
            lora: further keys of [lora], e.g. alpha=16 or mode="full".

        Raises:
            UserError: there is no such model, or a bad setting.
        """
        from rl_lora.policy import open_policy

        own = {"name": name, "device": device, "dtype": dtype, "quantize": quantize}
        model = parse_as(ModelSection, own)
        section = parse_as(LoraSection, {"rank": rank, **lora})
        try:
            check_quantize(model, section)
        except ValueError as error:
            raise UserError(str(error)) from error
        return open_policy(resolve_model(model), model, section, seed=seed)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return load_tokenizer(self.model_dir)

    def publish(self, step: int, folder: Path | None = None, run_name: str = "policy") -> Adapter:
        """Writes the present weights to folder/vNNNNNN, as version `step`; a sampler takes the
        returned handle.

        Args:
            step: a number not used before; versions are never overwritten in a sampler's cache.
            folder: None: a temporary one that lives as long as the policy and keeps two versions.
            run_name: of the handle, with the version; unique among a sampler's policies.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        from rl_lora.adapters.files import remove_old, save_adapter

        if folder is not None:
            return save_adapter(self, folder, version=step, run_name=run_name)
        folder = distributed.from_main(self._scratch_folder, f"publishing version {step}")
        adapter = save_adapter(self, folder, version=step, run_name=run_name)
        if distributed.is_main():
            remove_old(folder, keep={step, step - 1})
        return adapter

    def _scratch_folder(self) -> Path:
        self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="rl-lora-")
        return Path(self._scratch.name)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in a fixed order."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @abstractmethod
    def _make_trainable(self, seed: int) -> None:
        """Also shards the model, if it is to be."""

    def _keep_reference(self) -> None:  # noqa: B027 (where there is a base, nothing is to do)
        """Copies the base for `reference_logprobs`, if need be."""

    @property
    @abstractmethod
    def optimized(self) -> Optimized:
        """What an optimizer steps on, and how its gradients come to it."""

    @property
    @abstractmethod
    def learns_in_parallel(self) -> bool:
        """Whether microbatches may run at once, each with gradients to itself."""

    @property
    @abstractmethod
    def published_rank(self) -> int:
        """Rank of the published adapter; 0 for whole models."""

    @abstractmethod
    def published_tensors(self) -> dict[str, Tensor]:
        """What a version of this policy consists of: the adapter, or the whole state dict.

        Sharded whole models are gathered in the host memory of rank 0; all ranks call it, and the
        others get no tensors.
        """

    def state_tensors(self) -> dict[str, Tensor]:
        """What training resumes from, the policy's own tensors: as published, except that PiSSA and
        OLoRA keep the trained factors and the frozen start apart, and that bfloat16 weights in
        training are represented by their float32 masters. Of whole sharded models this too is a
        copy on rank 0."""
        return self.published_tensors()

    def on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of this policy in the CPU's memory; not copied if they are there already."""
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies `state_tensors` in (a published version's, except for PiSSA and OLoRA); names and
        shapes must match exactly. All ranks have the tensors, and call it.

        Raises:
            UserError: a name or shape differs, as with an adapter of another base model.
        """
        own = self.state_tensors()
        check_shapes(own, tensors, self.base_name)
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    def adapter_off(self) -> AbstractContextManager[None]:
        """Forward passes inside are the base model's; only where `has_base`."""
        assert self.has_base, "in full fine-tuning there is no adapter to switch off"
        return adapters_off()

    def token_logprobs(self, batch: Microbatch, temperature: float) -> tuple[Tensor, Tensor]:
        """(policy_logprobs_C with gradient, entropy_C without), float32, nats.

        Both are of the distribution softmax(logits / temperature), the one sampled from.

        Raises:
            ValueError: the batch shares prompts in a row, which this model cannot compute.
        """
        return token_logprobs(self.model, batch, temperature, self.is_compiled)

    @abstractmethod
    def reference_logprobs(self, batch: Microbatch, temperature: float) -> Tensor:
        """reference_logprobs_C: the base's, float32, nats."""

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Wraps forward and backward passes, in which activations are checkpointed if so set; on a
        CPU they give the same bytes again.

        transformers checkpoints in training mode only (dropout is 0), where the model would decode
        without its KV cache; so the mode ends with the block.
        """
        if self._has_checkpoints:
            self.model.train()
        try:
            with deterministic() if self.device.type == "cpu" else contextlib.nullcontext():
                yield
        finally:
            self.model.eval()

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Every rank holds all weights inside, so that ranks may run different numbers of forward
        passes, without gradients. All ranks enter it."""
        with whole_weights(self.model) if self.is_sharded else contextlib.nullcontext():
            yield

    def fingerprint(self) -> str:
        """Of `published_tensors`, as `Adapter.fingerprint`; of a sharded policy, all ranks call."""
        from rl_lora.adapters.files import fingerprint

        return fingerprint(self.published_tensors())

    @abstractmethod
    def base_fingerprint(self) -> str:
        """Hash of the base's weights; in full fine-tuning of the weights as they are now."""

    @abstractmethod
    def check_base(self, expected: str) -> None:
        """Raises StaleAdapterError where the base has been written to since its fingerprint was
        `expected`."""
