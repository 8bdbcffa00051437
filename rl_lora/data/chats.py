"""Reads raw rows for supervised training into chats; the assistant's messages are trained on.

A row format is recognized by its columns: `messages` or `conversations` (chats); `prompt` and
`completion`; `instruction` (and `input`) with `output` or `response`; or a problem with a worked
solution (`row_formats`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rl_lora.data.columns import COLUMN_KEYS, check_named, check_text, reach, unpack
from rl_lora.data.messages import Message, as_turns, read_messages, read_tools, with_question
from rl_lora.data.references import alternatives, without_tolerance
from rl_lora.data.row_formats import DataRow, find_format, last_boxed, number_text, parse_rows
from rl_lora.errors import UserError

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Chat:
    """A row of supervised data."""

    messages: tuple[Message, ...]
    row: int  # position in the source, from 0
    tools: str = ""  # tools that the assistant may call, a JSON list; "": none
    source: str = field(default="", compare=False)  # for error messages

    @property
    def who(self) -> str:
        """The row, for error messages."""
        return f"row {self.row} of {self.source}" if self.source else f"row {self.row}"

    @property
    def answers(self) -> list[int]:
        """Indices of the assistant's messages to train on: not the chat's first message, not empty,
        and without weight 0."""
        return [
            place
            for place, message in enumerate(self.messages)
            if place
            and message.role == "assistant"
            and message.is_trained
            and (message.content or message.extra)
        ]


def problem_chat(row: DataRow, instruction: str) -> Chat:
    """A problem with its worked solution as a chat."""
    asked = f"{row.question}\n{instruction}" if instruction else row.question
    solution = finish_solution(row.solution, row.reference or "", instruction)
    turns = with_question(row.messages, asked)
    before = [replace(message, is_trained=False) for message in turns]
    return Chat((*before, Message("assistant", solution)), row.row)


def parse_chats(
    raws: Iterable[Raw],
    where: str,
    instruction: str,
    prompt: str | None = None,
    completion: str | None = None,
) -> list[Chat]:
    """Reads rows by the given columns, or by the row format that their columns identify.

    Rows with nothing to train on have no answers (`Chat.answers`); the caller counts them.

    Args:
        raws: raw rows.
        where: the source, for error messages.
        instruction: appended to the questions of problems.
        prompt: the prompt's column (`a.b`: field b of object a); None: by row format.
        completion: the completion's column; None: by row format.

    Raises:
        UserError: no row format fits, or a given column is missing or not text.
    """
    raws = [unpack(raw, f"{where}, row {index}") for index, raw in enumerate(raws)]
    columns = {str(column) for raw in raws for column in raw}
    found = ", ".join(sorted(columns)) or "none"
    check_named(raws, where, prompt, completion)
    if (prompt is None) != (completion is None):
        raise UserError(
            f"{where}: set both keys, question and answer, of the data source (the columns of "
            f"prompt and completion); its columns: {found}"
        )
    if prompt is not None and completion is not None:
        read: Reader | None = _columns(prompt, completion)
    else:
        read = next((reader for names, reader in ROW_FORMATS if names <= columns), None)
    if read is not None:
        return [_read_row(read, raw, row, where) for row, raw in enumerate(raws)]
    if find_format(columns) is None:
        raise UserError(
            f"{where}: its columns ({found}) are not those of chats, prompts and completions, or "
            f"problems with solutions; name prompt and completion: {COLUMN_KEYS}"
        )
    return [
        replace(problem_chat(row, instruction), source=where) for row in parse_rows(raws, where)
    ]


# --- row formats ----------------------------------------------------------------------------------

Reader = Callable[[Raw], list[Message]]


def _read_row(read: Reader, raw: Raw, row: int, where: str) -> Chat:
    try:
        messages = read(raw)
    except UserError as error:
        raise UserError(f"{where}, row {row}: {error}") from error
    system = _text(raw, "system")
    if system and messages and messages[0].role != "system":
        messages.insert(0, Message("system", system))
    tools = read_tools(raw.get("tools"))
    return Chat(tuple(messages), row, json.dumps(tools, ensure_ascii=False) if tools else "", where)


def _chat(column: str) -> Reader:
    def read(raw: Raw) -> list[Message]:
        return read_messages(as_turns(raw.get(column)) or [])

    return read


def _instruction(answer: str) -> Reader:
    """Alpaca's format: the input follows the instruction; earlier turns are in column history."""

    def read(raw: Raw) -> list[Message]:
        parts = (_text(raw, "instruction"), _text(raw, "input"))
        asked = "\n\n".join(text for text in parts if text)
        turns = [Message("user", asked), Message("assistant", _text(raw, answer, "answer"))]
        earlier = raw.get("history")
        pairs = earlier if isinstance(earlier, list | tuple) else ()
        return [
            *(
                Message(role, text if isinstance(text, str) else "")
                for pair in pairs
                for role, text in zip(("user", "assistant"), pair, strict=False)
            ),
            *turns,
        ]

    return read


def _columns(prompt: str, completion: str) -> Reader:
    """Each may be text or messages (TRL's conversational format); assistant messages in the prompt
    are not trained on."""

    def read(raw: Raw) -> list[Message]:
        asked, answered = as_turns(reach(raw, prompt)), as_turns(reach(raw, completion))
        before = [Message("user", _text(raw, prompt))] if asked is None else read_messages(asked)
        after = (
            [Message("assistant", _text(raw, completion, "answer"))]
            if answered is None
            else read_messages(answered)
        )
        return [*(replace(message, is_trained=False) for message in before), *after]

    return read


def _text(raw: Raw, column: str, key: str = "question") -> str:
    """The text or number in a column; "" if it is empty."""
    value = reach(raw, column)
    check_text(value, key, column)
    if isinstance(value, list | tuple) and value:
        raise UserError(
            f"column {column!r} is a list, not text; for its first item, set {key}={column}.0"
        )
    return "" if value is None or isinstance(value, list | tuple) else number_text(value)


ROW_FORMATS: tuple[tuple[frozenset[str], Reader], ...] = (
    (frozenset({"messages"}), _chat("messages")),
    (frozenset({"conversations"}), _chat("conversations")),
    (frozenset({"prompt", "completion"}), _columns("prompt", "completion")),
    (frozenset({"instruction", "output"}), _instruction("output")),
    (frozenset({"instruction", "response"}), _instruction("response")),
)


def finish_solution(solution: str, reference: str, instruction: str) -> str:
    """The worked solution, with the answer in the format that the instruction asks for."""
    if not solution:
        return ""
    reference = without_tolerance(alternatives(reference)[0])
    if "####" in instruction and "boxed" not in instruction:
        return f"{solution}\n#### {reference}"
    return solution if last_boxed(solution) is not None else f"{solution}\n\\boxed{{{reference}}}"
