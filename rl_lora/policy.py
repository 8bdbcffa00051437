"""The policy: a base model with a LoRA adapter, or with all its weights in training.

In LoRA mode the base's weights are never written to, which `base_fingerprint` proves.
"""

from __future__ import annotations

import contextlib
import copy
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

from rl_lora.config import LoraSection, ModelSection, parse_as
from rl_lora.errors import StaleAdapterError, UserError
from rl_lora.models.architectures import check_architecture
from rl_lora.models.device import pick_device, pick_dtype
from rl_lora.models.forward import can_share_prompts, token_logprobs
from rl_lora.models.load import load_model
from rl_lora.models.resolve import load_tokenizer, resolve_model
from rl_lora.nn.checksum import weights_hash
from rl_lora.nn.compiled import compile_layers
from rl_lora.nn.context import adapters_off
from rl_lora.nn.experts import adapted_parts, check_rank, expert_tensors, split_experts
from rl_lora.nn.lora import BASE_PREFIX, attach_lora, lora_layers
from rl_lora.nn.optimized import FlatParameters, MasterWeights, Optimized
from rl_lora.nn.variants import is_shifted, served_rank
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
        self.dtype = pick_dtype(model.dtype, self.device)
        config = AutoConfig.from_pretrained(model_dir)
        check_architecture(config, model_dir)
        check_rank(config, lora)
        self.model: PreTrainedModel = load_model(model_dir, self.dtype)
        self.model.to(self.device)  # type: ignore[arg-type]  # its stubs know no device
        self.can_share_prompts = can_share_prompts(self.model)
        self.target_names: list[str] = []  # layers with an adapter
        self.expert_names: tuple[str, ...] = ()  # gate, up and down of adapted experts in files
        self.is_sharded = False  # whether every rank holds a share of the weights
        self._make_trainable(seed, keep_reference)
        self._has_checkpoints = checkpoint_activations
        if checkpoint_activations:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self._is_compiled = self.device.type == "cuda" if model.compile is None else model.compile
        if self._is_compiled:
            compile_layers(self.model, keeps_activations=not checkpoint_activations)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @staticmethod
    def load(
        name: str,
        rank: int = 1,
        *,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        **lora: Any,
    ) -> Policy:
        """A policy by its base model's name.

        Args:
            name: the embedded model, a local directory or a hub id, as `model.name`.
            rank: of the adapter.
            seed: of the adapter's start.
            device, dtype: as `model.device` and `model.dtype`.
            lora: further keys of [lora], e.g. alpha=16 or mode="full".

        Raises:
            UserError: there is no such model, or a bad setting.
        """
        model = parse_as(ModelSection, {"name": name, "device": device, "dtype": dtype})
        section = parse_as(LoraSection, {"rank": rank, **lora})
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
        self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="rl-lora-")
        adapter = save_adapter(self, Path(self._scratch.name), version=step, run_name=run_name)
        remove_old(adapter.path.parent, keep={step, step - 1})
        return adapter

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name, in a fixed order."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @abstractmethod
    def _make_trainable(self, seed: int, keep_reference: bool) -> None: ...

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
        """What a version of this policy consists of: the adapter, or the whole state dict."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What training resumes from, the policy's own tensors: as published, except that PiSSA and
        OLoRA keep the trained factors and the frozen start apart, and that bfloat16 weights in
        training are represented by their float32 masters."""
        return self.published_tensors()

    def on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of this policy in the CPU's memory; not copied if they are there already."""
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copies `state_tensors` in (a published version's, except for PiSSA and OLoRA); names and
        shapes must match exactly.

        Raises:
            UserError: a name or shape differs, as with an adapter of another base model.
        """
        own = self.state_tensors()
        for name in sorted(own.keys() ^ tensors.keys()):
            where = "lacks" if name in own else "has an extra tensor"
            raise UserError(f"adapter of another base model or shape: it {where} {name}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise UserError(
                    f"adapter of another base model or rank: {name} is "
                    f"{list(tensors[name].shape)}, {self.base_name} needs {list(tensor.shape)}"
                )
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
        return token_logprobs(self.model, batch, temperature, self._is_compiled)

    @abstractmethod
    def reference_logprobs(self, batch: Microbatch, temperature: float) -> Tensor:
        """reference_logprobs_C: the base's, float32, nats."""

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Wraps forward and backward passes, in which activations are checkpointed if so set.

        transformers checkpoints in training mode only (dropout is 0), where the model would decode
        without its KV cache; so the mode ends with the block.
        """
        if self._has_checkpoints:
            self.model.train()
        try:
            yield
        finally:
            self.model.eval()

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Every rank holds all weights inside, so that ranks may run different numbers of forward
        passes, without gradients. All ranks enter it."""
        yield

    @abstractmethod
    def base_fingerprint(self) -> str:
        """Hash of the base's weights; in full fine-tuning of the weights as they are now."""

    @abstractmethod
    def check_base(self, expected: str) -> None:
        """Raises StaleAdapterError where the base has been written to since its fingerprint was
        `expected`."""


class LoraPolicy(Policy):
    """A frozen base model with a LoRA adapter in training."""

    has_base = True

    def _make_trainable(self, seed: int, keep_reference: bool) -> None:
        self.target_names = attach_lora(self.model, self.lora, seed)
        # Walks over all modules, once: publishing asks for them at each step.
        self._lora_layers = list(lora_layers(self.model))
        self.expert_names = adapted_parts(self.model)
        self._flat = FlatParameters(self.trainable())

    @property
    def optimized(self) -> FlatParameters:
        """The adapter as one tensor, and its gradient as another."""
        return self._flat

    @property
    def learns_in_parallel(self) -> bool:
        """On a CPU."""
        return self.device.type == "cpu"

    @property
    def published_rank(self) -> int:
        """Twice lora.rank with PiSSA and OLoRA."""
        return served_rank(self.lora)

    def published_tensors(self) -> dict[str, Tensor]:
        """lora_A [rank, d_in] and lora_B [d_out, rank] under PEFT's names, as they are served: of
        twice the rank with PiSSA and OLoRA, with magnitudes for DoRA."""
        tensors = {
            f"base_model.model.{name}.{part}": tensor.detach()
            for name, layer in self._lora_layers
            for part, tensor in layer.published().items()
        }
        return tensors | (expert_tensors(self.model) if self.expert_names else {})

    def state_tensors(self) -> dict[str, Tensor]:
        if not is_shifted(self.lora.variant):
            return self.published_tensors()
        return {
            f"base_model.model.{name}.{part}": tensor.detach()
            for name, layer in self._lora_layers
            for part, tensor in layer.state().items()
        }

    def on_host(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._flat.on_host(tensors)

    @torch.no_grad()
    def reference_logprobs(self, batch: Microbatch, temperature: float) -> Tensor:
        with self.adapter_off():
            return token_logprobs(self.model, batch, temperature, self._is_compiled)[0]

    def base_fingerprint(self) -> str:
        """`weights_hash` of the frozen weights."""
        return weights_hash(
            (name.replace(BASE_PREFIX, "."), parameter)
            for name, parameter in sorted(self.model.named_parameters())
            if not parameter.requires_grad
        )

    def check_base(self, expected: str) -> None:
        if self.base_fingerprint() != expected:
            raise StaleAdapterError("the base model's weights changed during the run")


class FullPolicy(Policy):
    """A model with all its weights in training (lora.mode = "full").

    The base is a copy made before training, with `keep_reference` only.
    """

    has_base = False

    def _make_trainable(self, seed: int, keep_reference: bool) -> None:
        self.model.requires_grad_(True)
        self._reference = copy.deepcopy(self.model) if keep_reference else None
        self._masters: MasterWeights | None = None  # none before training: they take memory

    @property
    def optimized(self) -> MasterWeights:
        """The weights, or their masters if they are bfloat16."""
        self._masters = self._masters or MasterWeights(self.trainable())
        return self._masters

    @property
    def learns_in_parallel(self) -> bool:
        """Never: each worker would need memory for gradients of all weights."""
        return False

    @property
    def published_rank(self) -> int:
        return 0

    def published_tensors(self) -> dict[str, Tensor]:
        return self._under_file_names({})

    def state_tensors(self) -> dict[str, Tensor]:
        return self._under_file_names(self._masters.tensors if self._masters else {})

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        super().load_tensors(tensors)
        if self._masters is not None:
            self._masters.write_back()

    def _under_file_names(self, instead: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict's tensors, or those given instead of them, by their names in files."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or ())
        state = {n: instead.get(n, t).detach() for n, t in self.model.state_dict().items()}
        state = {name: tensor for name, tensor in state.items() if name not in tied}
        assert instead.keys() <= state.keys(), "a weight in training would not be saved"
        return split_experts(self.model, state)

    @torch.no_grad()
    def reference_logprobs(self, batch: Microbatch, temperature: float) -> Tensor:
        assert self._reference is not None, "built without keep_reference"
        return token_logprobs(self._reference, batch, temperature, self._is_compiled)[0]

    def base_fingerprint(self) -> str:
        from rl_lora.adapters.files import fingerprint

        return fingerprint(self.published_tensors())

    def check_base(self, expected: str) -> None:
        """Training changes the weights, as it should."""


# limits: as `Policy`
def open_policy(
    model_dir: Path,
    model: ModelSection,
    lora: LoraSection,
    *,
    seed: int,
    checkpoint_activations: bool = False,
    keep_reference: bool = False,
) -> Policy:
    """The policy of lora.mode over a model directory.

    Args:
        model_dir: as `resolve_model` finds it.
        model: its name, device and dtype.
        lora: the adapter, or lora.mode = "full".
        seed: of the adapter's start.
        checkpoint_activations: recompute activations in the backward pass, to save memory.
        keep_reference: in full fine-tuning, keep a copy of the base for `reference_logprobs`.

    Raises:
        UserError: the model directory holds no causal language model that can be trained so.
    """
    kind = FullPolicy if lora.mode == "full" else LoraPolicy
    return kind(
        model_dir,
        model,
        lora,
        seed=seed,
        checkpoint_activations=checkpoint_activations,
        keep_reference=keep_reference,
    )
