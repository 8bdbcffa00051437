"""The PyTorch sampler with its own copy of the weights, which may sample while the learner learns:
`sampling.backend=tests.helpers.own_copy:OwnCopy`."""

from __future__ import annotations

from typing import Any

from rl_lora.adapters.files import load_tensors
from rl_lora.config import ModelSection
from rl_lora.policy import Policy, open_policy
from rl_lora.samplers.torch_sampler import TorchSampler
from rl_lora.types import Adapter


class OwnCopy(TorchSampler):
    """On a CPU in float32."""

    has_own_weights = True

    def __init__(self, policy: Policy, **options: Any) -> None:
        section = ModelSection(name=str(policy.model_dir), device="cpu", dtype="float32")
        super().__init__(open_policy(policy.model_dir, section, policy.lora, seed=0), **options)

    def set_adapter(self, adapter: Adapter | None) -> None:
        if adapter is not None:
            self.policy.load_tensors(load_tensors(adapter.path))
        super().set_adapter(adapter)
