"""Chat templates: renders conversations as text, finds the end of a turn, and encodes prompts.

A template is a program by the model's author. It may reject a conversation, fail, or silently drop
messages; each of these is an error that names the row. The end of a turn is what the template
writes after an assistant's message, which need not be the tokenizer's end token (Qwen3-8B-Base:
turns end with <|im_end|>, while the end token is <|endoftext|>).
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from rl_lora.data.messages import Message
from rl_lora.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tools = Sequence[Mapping[str, Any]]  # descriptions of the tools an assistant may call

_OTHER_TEMPLATE = "set another template as data.chat_template_kwargs.chat_template"
_FIX = f"{_OTHER_TEMPLATE}, or set data.template='base', which needs none"
_CARRIERS = ("reasoning_content", "reasoning", "thinking", "tool_calls", "function_call")
_PROBE = "where does this turn end"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What a template writes after an assistant's message."""

    token_id: int
    text: str
    rest: str  # text after the token, never sampled


class ChatTemplate:
    """A tokenizer's chat template with the variables of `data.chat_template_kwargs`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> None:
        """Raises UserError if there is no template, no default, or a variable is not used."""
        self._tokenizer, self._kwargs = tokenizer, dict(kwargs)
        known, wanted = tokenizer.chat_template, kwargs.get("chat_template")
        if not known and wanted is None:
            raise UserError(
                "the model's tokenizer has no chat template; set data.template='base' for a base "
                "model"
            )
        if isinstance(known, dict) and wanted is None and "default" not in known:
            raise UserError(
                f"the model's tokenizer has several chat templates ({', '.join(sorted(known))}) "
                "and none named default; set data.chat_template_kwargs.chat_template to one, e.g. "
                f"{min(known)!r}"
            )
        if isinstance(known, dict) and wanted is not None and wanted not in known:
            if "{" not in str(wanted):
                raise UserError(
                    f"data.chat_template_kwargs.chat_template={wanted!r} is neither a template nor "
                    f"the name of one; {nearest(str(wanted), known)}"
                )
        text = str(tokenizer.get_chat_template(wanted, kwargs.get("tools")))
        for name in kwargs:
            if name != "chat_template" and not re.search(rf"\b{re.escape(name)}\b", text):
                raise UserError(
                    f"data.chat_template_kwargs.{name}: the model's chat template has no such "
                    "variable; remove it"
                )

    def render(
        self,
        messages: Sequence[Message],
        who: str,
        *,
        opens_turn: bool,
        tools: Tools | None = None,
    ) -> str:
        """The conversation in the template's markup.

        Args:
            messages: all turns, in order.
            who: the row, for error messages.
            opens_turn: end with an open assistant's turn; if the last message is the assistant's,
                that turn is left open.
            tools: the row's tools; None: those of the settings, if any.

        Raises:
            UserError: the template rejects the conversation, fails, or drops a message.
        """
        is_begun = opens_turn and messages[-1].role == "assistant"
        options: dict[str, Any] = {
            **self._kwargs,
            "add_generation_prompt": opens_turn and not is_begun,
            "continue_final_message": is_begun,
        }
        if tools:
            options["tools"] = list(tools)
        try:
            text = self._apply([message.as_dict() for message in messages], options)
        except Exception as error:  # the template is an arbitrary program
            raise UserError(_refusal(messages, who, error)) from error
        for message in messages:
            if message.role != "assistant":
                _check_written(message, text, who)
        _check_tools(tools or (), text, who)
        return text

    def _apply(self, turns: list[dict[str, Any]], options: dict[str, Any]) -> str:
        """Most templates take the arguments of tool calls as objects, a few as JSON text."""
        apply = self._tokenizer.apply_chat_template
        parsed = [_with_parsed_arguments(turn) for turn in turns]
        try:
            return str(apply(parsed, tokenize=False, **options))
        except TypeError:
            if parsed == turns:
                raise
            return str(apply(turns, tokenize=False, **options))

    def render_answer(
        self,
        messages: Sequence[Message],
        who: str,
        tools: Tools | None = None,
    ) -> tuple[str, str]:
        """(prompt, answer): the prompt as it is sampled from, and the template's text for the last
        message, the assistant's, up to and including the token that ends the turn.

        Some templates open a turn differently in a prompt than in a conversation (QwQ's with
        <think>, which an answer may lack); then the answer starts where two answers differ.

        Raises:
            UserError: the template rejects the conversation or drops a part of it.
        """
        before, answer = list(messages[:-1]), messages[-1]
        prompt = self.render(before, who, opens_turn=True, tools=tools)
        text = self.render(messages, who, opens_turn=False, tools=tools)
        head = prompt
        if not text.startswith(prompt):
            others = [[*before, Message("assistant", word)] for word in ("0", "1")]
            head = _common_start(
                *(self.render(one, who, opens_turn=False, tools=tools) for one in others)
            )
            if not text.startswith(head):
                raise UserError(
                    f"the model's chat template opens the answer of {who} with "
                    f"{text[len(_common_start(head, text)) :][:40]!r} and a prompt with "
                    f"{prompt[len(_common_start(prompt, text)) :][:40]!r}; set "
                    "data.chat_template_kwargs (enable_thinking?) so that they agree"
                )
        if not _is_written(answer, text[len(head) :]):
            # It may begin with the text that opens the turn, such as <think>.
            history = self.render(before, who, opens_turn=False, tools=tools)
            _check_written(answer, text[len(_common_start(history, text)) :], who)
        for name in answer.fields:
            if name in _CARRIERS:
                plain = [*before, _without(answer, name)]
                if self.render(plain, who, opens_turn=False, tools=tools) == text:
                    raise UserError(
                        f"the model's chat template drops {name!r} of an assistant's message in "
                        f"{who}; move it into the content, remove it from the data, or "
                        f"{_OTHER_TEMPLATE}"
                    )
        rest = self.turn_end.rest if self.turn_end else ""
        return prompt, text[len(head) :].removesuffix(rest)

    @cached_property
    def turn_end(self) -> TurnEnd | None:
        """The token that ends an assistant's turn; None if the template writes none."""
        turns = [Message("user", "What is 4 + 3?"), Message("assistant", _PROBE)]
        try:
            text = self.render(turns, "a question and its answer", opens_turn=False)
        except UserError:  # if the template rejects the data's rows too, their error says why
            return None
        _, found, tail = text.rpartition(_PROBE)
        if not found:
            return None
        known = self._tokenizer.added_tokens_decoder
        ids = self._tokenizer.encode(tail, add_special_tokens=False)
        marks = [one for one in ids if one in known and known[one].content.strip()]
        # Some tokenizers (Gemma's) have added tokens such as runs of newlines.
        first = next((one for one in marks if known[one].special), marks[0] if marks else None)
        if first is None:
            return None
        token = known[first].content
        return TurnEnd(first, token, tail.partition(token)[2])


