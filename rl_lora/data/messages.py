"""Reads the messages of a conversation in the formats that data sets use; nothing is dropped.

Fields other than role and content (reasoning, tool calls, a tool's name) are passed on to the chat
template unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rl_lora.data.columns import parsed
from rl_lora.errors import UserError

_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant"}
_ROLES |= {"bot": "assistant", "developer": "system", "observation": "tool"}
_OWN_KEYS = ("role", "from", "content", "value", "weight")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str  # system, user, assistant; others (tool, ...) as the data set has them
    content: str | None  # None: only tool calls
    extra: str = ""  # the other fields as a JSON object; "": none
    is_trained: bool = field(default=True, compare=False)  # False: weight 0, or part of a prompt

    def as_dict(self) -> dict[str, Any]:
        """The dict that chat templates take."""
        more = json.loads(self.extra) if self.extra else {}
        return {"role": self.role, "content": self.content, **more}

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the other fields."""
        return tuple(json.loads(self.extra)) if self.extra else ()


def as_turns(value: Any) -> list[Mapping[str, Any]] | None:
    """The turns of a column that is a conversation, as a list or JSON text; None if it is not."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parsed(value)
    if not isinstance(value, list | tuple) or not value:
        return None
    turns = [turn for turn in value if isinstance(turn, Mapping)]
    is_chat = len(turns) == len(value) and all({"role", "from"} & turn.keys() for turn in turns)
    return turns if is_chat else None


def read_messages(turns: list[Mapping[str, Any]], *, is_trained: bool = True) -> list[Message]:
    """One Message per turn.

    Raises:
        UserError: a part that is not text (an image), content of another type, or a weight other
            than 0 and 1. The error message does not name the row.
    """
    return [_message(turn, is_trained) for turn in turns]


def read_tools(value: Any) -> list[dict[str, Any]]:
    """The tool descriptions in a column, as a list or JSON text; empty if it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value)
    if not isinstance(value, list | tuple) or not all(isinstance(one, dict) for one in value):
        return []
    return list(value)


def _message(turn: Mapping[str, Any], is_trained: bool) -> Message:
    role = str(turn.get("role") or turn.get("from") or "")
    role = _ROLES.get(role, role)
    # Arrow and JSON tables fill missing fields with nulls.
    extra = {k: v for k, v in turn.items() if k not in _OWN_KEYS and v not in (None, [], {}, "")}
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list | tuple):
        content = "".join(_part(part, role) for part in content)
    if content is None and not extra:
        content = ""
    if content is not None and not isinstance(content, str):
        raise UserError(
            f"the {role} message's content is of type {type(content).__name__}, not text"
        )
    weight = turn.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"the {role} message has weight {weight!r}; set 1 (trained on) or 0 (not)")
    text = json.dumps(extra, ensure_ascii=False, default=str) if extra else ""
    return Message(role, content, text, is_trained and weight != 0)


def _part(part: Any, role: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if isinstance(text, str):
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise UserError(f"the {role} message has a part of type {kind!r}; only text is supported")


# --- as text --------------------------------------------------------------------------------------


def with_question(messages: Sequence[Message], asked: str) -> list[Message]:
    """The conversation with its last user message replaced by `asked`."""
    if not messages:
        return [Message("user", asked)]
    places = [place for place, message in enumerate(messages) if message.role == "user"]
    turns = list(messages)
    turns[places[-1]] = replace(turns[places[-1]], content=asked)
    return turns


def plain_text(messages: Sequence[Message]) -> str:
    """System message and question as plain text; longer conversations as `User: ...` lines."""
    if all(message.role in ("system", "user") for message in messages):
        return "\n\n".join(message.content or "" for message in messages) + "\n"
    return conversation_text(messages)


def conversation_text(messages: Sequence[Message]) -> str:
    """`User: ...` and `Assistant: ...` lines, ending with the assistant's turn open."""
    lines = [f"{one.role.capitalize()}: {one.content or ''}" for one in messages]
    is_begun = messages[-1].role == "assistant"
    return "\n\n".join(lines if is_begun else [*lines, "Assistant:"])
