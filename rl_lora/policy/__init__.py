"""The policy: a base model with a LoRA adapter, or with all its weights in training."""

from __future__ import annotations

from pathlib import Path

from rl_lora.config import LoraSection, ModelSection
from rl_lora.policy.base import Policy
from rl_lora.policy.full import FullPolicy
from rl_lora.policy.lora import LoraPolicy

__all__ = ["FullPolicy", "LoraPolicy", "Policy", "open_policy"]


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
