"""Which models can be trained, decided from config.json before any weights are read.

docs/architectures.md lists the architectures that the tests train.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lora.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TABLE = "docs/architectures.md lists supported models"
# Config keys by which models scale or cap their logits, with the values that have no effect. The
# policy computes log-probs from lm_head(hidden states); `policy` also checks this numerically.
_LOGIT_KEYS: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None, 0),  # Gemma 2, 3n and 4
    "logits_soft_cap": (None, 0),  # RecurrentGemma
    "logits_scaling": (None, 1),  # Granite
    "logit_scale": (None, 1),  # Cohere
    "lm_head_multiplier": (None, 1),  # Falcon-H1
    "output_multiplier": (None, 1),
    "attn_logit_softcapping": (None, 0),  # Gemma 2's attention logits; SDPA ignores it
}


def check_config(model_dir: Path) -> PretrainedConfig:
    """The config of a model directory; the model's own code is never run.

    Raises:
        UserError: no readable config.json, a model type that this version of transformers does not
            know or that is not a causal language model, custom code, or quantized weights.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        raw = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model {model_dir}: its config.json cannot be used: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"model {model_dir}: its config.json is not a JSON object")
    kind, code = raw.get("model_type"), raw.get("auto_map")
    version = f"transformers {transformers.__version__}"
    if not isinstance(kind, str) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if code:
            named = ", ".join(sorted(map(str, code.values() if isinstance(code, dict) else [code])))
            raise UserError(
                f"model {model_dir}: {version} knows no causal language model of type {kind!r}, "
                f"and the model's own code ({named}) is not run here; {_TABLE}"
            )
        raise UserError(
            f"model {model_dir}: {version} knows no causal language model of type {kind!r} "
            "(model_type in config.json); a newer version within pyproject.toml's bounds may; "
            f"{_TABLE}"
        )
    text = raw.get("text_config")
    quantized = raw.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, dict) else None
    )
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"model {model_dir} is quantized ({method or 'quantization_config'} in config.json), "
            "and adapters are trained on unquantized weights; give the model that it was quantized "
            "from"
        )
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(
            model_dir, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # a config's own checks raise all kinds of errors
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {model_dir}: its config.json cannot be used: {type(error).__name__}: {reason}"
        ) from error
    return config


def check_architecture(config: PretrainedConfig, where: Path) -> None:
    """Checks that a model with this config can be trained.

    Raises:
        UserError: its logits are scaled or capped, or its attention cannot be replaced.
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    for key, neutral in _LOGIT_KEYS.items():
        value = getattr(text, key, None)
        if value not in neutral:
            raise UserError(
                f"model {where}: {text.model_type} scales or caps its logits ({key}={value}), "
                f"which is not supported; {_TABLE}"
            )
    model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    if not getattr(model_class, "_supports_sdpa", False):
        raise UserError(
            f"model {where}: {model_class.__name__} of transformers has no SDPA attention, which "
            f"is not supported; {_TABLE}"
        )
