"""Reduces a CUDA library to the machine code of one GPU architecture.

Its fat binaries are in the ELF section .nv_fatbin: each a header (magic, header size, size of what
follows) and entries (kind, header size, payload size, architecture at byte 28). Those of other
architectures are dropped, the rest is moved to the front, and the freed bytes are set to zero, so
that they compress well. No section, symbol or address changes. A fat binary without code for the
architecture keeps its smallest code of another: the driver skips it, as before.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

FATBIN_MAGIC = 0xBA55ED50
CUBIN = 2  # an entry's kind: machine code (1 is PTX)
ENTRY_HEADER = 64


def thin(library: bytes, arch: int) -> tuple[bytes, int]:
    """(the library with code for sm_<arch> only, how many pieces of such code it has).

    Raises:
        ValueError: not a 64-bit ELF file, or no code for the architecture in it.
    """
    data = bytearray(library)
    num_kept = 0
    for start, end in _fatbin_sections(data):
        position = start
        while position + 16 <= end:
            magic, _, header, size = struct.unpack_from("<IHHQ", data, position)
            if magic != FATBIN_MAGIC:
                position += 8
                continue
            first, stop = position + header, position + header + size
            entries = list(_entries(data, first, stop))
            own = [piece for kind, found, piece in entries if (kind, found) == (CUBIN, arch)]
            num_kept += len(own)
            foreign = [piece for kind, _, piece in entries if kind == CUBIN]
            kept = b"".join(own or [min(foreign or [entries[0][2]], key=len)])
            data[first:stop] = kept.ljust(size, b"\0")
            struct.pack_into("<Q", data, position + 8, len(kept))
            position = -(-stop // 8) * 8
    if not num_kept:
        raise ValueError(f"no machine code for sm_{arch}")
    return bytes(data), num_kept


def _entries(data: bytearray, first: int, stop: int) -> Iterator[tuple[int, int, bytes]]:
    """(kind, architecture, bytes with their header) of each entry of a fat binary."""
    while first + ENTRY_HEADER <= stop:
        kind, _, header, size = struct.unpack_from("<HHIQ", data, first)
        (arch,) = struct.unpack_from("<I", data, first + 28)
        yield kind, arch, bytes(data[first : first + header + size])
        first += header + size


def _fatbin_sections(data: bytearray) -> Iterator[tuple[int, int]]:
    """[start, end) of each section named .nv_fatbin."""
    if data[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    names = sections[names_index][4]
    for name, _, _, _, offset, length in sections:
        begin = names + name
        if bytes(data[begin : data.index(b"\0", begin)]) == b".nv_fatbin":
            yield offset, offset + length
