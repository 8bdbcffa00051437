"""The bundle for GPU machines: libraries thinned to one architecture, and locked packages."""

from __future__ import annotations

import struct

import pytest
from gpu_bundle import BUILT, DEPS, pinned
from gpu_stages.thin import FATBIN_MAGIC, thin

NAMES = b"\0.nv_fatbin\0.text\0"


def entry(kind: int, arch: int, payload: bytes) -> bytes:
    header = bytearray(64)
    struct.pack_into("<HHIQ", header, 0, kind, 0x101, 64, len(payload))
    struct.pack_into("<I", header, 28, arch)
    return bytes(header) + payload


def fatbin(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", FATBIN_MAGIC, 1, 16, len(body)) + body


def elf(fatbins: bytes, text: bytes) -> bytes:
    """Sections: none, .nv_fatbin, .text, names; their table comes last."""
    start = 64
    parts = [fatbins, text, NAMES]
    offsets = [start]
    for part in parts:
        offsets.append(offsets[-1] + len(part))
    sections = [(0, 0, 0, 0, 0, 0)]
    for name, offset, part in zip((1, 12, 0), offsets, parts, strict=False):
        sections.append((name, 1, 0, 0, offset, len(part)))
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    struct.pack_into("<Q", header, 0x28, offsets[-1])
    struct.pack_into("<HHH", header, 0x3A, 64, len(sections), 3)
    table = b"".join(struct.pack("<IIQQQQ", *s).ljust(64, b"\0") for s in sections)
    return bytes(header) + b"".join(parts) + table


def test_code_for_one_architecture_is_kept_where_it_was() -> None:
    old, own, more = entry(2, 80, b"a" * 24), entry(2, 90, b"b" * 16), entry(2, 90, b"c" * 8)
    ptx = entry(1, 90, b"p" * 16)
    smallest = entry(2, 75, b"s" * 8)
    two = fatbin(old, own, ptx, more) + fatbin(entry(1, 90, b""), entry(2, 80, b"d" * 40), smallest)
    library = elf(two, b"machine code of the host")
    thinned, num_kept = thin(library, 90)
    assert num_kept == 2
    assert len(thinned) == len(library)
    first = struct.pack("<IHHQ", FATBIN_MAGIC, 1, 16, len(own + more)) + own + more
    freed = len(old) + len(ptx)
    assert thinned[64:].startswith(first + bytes(freed))
    second = 64 + len(first) + freed
    kept = struct.pack("<IHHQ", FATBIN_MAGIC, 1, 16, len(smallest)) + smallest
    assert thinned[second:].startswith(kept + bytes(64 + 64 + 40))
    unchanged = 64 + len(two)
    assert thinned[unchanged:] == library[unchanged:]
    assert thin(thinned, 90) == (thinned, 2)


@pytest.mark.parametrize(
    ("library", "told"),
    [
        (b"MZ" + bytes(80), "not a 64-bit ELF file"),
        (elf(fatbin(entry(2, 80, b"a" * 8)), b""), "no machine code for sm_90"),
        (elf(b"", b"x"), "no machine code for sm_90"),
    ],
)
def test_what_cannot_be_thinned(library: bytes, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        thin(library, 90)


def test_the_bundles_packages_are_those_of_the_lock() -> None:
    names = [*DEPS, *BUILT]
    assert [pin.split("==")[0] for pin in pinned(names)] == names
