"""What `chat` and `serve-command` need to know of a run or an adapter: base, settings, prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl_lora.adapters.files import find_adapter
from rl_lora.adapters.model_card import run_config
from rl_lora.adapters.peft_files import named_base, trained_on
from rl_lora.adapters.resize import common_settings
from rl_lora.config import LoraSection, ModelSection, parse_as
from rl_lora.data.chat_template import ChatTemplate, check_plain
from rl_lora.data.messages import Message, plain_text
from rl_lora.errors import UserError


@dataclass(frozen=True)
class Served:
    """An adapter with its base model, and how its run has rendered conversations.

    Example: Served(adapter_dir=Path("runs/q/adapter"), model=ModelSection(...),
    lora=LoraSection(rank=1), template="chat", system="", few_shot="", instruction="Put ...",
    template_kwargs={}, max_tokens=48)
    """

    adapter_dir: Path
    model: ModelSection
    lora: LoraSection
    template: str  # chat or base
    system: str | None
    few_shot: str
    instruction: str  # that training appended to each question
    template_kwargs: dict[str, Any]
    max_tokens: int

    def prompt(self, messages: list[Message], tokenizer: Any) -> str:
        """The conversation as the text that an answer follows."""
        if self.template == "base":
            check_plain(messages, "the conversation")
            return self.few_shot + plain_text(messages)
        if self.system is not None:
            messages = [Message("system", self.system), *messages]
        chat = ChatTemplate(tokenizer, self.template_kwargs)
        return chat.render(messages, "the conversation", opens_turn=True)


def read_served(source: Path, base: str | None = None) -> Served:
    """What a run folder, an adapter directory or a hub id says.

    Args:
        source: of the adapter.
        base: the base model's name; None: as the adapter or its run says.

    Raises:
        UserError: there is no adapter, it is not one that can be served, or it names no base.
    """
    adapter_dir = find_adapter(source)
    config = run_config(adapter_dir)
    model = ModelSection() if config is None else config.model
    if base or config is None:
        name = base or named_base(adapter_dir)
        if name is None:
            raise UserError(f"{adapter_dir} names no base model; give --base")
        trained = trained_on(adapter_dir)
        own = {"quantize": trained.quantize, "dtype": trained.dtype}
        model = parse_as(ModelSection, {"name": name, **own})
    lora = LoraSection(mode="full") if config and config.lora.mode == "full" else LoraSection()
    lora = lora.model_copy(update=common_settings([adapter_dir]))
    data = None if config is None else config.data
    sampling = getattr(config, "sampling", None)
    return Served(
        adapter_dir=adapter_dir,
        model=model,
        lora=lora,
        template="chat" if data is None else data.template,
        system=None if data is None else data.system,
        few_shot=getattr(data, "few_shot", ""),
        instruction="" if data is None else data.instruction,
        template_kwargs={} if data is None else data.chat_template_kwargs,
        max_tokens=512 if sampling is None else sampling.max_tokens,
    )
