"""A base model from its directory: complete, without dropout, with a plain lm_head."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from rl_lora.errors import UserError


def load_model(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in `dtype`, on the CPU, in evaluation mode.

    Raises:
        UserError: the directory has no such model, lacks weights, or has others than its config
            says.
    """
    config = AutoConfig.from_pretrained(model_dir)
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()  # weights load in a second, and it garbles our own
    logging.set_verbosity_error()  # `_check_complete` reports missing tensors itself
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model_dir,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are named below
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model {model_dir}: not a loadable causal language model: {reason}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    model: PreTrainedModel = loaded[0]
    _check_complete(loaded[1], model_dir)
    model.eval()
    _align(model)
    for module in model.modules():  # log-probs must be the sampler's
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (an attribute nn.Module lacks)
        if hasattr(module, "jitter_noise"):  # of a mixture's router, in training mode
            setattr(module, "jitter_noise", 0.0)  # noqa: B010
    _check_lm_head(model, model_dir)
    return model


def _check_complete(loading_info: dict[str, Any], model_dir: Path) -> None:
    """Raises UserError where weights were drawn at random: the files lack them, or have others."""
    mismatched = sorted(loading_info["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise UserError(
            f"model {model_dir}: {name} is {list(found)} in its files and {list(wanted)} by its "
            f"config.json ({len(mismatched)} such tensors); fetch the model again"
        )
    if missing := sorted(loading_info["missing_keys"]):
        fix = "fetch the model again"
        if "lm_head" in missing[0]:
            fix += (
                ", or set tie_word_embeddings=true in config.json if its lm_head is the embedding"
            )
        raise UserError(
            f"model {model_dir}: its files have no {missing[0]} ({len(missing)} missing); {fix}"
        )
    if unused := sorted(loading_info["unexpected_keys"]):
        warnings.warn(
            f"model {model_dir}: {len(unused)} tensors of its files belong to no layer of the "
            f"model and are ignored, {unused[0]} first",
            stacklevel=2,
        )


@torch.no_grad()
def _align(model: PreTrainedModel) -> None:
    """Copies weights that do not start at a multiple of 64 bytes.

    Weights start wherever the file or Python's heap put them, and a matmul's rounding depends on
    its operands' alignment: two runs with one seed could then differ in their last digits.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


@torch.no_grad()
def _check_lm_head(model: PreTrainedModel, model_dir: Path) -> None:
    """Hidden states through lm_head must give the model's own logits (some models scale or cap)."""
    token_ids_BT = torch.arange(1, 9).unsqueeze(0)
    logits_BTV = model(input_ids=token_ids_BT, use_cache=False).logits.float()
    hidden_BTD = model.base_model(input_ids=token_ids_BT, use_cache=False).last_hidden_state
    own_BTV = model.get_output_embeddings()(hidden_BTD).float()
    if not torch.allclose(own_BTV, logits_BTV, atol=1e-2, rtol=1e-2):
        raise UserError(
            f"model {model_dir}: its logits are not lm_head(hidden states); models that scale or "
            "cap their logits are not supported"
        )
