"""Turns data sets into prompts, rendered and tokenized once; `data.stream` streams them by seed.

Evaluation and training rows share no question. `PromptSets.notes` says per data set what was
dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rl_lora.config import DataSection, RunConfig, parse_as
from rl_lora.data.chat_template import (
    ChatTemplate,
    check_characters,
    check_plain,
    encode_prompts,
    markup_note,
)
from rl_lora.data.chats import finish_solution
from rl_lora.data.collect import Collected, Item, collect
from rl_lora.data.curriculum import PassRates
from rl_lora.data.files import Role
from rl_lora.data.messages import Message, plain_text, read_tools, with_question
from rl_lora.data.pass_rates import read_pass_rates, within
from rl_lora.data.row_formats import DataRow
from rl_lora.data.stream import PromptStream
from rl_lora.errors import UserError
from rl_lora.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PromptSets:
    """The prompts for training and evaluation."""

    train: list[Prompt]
    eval: list[Prompt]
    notes: list[str]  # a line per data set: rows kept, and why others were dropped
    # Of the training sources, by `Prompt.source`; empty: their prompts are shuffled together.
    weights: dict[str, float] = field(default_factory=dict)
    pass_rates: dict[str, float] = field(default_factory=dict)  # by prompt id, of data.pass_rates

    def stream(self, config: RunConfig) -> PromptStream:
        """The training prompts as the settings mix them. Raises UserError if there are none."""
        curriculum = None
        if config.data.curriculum == "pass_rate":
            curriculum = PassRates(config.sampling.max_staleness, self.pass_rates)
        return PromptStream(self.train, config.run.seed, self.weights, curriculum)


# limits: what a job knows of its data, each from another section
def load_prompt_sets(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    max_new_tokens: int,
    seed: int,
    *,
    max_eval_tokens: int | None = None,
    with_columns: bool = False,
) -> PromptSets:
    """Loads, cleans, splits and renders all data sets of a job.

    Without data.eval, the evaluation is `data.held_out` rows, drawn by seed from the test parts of
    training sources that have one, and from the training rows of the others. Where a source has a
    weight or its own held_out, each gives rows in proportion, or as many as its held_out says. A
    source named "held_out" in data.eval adds these rows to the other sets.

    Args:
        data: sources and rendering.
        tokenizer: the base model's.
        context_length: the model's maximum, prompt and completion together, in tokens.
        max_new_tokens: longest completion; the prompt must leave room for it.
        seed: of the choice of held-out rows.
        max_eval_tokens: longest completion in the evaluation; None: max_new_tokens.
        with_columns: keep the rows' columns in the prompts, for a reward that uses them.

    Raises:
        UserError: an unusable source, too few rows, a missing chat template or one that rejects a
            row, invalid text, or a prompt that is too long. Prompts are never truncated.
    """
    if not data.train and not data.eval:
        raise UserError("data.train and data.eval are empty; set data.train, e.g. data.train=gsm8k")
    renderer = _Renderer(data, tokenizer, with_columns=with_columns)
    collected = collect(data, seed)
    pass_rates = read_pass_rates(data.pass_rates, collected.train) if data.pass_rates else {}
    train, left_out = within(collected.train, pass_rates, data)
    eval_tokens = max_eval_tokens or max_new_tokens
    asked = [item.row.asked(with_system=True) for item in (*collected.train, *collected.eval)]
    markup = markup_note(asked, tokenizer) if data.template == "chat" else None
    return PromptSets(
        train=renderer.prompts(train, context_length - max_new_tokens),
        eval=renderer.prompts(collected.eval, context_length - eval_tokens),
        notes=[*collected.notes(), *left_out, *([markup] if markup else [])],
        weights=collected.weights,
        pass_rates=pass_rates,
    )


def load_prompts(
    source: str | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    role: Role = "train",
    seed: int = 0,
    **settings: Any,
) -> PromptStream:
    """All problems of one data set as a shuffled stream; `take(n)` returns the next n.

    Args:
        source: a data set's name, file, folder or generator, as in `data.train`; or a dict with
            its settings, e.g. {"name": "gsm8k", "num_rows": 100}.
        tokenizer: the base model's; its chat template renders the problems.
        role: "train" or "eval", the part of the data set if it has both.
        seed: of the order.
        settings: other keys of [data], e.g. template="base", instruction="" or system="...".

    Raises:
        UserError: a bad setting, an unusable data set, or a prompt that is too long.
    """
    data = parse_as(DataSection, {role: source, **settings})
    renderer, collected = _Renderer(data, tokenizer), Collected()
    for section in data.train or data.eval:
        collected.add(section, role)
    items = [*collected.train, *collected.eval]
    return PromptStream(renderer.prompts(items, data.max_prompt_tokens), seed)


# --- rendering ------------------------------------------------------------------------------------


class _Renderer:
    """Renders rows as prompts by the settings of a job."""

    def __init__(
        self, data: DataSection, tokenizer: PreTrainedTokenizerBase, *, with_columns: bool = False
    ) -> None:
        """Raises UserError for settings of the other template, or a missing chat template."""
        is_chat = data.template == "chat"
        self._data, self._tokenizer, self._with_columns = data, tokenizer, with_columns
        self._chat = ChatTemplate(tokenizer, data.chat_template_kwargs) if is_chat else None
        if not is_chat and data.system is not None:
            raise UserError("data.system needs data.template='chat'; put the text in data.few_shot")
        if not is_chat and data.chat_template_kwargs:
            raise UserError("data.chat_template_kwargs needs data.template='chat'; remove it")
        if is_chat and data.few_shot:
            raise UserError("data.few_shot needs data.template='base'; put the text in data.system")

    def text(self, row: DataRow, who: str) -> str:
        """The prompt as text."""
        data = self._data
        asked = f"{row.question}\n{data.instruction}" if data.instruction else row.question
        messages = with_question(row.messages, asked)
        if self._chat is None:
            check_plain(messages, who)
            return data.few_shot + plain_text(messages)
        if data.system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", data.system))
        return self._chat.render(
            messages, who, opens_turn=True, tools=read_tools(row.columns.get("tools"))
        )

    def prompts(self, items: Sequence[Item], limit: int) -> list[Prompt]:
        """One prompt per item, each of at most `limit` tokens."""
        if not items:
            return []
        texts = [self.text(item.row, f"prompt {item.prompt_id}") for item in items]
        for item, text in zip(items, texts, strict=True):
            for part in (text, item.row.reference or "", item.row.solution):
                check_characters(part, f"prompt {item.prompt_id}")
        ids = encode_prompts(texts, self._tokenizer, with_start=self._chat is None)
        _check_lengths(items, [len(one) for one in ids], self._data.max_prompt_tokens, limit)
        instruction = self._data.instruction
        prompts = []
        for item, token_ids in zip(items, ids, strict=True):
            row = item.row
            assert row.reference is not None  # `sources` dropped the others
            prompts.append(
                Prompt(
                    prompt_id=item.prompt_id,
                    source=item.label,
                    question=row.question,
                    reference=row.reference,
                    token_ids=tuple(token_ids),
                    solution=finish_solution(row.solution, row.reference, instruction),
                    columns=row.columns if self._with_columns else {},
                )
            )
        return prompts


def _check_lengths(
    items: Sequence[Item], num_tokens_N: Sequence[int], max_prompt_tokens: int, limit: int
) -> None:
    """Raises UserError naming the longest prompt if it is too long."""
    longest = max(range(len(items)), key=lambda index: num_tokens_N[index])
    num_tokens = num_tokens_N[longest]
    if num_tokens <= min(max_prompt_tokens, limit):
        return
    num_over = sum(number > min(max_prompt_tokens, limit) for number in num_tokens_N)
    who = f"prompt {items[longest].prompt_id} has {num_tokens} tokens"
    if num_over > 1:
        who += f" (of {num_over} that are too long)"
    if num_tokens > limit:
        raise UserError(
            f"{who}, and the model's context leaves {limit} after sampling.max_tokens (in the "
            "evaluation, eval.max_tokens); lower that, or remove the row from the data"
        )
    raise UserError(
        f"{who}, more than data.max_prompt_tokens={max_prompt_tokens}; raise it, or remove the row "
        "from the data"
    )
