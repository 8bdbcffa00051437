"""The policy that is a whole model: all weights are trained."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rl_lora import distributed
from rl_lora.models.forward import token_logprobs
from rl_lora.models.load import load_model
from rl_lora.nn.model_state import file_tensors, gathered_tensors, load_into_shards
from rl_lora.nn.optimized import MasterWeights
from rl_lora.nn.sharded import shard_model
from rl_lora.policy.base import Policy
from rl_lora.types import Microbatch


class FullPolicy(Policy):
    """A model with all its weights in training (lora.mode = "full").

    The base is a copy made before training, with `keep_reference` only.
    """

    has_base = False

    def _make_trainable(self, seed: int) -> None:
        self.model.requires_grad_(True)
        if self.is_sharded:
            shard_model(self.model, self.device)
        self._reference: PreTrainedModel | None = None
        self._masters: MasterWeights | None = None  # none before training: they take memory

    def _keep_reference(self) -> None:
        if not self.is_sharded:
            self._reference = copy.deepcopy(self.model)
            return
        self._reference = load_model(self.model_dir, self.dtype)
        self._reference.requires_grad_(False)
        self._reference.set_attn_implementation(self.model.config._attn_implementation)
        shard_model(self._reference, self.device)

    @property
    def optimized(self) -> MasterWeights:
        """The weights, or their masters if they are bfloat16; shards are masters themselves."""
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
        if self.is_sharded:
            return gathered_tensors(self.model, self.dtype)
        return file_tensors(self.model, {})

    def state_tensors(self) -> dict[str, Tensor]:
        if self.is_sharded:
            return gathered_tensors(self.model, torch.float32)
        return file_tensors(self.model, self._masters.tensors if self._masters else {})

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        if self.is_sharded:
            load_into_shards(self.model, tensors, self.base_name)
            return
        super().load_tensors(tensors)
        if self._masters is not None:
            self._masters.write_back()

    def fingerprint(self) -> str:
        from rl_lora.adapters.files import fingerprint

        tensors = self.published_tensors()
        return distributed.from_main(lambda: fingerprint(tensors), "the fingerprint of all weights")

    @torch.no_grad()
    def reference_logprobs(self, batch: Microbatch, temperature: float) -> Tensor:
        assert self._reference is not None, "built without keep_reference"
        return token_logprobs(self._reference, batch, temperature, self.is_compiled)[0]

    def base_fingerprint(self) -> str:
        return self.fingerprint()

    def check_base(self, expected: str) -> None:
        """Training changes the weights, as it should."""
