"""A hook of mkdocs.yml: formulas become MathML at build time, so that no page loads a script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAYED = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML with every formula converted."""
    content = _INLINE.sub(lambda match: _mathml(match.group(1), "inline"), content)
    return _DISPLAYED.sub(lambda match: _mathml(match.group(1), "block"), content)


def _mathml(latex: str, display: str) -> str:
    return convert(html.unescape(latex), display=display)
