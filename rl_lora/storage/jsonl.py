"""JSON and JSON lines that survive hostile text, non-finite numbers and a kill in mid-write.

Plain files end in .jsonl, compressed ones in .jsonl.gz. A compressed file grows by whole gzip
members (RFC 1952, section 2.2), which any gzip reader joins; a kill can tear only the last one.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rl_lora.errors import UserError


def storable(value: Any) -> Any:
    """The value in a form that strict JSON can hold.

    NaN and infinities become None (JSON has no such numbers); a lone surrogate, which strict
    readers refuse, becomes the six characters of its escape.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {storable(str(key)): storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    return value


def parse_json(text: str) -> Any:
    """The JSON value; an integer with more digits than Python converts stays text.

    Raises:
        ValueError: not JSON, in one short line.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column" if "\n" in text.rstrip("\n") else "column"
        raise ValueError(f"{error.msg} at {place} {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_object(line: str) -> dict[str, Any] | None:
    """The JSON object; None if it is not one."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= (sys.get_int_max_str_digits() or len(text)) else text


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line of a user's file that is not blank.

    Only line feeds end a line: U+2028, U+0085 and form feeds may occur inside a string. Byte order
    marks are skipped.

    Raises:
        UserError: a line is not UTF-8 or not JSON, naming file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = decode_text(line, f"{path}: line {number}").strip()
            if text:
                try:
                    yield number, parse_json(text)
                except ValueError as error:
                    raise UserError(f"{path}: line {number} is not JSON: {error}") from None


def decode_text(content: bytes, where: str) -> str:
    """A user's text without its byte order mark. Raises UserError if it is not UTF-8."""
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise UserError(
            f"{where} is not UTF-8 text (byte 0x{content[error.start]:02x}); convert the file, "
            f"e.g. with `iconv -f {'utf-16' if is_wide else 'latin1'} -t utf-8`"
        ) from None


def to_line(record: dict[str, Any]) -> str:
    """One ASCII line with its line feed, free of control, escape and line-separator characters."""
    return json.dumps(storable(record), allow_nan=False) + "\n"


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces the file's content; a kill or a full disk leaves the old content."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """As `write_text_atomically`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # frees space on a full disk
        error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Replaces the file's content by the value as indented strict JSON; a kill leaves the old."""
    write_text_atomically(path, json.dumps(storable(value), allow_nan=False, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if it is not one or cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def append_compressed(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends the records as one gzip member, forced to disk: all of them or none.

    A member torn by a kill must be dropped first (`cut_torn`).
    """
    text = "".join(to_line(record) for record in records)
    with path.open("ab") as file:
        file.write(gzip.compress(text.encode("ascii"), mtime=0))
        file.flush()
        os.fsync(file.fileno())


def cut_torn(path: Path) -> None:
    """Drops everything after the last whole gzip member of a compressed file.

    Raises:
        UserError: the file is damaged before its end.
    """
    end = max((end for _, end in _members(path)), default=0)
    if end < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, compressed or not, without a last line that a kill cut short.

    Raises:
        UserError: another line is not a JSON object, naming file and line.
    """
    return [record for _, record in _parse(path)]


def cut_after(path: Path, last_step: int) -> int | None:
    """Drops, atomically, lines whose `step` is after last_step and a half-written last line.

    Returns the last step kept; None if no line is left.

    Raises:
        UserError: a line is not a JSON object or has no step, naming file and line.
    """
    if not path.exists():
        return None
    kept_lines, kept_steps = [], []
    for number, (line, record) in enumerate(_parse(path), start=1):
        if not isinstance(record.get("step"), int):
            raise UserError(f"{path} line {number} has no step; delete the line to continue")
        if record["step"] <= last_step:
            kept_lines.append(line + "\n")
            kept_steps.append(record["step"])
    write_text_atomically(path, "".join(kept_lines))
    return max(kept_steps, default=None)


def _parse(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Only line feeds: str.splitlines also splits at characters inside a string. After the last one
    # comes nothing, or a line that a kill cut short.
    *whole, _ = _read_text(path).split("\n")
    for number, line in enumerate(whole, start=1):
        record = parse_object(line)
        if record is None:
            raise UserError(
                f"{path} line {number} is not a JSON object; delete the line to continue without it"
            )
        yield line, record


def _read_text(path: Path) -> str:
    if path.suffix != ".gz":
        return path.read_text(encoding="utf-8", errors="replace")
    return b"".join(content for content, _ in _members(path)).decode("utf-8", errors="replace")


def _members(path: Path) -> Iterator[tuple[bytes, int]]:
    """(content, offset of its end in the file) of each whole gzip member."""
    end, pending = 0, b""
    with path.open("rb") as file:
        while True:
            reader, parts, size = zlib.decompressobj(wbits=31), [], 0
            while not reader.eof:
                piece = pending or file.read(1 << 16)
                if not piece:
                    return
                try:
                    parts.append(reader.decompress(piece))
                except zlib.error as error:
                    raise UserError(
                        f"{path} is damaged after byte {end} ({error}); delete it to start again"
                    ) from error
                pending = reader.unused_data
                size += len(piece) - len(pending)
            end += size
            yield b"".join(parts), end
