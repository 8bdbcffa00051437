"""What was compiled, as a file in parts, so that the next machine need not compile it again."""

from __future__ import annotations

import lzma
import tarfile
from pathlib import Path
from typing import Any

from gpu_stages.stages import CheckFailedError, Context

PART_BYTES = 16 * 2**20
MAX_PARTS = 3  # a machine may return only few files


def caches(context: Context) -> dict[str, Any]:
    """out/caches.tar.xz.00, ...; `cat caches.tar.xz.* | tar xJ -C WORK` puts them back."""
    folder = context.work / "caches"
    num_files = sum(path.is_file() for path in folder.rglob("*"))
    if not num_files:
        if context.is_gpu:
            raise CheckFailedError(f"nothing was compiled into {folder}")
        return {"files": 0}
    whole = context.work / "caches.tar.xz"
    with lzma.open(whole, "wb", preset=1) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        tar.add(folder, arcname="caches")
    figures = {"files": num_files, "bytes": whole.stat().st_size}
    if whole.stat().st_size > MAX_PARTS * PART_BYTES:
        raise CheckFailedError(f"over {MAX_PARTS} parts: kept in {whole}", figures)
    return figures | {"parts": len(split(whole, context.out, PART_BYTES))}


def split(whole: Path, out: Path, part_bytes: int) -> list[Path]:
    """The file's parts in a folder, NAME.00, NAME.01, ...; older ones there are removed."""
    for old in out.glob(f"{whole.name}.[0-9][0-9]"):
        old.unlink()
    parts: list[Path] = []
    with whole.open("rb") as file:
        while data := file.read(part_bytes):
            parts.append(out / f"{whole.name}.{len(parts):02d}")
            parts[-1].write_bytes(data)
    return parts
