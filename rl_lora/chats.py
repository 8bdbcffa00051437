"""Supervised rows as they come -> chats: a list of messages, the assistant's to be learnt.

A layout is known by its columns: `messages` or `conversations` (chats), `prompt` and `completion`,
`instruction` (with `input`) and `output` or `response`; and the problems with worked solutions that
`layouts` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rl_lora.columns import unpack
from rl_lora.errors import UserError
from rl_lora.layouts import DataRow, parse_rows
from rl_lora.prompts import finish_solution

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ROLES |= {"system": "system", "model": "assistant", "prompter": "user", "bot": "assistant"}

Raw = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    Example: Message(role="user", content="What is 4 + 3?")
    """

    role: str  # system, user, assistant; others (tool, ...) as the data set has them
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A row of supervised data.

    Example: Chat(messages=(Message("user", "What is 4 + 3?"), Message("assistant", "7")), row=17)
    """

    messages: tuple[Message, ...]
    row: int  # position in the source, from 0

    @property
    def answers(self) -> list[int]:
        """Places of the assistant's messages that have something before them and are not empty."""
        return [
            place
            for place, message in enumerate(self.messages)
            if place and message.role == "assistant" and message.content
        ]


def problem_chat(row: DataRow, instruction: str) -> Chat:
    """A problem with its worked solution, ending in the format that the instruction asks for."""
    asked = f"{row.question}\n{instruction}" if instruction else row.question
    solution = finish_solution(row.solution, row.reference or "", instruction)
    return Chat((Message("user", asked), Message("assistant", solution)), row.row)


def parse_chats(
    raws: Iterable[Raw],
    where: str,
    instruction: str,
    prompt: str | None = None,
    completion: str | None = None,
) -> list[Chat]:
    """Rows read by the given columns, or by the layout that their columns tell.

    Rows that hold nothing to learn come out without answers (`Chat.answers`), for the caller to
    count.

    Args:
        raws: rows as the file has them.
        where: the source in words, for errors.
        instruction: follows the questions of problems.
        prompt: column of the prompt; None: by layout.
        completion: column of the completion; None: by layout.

    Raises:
        UserError: no layout fits, or a given column is not there.
    """
    raws = [unpack(raw, f"{where}, row {index}") for index, raw in enumerate(raws)]
    columns = {str(column) for raw in raws for column in raw}
    found = ", ".join(sorted(columns)) or "none"
    for key, column in (("question", prompt), ("answer", completion)):
        if column is not None and column not in columns:
            raise UserError(
                f"{where} has no column {column!r} (the data source's key {key!r}); "
                f"its columns: {found}"
            )
    if (prompt is None) != (completion is None):
        raise UserError(
            f"{where}: set both keys, question and answer, of the data source (the columns of "
            f"prompt and completion); its columns: {found}"
        )
    if prompt is not None and completion is not None:
        read: Reader | None = _columns(prompt, completion)
    else:
        read = next((reader for names, reader in LAYOUTS if names <= columns), None)
    if read is not None:
        return [Chat(tuple(read(raw)), row) for row, raw in enumerate(raws)]
    try:
        rows = parse_rows(raws, where)
    except UserError as error:
        raise UserError(
            f"{where}: no chats, no prompts and completions, no problems with solutions among its "
            f"columns ({found}); name them by data.train.question and data.train.answer"
        ) from error
    return [problem_chat(row, instruction) for row in rows]


# --- layouts --------------------------------------------------------------------------------------

Reader = Callable[[Raw], list[Message]]


def _chat(column: str) -> Reader:
    def read(raw: Raw) -> list[Message]:
        turns = raw.get(column)
        if not isinstance(turns, list | tuple):
            return []
        return [_message(turn) for turn in turns if isinstance(turn, Mapping)]

    return read


def _message(turn: Mapping[str, Any]) -> Message:
    role = str(turn.get("role") or turn.get("from") or "")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "".join(part for part in parts if isinstance(part, str))
    return Message(_ROLES.get(role, role), content if isinstance(content, str) else "")


def _instruction(answer: str) -> Reader:
    """Alpaca's: the input stands under the instruction."""

    def read(raw: Raw) -> list[Message]:
        asked = "\n\n".join(
            text for text in (_text(raw["instruction"]), _text(raw.get("input"))) if text
        )
        return [Message("user", asked), Message("assistant", _text(raw.get(answer)))]

    return read


def _columns(prompt: str, completion: str) -> Reader:
    """Either may hold text or messages (TRL's conversational prompts and completions)."""

    def read(raw: Raw) -> list[Message]:
        asked, answered = _chat(prompt)(raw), _chat(completion)(raw)
        return [
            *(asked or [Message("user", _text(raw.get(prompt)))]),
            *(answered or [Message("assistant", _text(raw.get(completion)))]),
        ]

    return read


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


LAYOUTS: tuple[tuple[frozenset[str], Reader], ...] = (
    (frozenset({"messages"}), _chat("messages")),
    (frozenset({"conversations"}), _chat("conversations")),
    (frozenset({"prompt", "completion"}), _columns("prompt", "completion")),
    (frozenset({"instruction", "output"}), _instruction("output")),
    (frozenset({"instruction", "response"}), _instruction("response")),
)