def end_of_turn(
    tokenizer: PreTrainedTokenizerBase, template: str, kwargs: Mapping[str, Any]
) -> int:
    """The token that ends an answer: the chat template's, else the tokenizer's end token."""
    end = ChatTemplate(tokenizer, kwargs).turn_end if template == "chat" else None
    return int(tokenizer.eos_token_id) if end is None else end.token_id


def _refusal(messages: Sequence[Message], who: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    roles = [message.role for message in messages]
    shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
    carried = sorted({name for one in messages for name in one.fields if name in _CARRIERS})
    if carried:
        fix = f"the template must support {', '.join(carried)}; {_OTHER_TEMPLATE}"
    elif "system" in roles:
        fix = f"remove data.system and system messages, or {_FIX}"
    else:
        fix = _FIX
    return f"the model's chat template rejects {who} ({shown}): {reason}; {fix}"


def _is_written(message: Message, text: str) -> bool:
    """Whether the text has the message's content, up to blanks (templates trim it)."""
    content = (message.content or "").strip()
    return content in text or "".join(content.split()) in "".join(text.split())


def _check_written(message: Message, text: str, who: str) -> None:
    """Raises UserError if a template has dropped a message or a part of it."""
    if not _is_written(message, text):
        raise UserError(
            f"the model's chat template drops a part of the {message.role} message in {who}; "
            f"remove it from the data, or {_FIX}"
        )


def check_plain(messages: Sequence[Message], who: str) -> None:
    """Raises UserError for reasoning or tool calls, which data.template='base' cannot render."""
    for message in messages:
        found = [name for name in message.fields if name in _CARRIERS]
        if found:
            raise UserError(
                f"{who} has a message with {found[0]!r}, and data.template='base' renders only "
                "content; move it into the content, or set data.template='chat'"
            )


def _check_tools(tools: Tools, text: str, who: str) -> None:
    """Raises UserError if a template has dropped a tool."""
    for tool in tools:
        name = tool.get("function", tool).get("name", "")
        if str(name) not in text:
            raise UserError(
                f"the model's chat template drops the tool {name!r} of {who}; remove the column "
                f"'tools' from the data, or {_OTHER_TEMPLATE}"
            )


def _without(message: Message, name: str) -> Message:
    fields = json.loads(message.extra)
    del fields[name]
    extra = json.dumps(fields, ensure_ascii=False) if fields else ""
    return Message(message.role, message.content or "", extra)


def _common_start(*texts: str) -> str:
    return commonprefix(texts)  # noqa: RUF071  # these are no paths: characters count


def _with_parsed_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    turn = copy.deepcopy(turn)
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function", call) if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):
                value = json.loads(function["arguments"])
                function["arguments"] = value if isinstance(value, dict) else function["arguments"]
    return turn


# --- token ids ------------------------------------------------------------------------------------


def markup_note(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A note if texts of the data contain special tokens, which the model reads as markup."""
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(map(re.escape, marks)) or r"(?!)")
    found = [match.group() for text in texts if (match := pattern.search(text))]
    if not found:
        return None
    return (
        f"{len(found)} questions contain special tokens of the model (e.g. {found[0]}), which can "
        "end a turn or start one; remove them from the data unless that is intended"
    )


def encode_prompts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, with_start: bool
) -> list[list[int]]:
    """Token ids of texts that a completion will follow.

    With `with_start`, the tokenizer's start token precedes each text unless the text begins with
    it; chat templates write their own. The end token that some tokenizers append (add_eos_token) is
    removed, as nothing can follow it.
    """
    if not texts:
        return []
    # Not verbose: the caller checks lengths, transformers would warn as well.
    encoded = tokenizer(list(texts), add_special_tokens=with_start, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    if not with_start:
        return ids
    start, num_end = _affixes(tokenizer)
    size = len(start)
    cut = [one[: len(one) - num_end] for one in ids]
    return [one[size:] if size and one[size : 2 * size] == start else one for one in cut]


def _affixes(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """(ids that the tokenizer puts before a text, number of ids that it appends)."""
    text = "What is 4 + 3?"
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(text, add_special_tokens=True)["input_ids"])
    for first in range(len(full) - len(bare) + 1):
        if full[first : first + len(bare)] == bare:
            return full[:first], len(full) - first - len(bare)
    return [], 0


def check_characters(text: str, who: str) -> None:
    """Raises UserError for a lone surrogate (half a character), which no tokenizer takes."""
    found = _SURROGATE.search(text)
    if found is not None:
        around = ascii(text[max(0, found.start() - 20) : found.end() + 10])
        raise UserError(
            f"{who} has half a character (the lone surrogate {found.group()!a} in {around}), "
            "which is not valid text; fix it in the data, or remove the row"
        )
