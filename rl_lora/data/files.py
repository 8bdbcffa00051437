"""Files and folders of rows: jsonl, json, parquet, csv, and `Dataset.save_to_disk` folders."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from rl_lora.errors import UserError
from rl_lora.storage.jsonl import decode_text, parse_json, read_values

Role = Literal["train", "eval"]
SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")  # written by `datasets` next to the rows
_ROLE_STEMS = ("train", "test", "dev", "val", "valid", "validation", "eval", "data")


def folder_files(folder: Path, role: Role, split: str | None) -> list[Path]:
    """The data files of a split or role; all files if none is named after the role.

    A split saved by `Dataset.save_to_disk` counts as one file.

    Raises:
        UserError: no data files, or none of that split.
    """
    everything = _data_files(folder)
    if not everything:
        inside = sorted(
            child.name for child in folder.iterdir() if child.is_dir() and _data_files(child)
        )
        hint = f"; give one of its folders that do: {', '.join(inside)}" if inside else ""
        raise UserError(f"folder {folder} has no data files ({', '.join(SUFFIXES)}){hint}")
    if split is not None:
        files = split_files(folder, split)
        if not files:
            names = ", ".join(path.name for path in everything)
            raise UserError(f"folder {folder} has no {split}.* among its data files ({names})")
        return files
    return split_files(folder, "train" if role == "train" else "test") or everything


def _data_files(folder: Path) -> list[Path]:
    """The folder itself if it is a saved data set, else its saved splits or files of rows."""
    if _is_saved(folder):
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        return sorted(path for path in folder.iterdir() if _is_saved(path))
    return sorted(
        path
        for path in folder.iterdir()
        # Hidden files belong to the system or an editor: ._rows.jsonl (macOS), ~$rows.csv (Excel).
        if path.is_file()
        and path.suffix.lower() in SUFFIXES
        and not path.name.startswith((".", "~$"))
        and path.name not in _ABOUT_DATA
    )


def _is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote this folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def split_files(folder: Path, split: str) -> list[Path]:
    """train.jsonl, or shards such as train-00000-of-00002.parquet."""
    return [
        path
        for path in _data_files(folder)
        if re.fullmatch(rf"{re.escape(split)}(-.*)?", path.name if path.is_dir() else path.stem)
    ]


def label_of(path: Path) -> str:
    """A data set's name in metrics: the folder's, also of a file such as train.jsonl, or the file's
    without its suffix."""
    if path.is_dir():
        return path.resolve().name or "data"
    return path.resolve().parent.name if path.stem.lower() in _ROLE_STEMS else path.stem


def read_file(path: Path) -> list[dict[str, Any]]:
    """The rows of a file or a `save_to_disk` folder.

    Raises:
        UserError: it cannot be read, or a row has no named columns.
    """
    if path.is_dir():
        return _read_saved(path)
    readers: dict[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
        ".jsonl": read_values,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".csv": _read_csv,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: {path.suffix or 'no suffix'} is not one of {', '.join(SUFFIXES)}")
    rows = []
    try:
        for number, row in reader(path):
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}: {'line' if reader is read_values else 'row'} {number} is "
                    f"{_KINDS.get(type(row), 'a number')}, not an object with named columns; "
                    'write {"question": ..., "answer": ...}'
                )
            rows.append(row)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return rows


_KINDS = {list: "an array", str: "text", bool: "true or false", type(None): "null"}


def _read_json(path: Path) -> Iterable[tuple[int, Any]]:
    """A list of rows, one row per line, or an object containing one list of rows."""
    text = decode_text(path.read_bytes(), str(path))
    try:
        value = parse_json(text)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            parse_json(text.lstrip().partition("\n")[0])
            return read_values(path)
        raise UserError(f"{path} is not JSON: {error}") from None
    if isinstance(value, dict):
        tables = [item for item in value.values() if _is_table(item)]
        if len(tables) > 1:
            raise UserError(f"{path} has several lists of rows; write each to a separate file")
        value = tables[0] if tables else [value]  # a single JSON line
    if not isinstance(value, list):
        raise UserError(f"{path} is not a list of rows; write one JSON object per line")
    return enumerate(value, start=1)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and (not value or isinstance(value[0], dict))


def _read_parquet(path: Path) -> Iterable[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # With partitioning, a parent folder named lr=0.1 would become a column.
        table = pyarrow.parquet.read_table(path, partitioning=None)
        return enumerate(table.to_pylist(), start=1)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error


def _read_saved(folder: Path) -> list[dict[str, Any]]:
    """What `Dataset.save_to_disk` wrote."""
    import datasets
    import pyarrow

    try:
        rows: list[dict[str, Any]] = datasets.load_from_disk(str(folder)).to_list()
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{folder} cannot be read by datasets.load_from_disk: {reason}") from error
    return rows


def _read_csv(path: Path) -> Iterable[tuple[int, Any]]:
    """Rows below a header; the delimiter is the most frequent of `,;` and tab in the header."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = decode_text(path.read_bytes(), str(path))
    header_text = text.partition("\n")[0]
    delimiter = max(",;\t", key=header_text.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise UserError(f"{path}: its header has the column {twice[0]!r} twice; rename one")
        for cells in reader:
            if len(cells) > len(header):
                raise UserError(
                    f"{path}: line {reader.line_num} has {len(cells)} cells under a header of "
                    f"{len(header)} columns; put cells with a {delimiter!r} in double quotes"
                )
            if cells:
                padded = [*cells, *[None] * (len(header) - len(cells))]
                yield reader.line_num, dict(zip(header, padded, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num} cannot be read: {error}") from error
