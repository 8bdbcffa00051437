"""From a TOML file and overrides to a job's settings.

A config file holds only departures from the defaults. Dotted overrides on the command line
(`lora.rank=8`) take precedence. An unknown key is an error that suggests the nearest one.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rl_lora.config.overrides import apply_overrides, is_section, list_item
from rl_lora.config.section import Section
from rl_lora.config.sections import RunConfig
from rl_lora.config.shipped import find_config
from rl_lora.errors import UserError, nearest

SomeSection = TypeVar("SomeSection", bound=Section)

# Settings of earlier releases, and what is set instead.
_RETIRED = {
    "sampling.overlap": "set sampling.max_staleness instead: 1 for overlap=true, 0 for false",
}


def load_config(path: Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Reads a TOML file (or a shipped config by name), applies overrides and checks all settings.

    Raises:
        UserError: no such file, or the first bad key with the fix.
    """
    return parse_config(read_settings(path, overrides, RunConfig))


def read_settings(
    path: Path | None, overrides: list[str] | None, root: type[Section]
) -> dict[str, Any]:
    """A TOML file's settings with the overrides applied, not validated yet.

    Args:
        path: the file, or a shipped config's name; None: defaults only.
        overrides: `section.key=value`.
        root: the settings' class, for the types of the overrides.

    Raises:
        UserError: no such file, invalid TOML, or a malformed override.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        path = find_config(path)
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # invalid TOML or UTF-8, or a number of too many digits
            raise UserError(f"{path} is not valid TOML: {error}") from error
    return apply_overrides(raw, overrides or [], root)


def parse_config(raw: dict[str, Any]) -> RunConfig:
    """Validates a nested dict. Raises UserError naming the first bad key."""
    return parse_as(RunConfig, raw)


def parse_as(root: type[SomeSection], raw: dict[str, Any], what: str = "config") -> SomeSection:
    """Validates a nested dict as `root`. Raises UserError naming `what` and its first bad key."""
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            hint = _RETIRED.get(key) or nearest(
                str(first["loc"][-1]), _section_at(first["loc"][:-1], root).model_fields
            )
            raise UserError(f"{what}: unknown key {key!r}; {hint}") from error
        where = f"{key} = {first['input']!r}: " if key else ""
        raise UserError(f"{what}: {where}{first['msg'].removeprefix('Value error, ')}") from error


def with_present_names(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run's record, which an earlier release may have written."""
    sampling = dict(raw.get("sampling", {}))
    if "overlap" not in sampling:
        return raw
    return raw | {"sampling": {"max_staleness": int(sampling.pop("overlap")), **sampling}}


def _section_at(location: tuple[int | str, ...], root: type[BaseModel]) -> type[BaseModel]:
    """The section class at a validation error's location."""
    section = root
    for part in location:
        known = section.model_fields.get(str(part))
        if known is not None:  # else an index of the list that came before
            section = next(filter(is_section, (known.annotation, list_item(known.annotation))))
    return section
