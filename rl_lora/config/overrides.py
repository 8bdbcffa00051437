"""Command-line overrides: `section.key=value` into a nested dict, by the field's type.

A value is TOML (`8`, `[0.9, 0.95]`, `"text"`), except that a text field takes the value literally,
even if it is valid TOML: 2026-11-26, 71e2, true. A list of texts takes one text, or `[a, "b"]`.
`none` means None where the field allows it.
"""

from __future__ import annotations

import re
import tomllib
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from rl_lora.errors import UserError

_ELEMENT = re.compile(r"""\s*("(?:[^"\\]|\\.)*"|'[^']*'|[^,]*?)\s*(?:,|$)""")


def apply_overrides(
    raw: dict[str, Any], overrides: Iterable[str], root: type[BaseModel]
) -> dict[str, Any]:
    """Applies each `section.key=value` to the raw settings, in place, and returns them.

    Shorter keys are applied first, so that `data.train.answer=gold data=my.jsonl` refers to that
    file.

    Args:
        raw: settings as read from TOML.
        overrides: of several for one key, the last one wins.
        root: the settings' class, for the types of its fields.

    Raises:
        UserError: an override is malformed, or its section is a plain value.
    """
    for override in sorted(overrides, key=lambda one: one.partition("=")[0].count(".")):
        _apply(raw, override, root)
    return raw


def _apply(raw: dict[str, Any], override: str, root: type[BaseModel]) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not of the form section.key=value")
    *parents, last = key.strip().split(".")
    node: dict[str, Any] = raw
    field: Any = root
    for parent in parents:
        field = _field(field, parent)
        child = _table(node.get(parent, {}), field)
        if not isinstance(child, dict):
            what = "a list of several" if isinstance(child, list) else "a value, not a section"
            raise UserError(f"override {override!r}: {parent!r} is {what}; set it in a TOML file")
        node[parent] = child
        node = child
    value = parse_value(text, _field(field, last))
    if last == "data" and isinstance(value, str) and isinstance(node.get(last), dict):
        # `data=PATH` replaces the sources and keeps the section's other settings.
        node[last] = {**node[last], "train": value, "eval": ()}
    else:
        node[last] = value


def _table(value: Any, field: Any) -> Any:
    """The table of a section's value: the value, its long form, or a one-item list's item.

    `data = "my.jsonl"` is short for {train = "my.jsonl"}, a source "my.jsonl" for {name = ...}.
    """
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, str):
        if list_item(field) is not None:
            return {"name": value}
        if isinstance(field, type) and "train" in getattr(field, "model_fields", {}):
            return {"train": value}
    return value


def _field(field: Any, key: str) -> Any:
    """The annotation of a section's key; Any for an unknown key."""
    section = next((one for one in (field, list_item(field)) if is_section(one)), None)
    known = section.model_fields.get(key) if section is not None else None
    return Any if known is None else known.annotation


def is_section(field: Any) -> bool:
    """Whether an annotation is a section's class."""
    return isinstance(field, type) and issubclass(field, BaseModel)


def list_item(field: Any) -> Any:
    """The item type of a list field, X of tuple[X, ...]; None for other fields."""
    is_list = get_origin(field) in (tuple, list) and get_args(field)[1:] in ((), (...,))
    return get_args(field)[0] if is_list else None


def _choices(field: Any) -> tuple[Any, ...]:
    is_union = get_origin(field) in (Union, types.UnionType)
    return get_args(field) if is_union else (field,)


def _is_text(field: Any) -> bool:
    """Whether a field takes text; a section does, in its short form."""
    return any(c is str or is_section(c) or get_origin(c) is Literal for c in _choices(field))


def parse_value(text: str, field: Any) -> Any:
    """The value of an override's text for a field of this annotation.

    Example: parse_value("71e2", str) == "71e2", parse_value("71e2", float) == 7100.0.
    """
    plain = _toml(text)
    item = list_item(field)
    if item is not None and _is_text(item):
        return _texts(text, plain, item)
    if isinstance(plain, str):
        return plain
    takes_text = _is_text(field)
    if text in ("none", "None") and (type(None) in _choices(field) or not takes_text):
        return None
    if plain is None or (takes_text and not (isinstance(plain, dict) and is_section(field))):
        return text
    return plain


def _texts(text: str, plain: Any, item: Any) -> Any:
    is_of_texts = isinstance(plain, list) and all(isinstance(one, str) for one in plain)
    if is_of_texts or (is_section(item) and "{" in text):
        return plain if plain is not None else text
    if not (text.startswith("[") and text.endswith("]")):
        return [plain if isinstance(plain, str) else text] if text else []
    words = [match.group(1) for match in _ELEMENT.finditer(text[1:-1])]
    return [_toml(word) if word[:1] in ("'", '"') else word for word in words if word]


def _toml(text: str) -> Any:
    """The value of a TOML text; None if it is not valid TOML."""
    try:
        loaded = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return None
    return loaded["value"] if len(loaded) == 1 else None
