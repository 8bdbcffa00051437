"""JSON lines that survive hostile text, non-finite numbers and a kill in mid-write.

Plain files end in .jsonl, compressed ones in .jsonl.gz. A compressed file grows by whole gzip
members (RFC 1952, section 2.2), which any gzip reader joins; a kill can tear the last one alone.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rl_lora.errors import UserError


def storable(value: Any) -> Any:
    """The value as strict JSON takes it.

    NaN and infinities become None (JSON has no such numbers); a lone surrogate, which is no
    character and which strict readers refuse, becomes the six characters of its escape.
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


def to_line(record: dict[str, Any]) -> str:
    """One ASCII line with its line feed: no control, escape or line-separator character in it."""
    return json.dumps(storable(record), allow_nan=False) + "\n"


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces the file's content, or leaves the old one if killed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a full disk is not to be kept full
        raise


def append_compressed(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Appends the records as one gzip member, forced to disk: all of them are there, or none.

    What a kill tore has to be dropped first (`cut_torn`).
    """
    text = "".join(to_line(record) for record in records)
    with path.open("ab") as file:
        file.write(gzip.compress(text.encode("ascii"), mtime=0))
        file.flush()
        os.fsync(file.fileno())


def cut_torn(path: Path) -> None:
    """Drops what stands after the last whole gzip member of a compressed file.

    Raises:
        UserError: the file is damaged before its end.
    """
    end = max((end for _, end in _members(path)), default=0)
    if end < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The file's objects, compressed or not; what a kill cut short at its end is left out.

    Raises:
        UserError: another line is no JSON object, naming file and line.
    """
    return [record for _, record in _parse(path)]


def cut_after(path: Path, last_step: int) -> int | None:
    """Drops, atomically, the lines whose `step` is over last_step and a half-written last line.

    Returns the last step kept, None where no line is left.

    Raises:
        UserError: a line is no JSON object or has no step, naming file and line.
    """
    if not path.exists():
        return None
    kept_lines, kept_steps = [], []
    for number, (line, record) in enumerate(_parse(path), start=1):
        if not isinstance(record.get("step"), int):
            raise UserError(f"{path} line {number} has no step; delete the line to go on")
        if record["step"] <= last_step:
            kept_lines.append(line + "\n")
            kept_steps.append(record["step"])
    write_text_atomically(path, "".join(kept_lines))
    return max(kept_steps, default=None)


def _parse(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Split on line feeds alone: str.splitlines also splits at characters inside a string.
    # What stands after the last one is empty, or a line that a kill cut short.
    *whole, _ = _read_text(path).split("\n")
    for number, line in enumerate(whole, start=1):
        record = _object(line)
        if record is None:
            raise UserError(
                f"{path} line {number} is not a JSON object; delete the line to go on without it"
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
                        f"{path} is damaged after byte {end} ({error}); delete it to start anew"
                    ) from error
                pending = reader.unused_data
                size += len(piece) - len(pending)
            end += size
            yield b"".join(parts), end


def _object(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None
