"""A griffe extension of mkdocs.yml: `[N][G]` in a docstring is a shape, not a Markdown link."""

from __future__ import annotations

from typing import Any

from griffe import Extension, Object

_ZERO_WIDTH_SPACE = "\N{ZERO WIDTH SPACE}"


class Shapes(Extension):
    """Breaks what Markdown would read as a reference, without changing what is seen."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every object that griffe loads."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("][", f"]{_ZERO_WIDTH_SPACE}[")
