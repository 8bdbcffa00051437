"""The page: one HTML file that contains its data, plotly and our scripts, and loads nothing.

Plotly and the data are gzipped and in base64; the browser unpacks them. A Content-Security-Policy
allows the scripts by their hashes and forbids every connection, so text written by a model could
neither run nor call out even if it were taken for markup. It never is: the data are JSON, and the
page is built from text nodes.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

from rl_lora.report.blocks import DARK, LIGHT, Section, Tile
from rl_lora.storage.jsonl import storable

_ASSETS = resources.files("rl_lora.report") / "assets"


@dataclass(frozen=True, slots=True)
class Page:
    """The content of a page; the transcripts come before the last section."""

    title: str
    subtitle: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    transcripts: Mapping[str, Any] | None = None
    notes: Sequence[str] = ()

    def to_json(self) -> bytes:
        """The page's data for its script: strict JSON in ASCII."""
        return json.dumps(storable(asdict(self)), allow_nan=False, separators=(",", ":")).encode()


def to_html(page: Page, data: bytes, *, live_version: str = "") -> str:
    """The whole file; with a live_version the page also polls its server for newer `data`."""
    script = _asset("page.js") + _asset("transcripts.js") + _asset("start.js")
    plotly = get_plotlyjs()
    nothing, own = "'none'", "'self'"
    policy = "; ".join(
        [
            f"default-src {nothing}",
            f"script-src {_hash(script)} {_hash(plotly)}",
            "style-src 'unsafe-inline'",  # plotly sets styles, which run and load nothing
            "img-src data: blob:",  # for downloading a figure as PNG
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
        "PLOTLY": packed(plotly.encode()),
        "DATA": packed(data),
        "SCRIPT": script,
    }
    # One pass over the template, so that no part is searched for the marks of another.
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: parts[mark[1]], _asset("page.html"))


@lru_cache(maxsize=2)  # plotly's script, and the data, whose size is looked at first
def packed(content: bytes) -> str:
    """As it stands in the page. Equal contents give an equal page: mtime is 0."""
    return base64.b64encode(gzip.compress(content, mtime=0)).decode("ascii")


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def _theme() -> str:
    """The palette as CSS variables: light, or dark if the system or the reader prefers it."""
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
