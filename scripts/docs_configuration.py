"""Writes docs/configuration.md from the settings' classes: `python scripts/docs_configuration.py`.

A key's meaning is the comment next to its field, or the comment lines right above it.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rl_lora.advantages import ADVANTAGES
from rl_lora.config import RewardTermSection, RunConfig, SourceSection
from rl_lora.config.sft import SftConfig
from rl_lora.losses import LOSSES, MASKS
from rl_lora.studies.config import StudySection

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
_HEAD = """\
# Configuration

<!-- Written by `python scripts/docs_configuration.py` from the settings' classes. Do not edit. -->

A config is a TOML file that contains only departures from the defaults below, and any key can be
overridden on the command line:

```
rl-lora train quickstart lora.rank=8 optim.lr=2e-4 data=my_problems.jsonl
```

`rl-lora train CONFIG --dry-run` prints the settings that result, without starting anything. An
unknown key is an error that suggests the nearest one.
"""
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page's text."""
    parts = [_HEAD, "## RL jobs: `rl-lora train`\n", *_tables(RunConfig)]
    parts += [
        "## Options of losses, advantages and masks\n",
        "Keywords of the function that `algorithm.loss`, `algorithm.advantage` or `algorithm.mask` "
        "names; those of your own function likewise.\n",
        _options_table({**LOSSES, **ADVANTAGES, **{f"mask={row}": m for row, m in MASKS.items()}}),
        "## Data sources\n",
        "Each entry of `data.train` and `data.eval`; a plain string is the `name`.\n",
        _table("", SourceSection),
        "## Terms of a reward\n",
        "Each entry of `reward.terms`; a plain string is the `name`. See "
        "[Several rewards](rewards.md#several-rewards).\n",
        _table("", RewardTermSection),
        "## Supervised jobs: `rl-lora sft`\n",
        "`[run]`, `[model]`, `[lora]` and `[optim]` as above; these sections differ:\n",
        *_tables(SftConfig, without=RunConfig),
        "## Studies: `rl-lora study`\n",
        "`[job]` takes the settings of one of the jobs above, and each `[[grid]]` lists of values "
        "for them; see [Studies](studies.md).\n",
        "### `[study]`\n",
        _table("study.", StudySection),
    ]
    return "\n".join(parts)


def _tables(root: type[BaseModel], without: type[BaseModel] | None = None) -> Iterator[str]:
    """A heading and a table for each section that `without` lacks or has as another class."""
    known = {} if without is None else without.model_fields
    for name, field in root.model_fields.items():
        section = field.annotation
        if name in known and known[name].annotation is section:
            continue
        assert isinstance(section, type), name
        assert issubclass(section, BaseModel), name
        yield f"### `[{name}]`\n"
        yield f"{inspect.cleandoc(section.__doc__ or '')}\n"
        yield _table(f"{name}.", section)


def _table(prefix: str, section: type[BaseModel]) -> str:
    meanings = _meanings(section)
    rows = ["| key | default | values | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        cells = (f"`{prefix}{name}`", _default(field), _values(field), meanings.get(name, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _options_table(functions: Mapping[str, Callable[..., Any]]) -> str:
    """A row per keyword, with its default in each function that has it."""
    defaults: dict[str, list[str]] = {}
    for name, function in functions.items():
        for option in inspect.signature(function).parameters.values():
            if option.kind is option.KEYWORD_ONLY:
                value = option.default if isinstance(option.default, str) else f"{option.default:g}"
                defaults.setdefault(option.name, []).append(f"{value} (`{name}`)")
    rows = [f"| `algorithm.{option}` | {', '.join(found)} |" for option, found in defaults.items()]
    return "\n".join(["| key | default |", "|---|---|", *rows]) + "\n"


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, str):
        return f"`'{value}'`" if "\\" in value else f'`"{value}"`'
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{v}"' if isinstance(v, str) else f"{v}" for v in value) + "]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _values(field: FieldInfo) -> str:
    bounds = [
        f"{sign} {getattr(item, name):g}"
        for item in field.metadata
        for name, sign in _BOUNDS.items()
        if getattr(item, name, None) is not None
    ]
    return ", ".join([_type(field.annotation), *bounds])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(one) for one in arguments if one is not type(None))
    if origin is tuple:
        items = {_type(one) for one in arguments if one is not Ellipsis}
        size = "list" if Ellipsis in arguments else f"{len(arguments)} values"
        return f"{size} of {' or '.join(sorted(items))}"
    if origin is dict or annotation is dict:
        return "table"
    names = {str: "text", float: "number", int: "integer", bool: "true or false"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {SourceSection: "sources", RewardTermSection: "terms"}.get(annotation, "table")
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _meanings(section: type[BaseModel]) -> dict[str, str]:
    """Field -> the comments above and next to it, those of base classes included."""
    found: dict[str, str] = {}
    for owner in reversed(section.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        source = inspect.getsource(owner)
        comments = _comments(source)
        (tree,) = ast.parse(source).body
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno
                while first - 1 in comments and comments[first - 1][1]:
                    first -= 1
                lines = range(first, (node.end_lineno or node.lineno) + 1)
                found[node.target.id] = " ".join(comments[n][0] for n in lines if n in comments)
    return found


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Line number -> (comment, whether the line has nothing else)."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokens
        if token.type == tokenize.COMMENT
    }


if __name__ == "__main__":
    main()
