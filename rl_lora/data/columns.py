"""Columns of a data set's rows: nested fields, objects stored as JSON text, non-text values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from rl_lora.errors import UserError
from rl_lora.storage.jsonl import parse_json

Raw = Mapping[str, Any]
# How a user names a source's columns, for error messages.
COLUMN_KEYS = (
    "data.train.question and data.train.answer (for an evaluation set, data.eval.question and "
    "data.eval.answer)"
)

# Columns that may hold chats or objects as JSON text, and how such text begins.
_TURNS = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_OBJECT = re.compile(r"""\s*\{\s*['"]\w+['"]\s*:""")
_PACKED = {
    "messages": re.compile(r"\s*\S"),
    "conversations": re.compile(r"\s*\S"),
    "prompt": _TURNS,
    "completion": _TURNS,
    "reward_model": _OBJECT,
    "extra_info": _OBJECT,
}
# Likely names of an object's field with the question or gold answer, most likely first.
_LIKELY = {
    "question": ("question", "problem", "prompt", "text", "content", "value"),
    "answer": ("ground_truth", "gold", "answer", "final_answer", "target", "value", "text"),
}


def parsed(text: str) -> Any:
    """The value of a JSON text; None if it is not JSON."""
    try:
        return parse_json(text)
    except ValueError:
        return None


def reach(raw: Raw, column: str) -> Any:
    """The value of a column; `a.b.0`: item 0 of the list in field b of the object in column a."""
    if column in raw:
        return raw[column]
    value: Any = raw
    for part in column.split("."):
        if isinstance(value, str):
            value = parsed(value)  # an object stored as JSON text, e.g. in a csv file
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def unpack(raw: Raw, where: str) -> Raw:
    """The row, with chats and objects that are stored as JSON text parsed.

    Raises:
        UserError: the text of such a column is not JSON.
    """
    packed = {}
    for column, beginning in _PACKED.items():
        text = raw.get(column)
        if isinstance(text, str) and beginning.match(text):
            packed[column] = parsed(text)
            if not isinstance(packed[column], list | dict):
                raise UserError(
                    f"{where}: column {column!r} is text but not a JSON list or object; store it "
                    "with json.dumps, or as a list or object"
                )
    return {**raw, **packed} if packed else raw


def check_text(value: Any, key: str, column: str) -> None:
    """Checks that the value of the question or answer column (`key`) is text, or a list of it.

    Raises:
        UserError: it is bytes or an object. The message does not name the row.
    """
    if key == "question" and isinstance(value, list):
        return  # a chat
    what = f"the {key} (column {column!r})"
    for place, item in enumerate(value if isinstance(value, list | tuple) else [value]):
        if isinstance(item, bytes | bytearray | memoryview):
            raise UserError(
                f"{what} is bytes, not text; decode it when writing the file, e.g. with "
                "value.decode('utf-8')"
            )
        if isinstance(item, Mapping):
            at = column if item is value else f"{column}.{place}"
            fields = ", ".join(str(field) for field in item)
            better = _text_field(item, key)
            fix = f"set {key}={at}.{better}" if better else "name a column of text"
            raise UserError(
                f"{what} is an object with the fields {fields}; {fix} "
                f"(data.train.{key}, data.eval.{key})"
            )


def _text_field(value: Mapping[str, Any], key: str) -> str | None:
    """Dotted name of the field most likely to hold a question or answer; None: there is none."""
    likely = _LIKELY[key]
    kinds = str if key == "question" else str | int | float | Decimal
    for name in sorted(value, key=lambda one: likely.index(one) if one in likely else len(likely)):
        field = value[name]
        items = field if isinstance(field, list) and field else [field]
        if all(isinstance(item, kinds) for item in items):
            return name
        if isinstance(field, Mapping) and (inner := _text_field(field, key)):
            return f"{name}.{inner}"
    return None


def check_named(raws: Sequence[Raw], where: str, question: str | None, answer: str | None) -> None:
    """Checks the columns that the user has named; a column may be null in all rows.

    Raises:
        UserError: no row has the column, or the field of an object that it names.
    """
    columns = {str(column) for raw in raws for column in raw}
    for key, column in (("question", question), ("answer", answer)):
        if column is None or any(reach(raw, column) is not None for raw in raws):
            continue
        root = column.split(".")[0]
        if not {column, root} & columns:
            raise UserError(
                f"{where} has no column {column!r} (the data source's key {key!r}); "
                f"its columns: {', '.join(sorted(columns)) or 'none'}"
            )
        values = [raw[root] for raw in raws if column not in raw and root in raw]
        fields = {str(name) for one in values if isinstance(one, Mapping) for name in one}
        if root != column and fields:
            raise UserError(
                f"{where}: no row has {column!r} (the data source's key {key!r}); the fields of "
                f"{root!r}: {', '.join(sorted(fields))}"
            )
