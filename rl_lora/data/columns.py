"""Columns of a data set's rows: fields within objects, objects written as text, what is no text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from rl_lora.errors import UserError
from rl_lora.storage.jsonl import parse_json

Raw = Mapping[str, Any]

# Columns that hold chats or objects, and how their text begins where it is one of these.
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
# Where a question or a gold answer is likely to be within an object, most likely first.
_LIKELY = {
    "question": ("question", "problem", "prompt", "text", "content", "value"),
    "answer": ("ground_truth", "gold", "answer", "final_answer", "target", "value", "text"),
}


def parsed(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
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
            value = parsed(value)  # an object that was written as JSON text, in a csv file say
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
        else:
            value = value.get(part) if isinstance(value, Mapping) else None
    return value


def unpack(raw: Raw, where: str) -> Raw:
    """The row, its chats and objects that were written as JSON text turned back into these.

    Raises:
        UserError: the text of such a column is no JSON.
    """
    packed = {}
    for column, beginning in _PACKED.items():
        text = raw.get(column)
        if isinstance(text, str) and beginning.match(text):
            packed[column] = parsed(text)
            if not isinstance(packed[column], list | dict):
                raise UserError(
                    f"{where}: column {column!r} is text that is no JSON list or object; write it "
                    "by json.dumps, or the list or object itself"
                )
    return {**raw, **packed} if packed else raw


def check_text(value: Any, key: str, column: str) -> None:
    """Refuses what is no text in the column of the question or answer (key); lists may pass.

    Raises:
        UserError: it is bytes or an object. The message does not name the row.
    """
    if key == "question" and isinstance(value, list):
        return  # a chat
    what = f"the {key} (column {column!r})"
    for place, item in enumerate(value if isinstance(value, list | tuple) else [value]):
        if isinstance(item, bytes | bytearray | memoryview):
            raise UserError(
                f"{what} is bytes, not text; decode it when the file is written, e.g. "
                "value.decode('utf-8')"
            )
        if isinstance(item, Mapping):
            at = column if item is value else f"{column}.{place}"
            fields = ", ".join(str(field) for field in item)
            better = _text_field(item, key)
            fix = f"name the field by {key}={at}.{better}" if better else "name a column of text"
            raise UserError(
                f"{what} is an object with the fields {fields}; {fix} "
                f"(data.train.{key}, data.eval.{key})"
            )


def _text_field(value: Mapping[str, Any], key: str) -> str | None:
    """The dotted name of the likeliest field that holds a question or gold; None: there is none."""
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


def explain_missing(raws: Iterable[Raw], column: str, key: str, where: str) -> None:
    """Raises UserError for a dotted column that no row has; a plain one may be null throughout."""
    root = column.split(".")[0]
    objects = [
        raw[root] for raw in raws if column not in raw and isinstance(raw.get(root), Mapping)
    ]
    if root != column and objects:
        fields = ", ".join(sorted({str(name) for one in objects for name in one}))
        raise UserError(
            f"{where}: no row has {column!r} (the data source's key {key!r}); the fields of "
            f"{root!r}: {fields}"
        )
