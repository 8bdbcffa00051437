"""Files and folders of rows: jsonl, json, parquet and csv."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rl_lora.errors import UserError

Role = Literal["train", "eval"]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_ROLE_STEMS = ("train", "test", "dev", "val", "valid", "validation", "eval", "data")


def folder_files(folder: Path, role: Role, split: str | None) -> list[Path]:
    """The data files of a split, or of a role; all of them where none is named so."""
    everything = _data_files(folder)
    if not everything:
        inside = sorted(
            child.name for child in folder.iterdir() if child.is_dir() and _data_files(child)
        )
        hint = f"; its folders {', '.join(inside)} have some" if inside else ""
        raise UserError(f"folder {folder} has no data files ({', '.join(SUFFIXES)}){hint}")
    if split is not None:
        files = split_files(folder, split)
        if not files:
            names = ", ".join(path.name for path in everything)
            raise UserError(f"folder {folder} has no {split}.* among its data files ({names})")
        return files
    return split_files(folder, "train" if role == "train" else "test") or everything


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in SUFFIXES
    )


def split_files(folder: Path, split: str) -> list[Path]:
    """train.jsonl, and shards as train-00000-of-00002.parquet."""
    return [
        path
        for path in _data_files(folder)
        if re.fullmatch(rf"{re.escape(split)}(-.*)?", path.stem)
    ]


def file_label(path: Path) -> str:
    """A data set's name in metrics: the file's, or its folder's where the file is train.jsonl."""
    stem = path.stem.lower()
    return path.resolve().parent.name if stem in _ROLE_STEMS else path.stem


def folder_label(path: Path) -> str:
    """A folder's data set's name in metrics."""
    return path.resolve().name or "data"


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a file. Raises UserError where it cannot be read or holds no rows."""
    readers: dict[str, Callable[[Path], list[Any]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: {path.suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}")
    try:
        rows = reader(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is not an object with named columns")
    return rows


def _read_jsonl(path: Path) -> list[Any]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON: {error}") from error
    return rows


def _read_json(path: Path) -> list[Any]:
    """A list of rows, one row a line, or an object with one list in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except ValueError:
        return _read_jsonl(path)
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) != 1:
            raise UserError(f"{path} is not a list of rows; write one JSON object a line")
        return lists[0]
    if not isinstance(value, list):
        raise UserError(f"{path} is not a list of rows; write one JSON object a line")
    return value


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error


def _read_csv(path: Path) -> list[Any]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))
