"""The tokens that end a completion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig

from rl_lora.data.chat_template import end_of_turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def end_token_ids(
    model_dir: Path,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Ids of all tokens that end a completion, sorted.

    They are the tokenizer's, those of generation_config.json, and the one that ends a turn of the
    chat template, which for base models may be in neither (Qwen3-8B-Base).

    Args:
        model_dir: may have a generation_config.json.
        tokenizer: of the model.
        template: "chat" or "base", as `data.template`; None: chat if the tokenizer has a template.
        chat_template_kwargs: as `data.chat_template_kwargs`.
    """
    template = template or ("chat" if tokenizer.chat_template else "base")
    ids = {int(tokenizer.eos_token_id)}
    ids.add(end_of_turn(tokenizer, template, chat_template_kwargs or {}))
    if (model_dir / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return tuple(sorted(ids))
