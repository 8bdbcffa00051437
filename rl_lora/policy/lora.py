"""The policy that is an adapter: the base's weights are never written to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rl_lora.errors import StaleAdapterError
from rl_lora.models.forward import token_logprobs
from rl_lora.nn.checksum import weights_hash
from rl_lora.nn.experts import adapted_parts, expert_tensors
from rl_lora.nn.lora import BASE_PREFIX, attach_lora, lora_layers
from rl_lora.nn.optimized import FlatParameters
from rl_lora.nn.sharded import gathered, shard_model
from rl_lora.nn.variants import is_shifted, served_rank
from rl_lora.policy.base import Policy
from rl_lora.types import Microbatch


class LoraPolicy(Policy):
    """A frozen base model with a LoRA adapter in training."""

    has_base = True

    def _make_trainable(self, seed: int) -> None:
        self.target_names = attach_lora(self.model, self.lora, seed)
        if self.is_sharded:
            shard_model(self.model, self.device, adapter=self.trainable().values())
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
        """On a CPU, if no pass is collective (threads would mix up the ranks' order) and no layer
        is compiled (while one thread traces, PyTorch refuses compiled layers in all others)."""
        return self.device.type == "cpu" and not (self.is_sharded or self.is_compiled)

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
            return token_logprobs(self.model, batch, temperature, self.is_compiled)[0]

    def base_fingerprint(self) -> str:
        """`weights_hash` of the frozen weights, which are gathered one by one if need be."""
        return weights_hash(
            (name.replace(BASE_PREFIX, "."), gathered(parameter))
            for name, parameter in sorted(self.model.named_parameters())
            if not parameter.requires_grad
        )

    def check_base(self, expected: str) -> None:
        if self.base_fingerprint() != expected:
            raise StaleAdapterError("the base model's weights changed during the run")
