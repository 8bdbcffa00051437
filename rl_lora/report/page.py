"""The page: one HTML file that holds its data, plotly and our scripts, and asks for nothing.

Plotly and the data are gzip in base64, which the browser unpacks itself. A Content-Security-Policy
allows the scripts by their hashes and forbids every connection, so that nothing that a model wrote
could run or call out even where it were taken for markup; and it is nowhere: the data are JSON, and
the page is made of text nodes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

from rl_lora.report.blocks import DARK, LIGHT, Section, Tile
from rl_lora.storage.jsonl import storable

_ASSETS = resources.files("rl_lora.report") / "assets"


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows; the sections come in their order, the transcripts before the last one."""

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    transcripts: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> bytes:
        """The page's data, as its script takes them: strict JSON in ASCII."""
        record = {
            "title": self.title,
            "subtitle": self.subtitle,
            "tiles": [asdict(tile) for tile in self.tiles],
            "sections": [asdict(section) for section in self.sections],
            "transcripts": self.transcripts,
            "notes": list(self.notes),
        }
        return json.dumps(storable(record), allow_nan=False, separators=(",", ":")).encode()


def to_html(page: Page, data: bytes | None = None, *, live_version: str = "") -> str:
    """The whole file. `data` is the page's JSON where it is at hand already.

    A page with a live_version also asks the server that it came from for newer data.
    """
    script = _asset("page.js") + _asset("transcripts.js") + _asset("start.js")
    plotly = get_plotlyjs()
    nothing, own = "'none'", "'self'"
    policy = "; ".join(
        [
            f"default-src {nothing}",
            f"script-src {_hash(script)} {_hash(plotly)}",
            "style-src 'unsafe-inline'",  # plotly sets styles; a style runs nothing, loads nothing
            "img-src data: blob:",  # a figure's download as PNG
            f"connect-src {own if live_version else nothing}",
            f"base-uri {nothing}",
            f"form-action {nothing}",
        ]
    )
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(page.title),
        "STYLE": _theme() + _asset("page.css"),
        "MODE": "live" if live_version else "file",
        "VERSION": html.escape(live_version),
        "PLOTLY": _packed_plotly(),
        "DATA": _pack(page.to_json() if data is None else data),
        "SCRIPT": script,
    }
    # Filled in one pass over the template: no part is searched for the marks of another.
    first, *pieces = _asset("page.html").split("{{")
    filled = [first]
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def packed_size(data: bytes) -> int:
    """Bytes that the data take in the page."""
    return len(_pack(data))


def _pack(data: bytes) -> str:
    # mtime 0: the same data give the same page.
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


@cache
def _packed_plotly() -> str:
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode("ascii")


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def _theme() -> str:
    """The palette as CSS variables: light, dark where the system or the reader wants it."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in palette.items())
        for palette in (LIGHT, DARK)
    )
    return (
        f":root{{color-scheme:light;{light}}}"
        f"@media(prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{color-scheme:dark;{dark}}}}}"
        f":root[data-theme=dark]{{color-scheme:dark;{dark}}}\n"
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
