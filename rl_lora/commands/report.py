"""`rl-lora report RUN...`: writes the page, or serves it during the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rl_lora.errors import UserError
from rl_lora.report.build import build_page
from rl_lora.report.page import to_html

FILE_NAME = "report.html"


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the runs' report: RUN/report.html, or ./report.html for several runs.

    Raises:
        UserError: a folder is not a run's, or the file cannot be written.
    """
    page, data = build_page(folders)
    path = output or (folders[0] / FILE_NAME if len(folders) == 1 else Path(FILE_NAME))
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(to_html(page, data), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); choose another file with -o"
        ) from error
    return path


def run(
    folders: Sequence[Path], output: Path | None = None, *, is_watched: bool, port: int | None
) -> int:
    """The command. Raises UserError for a folder that is not a run's."""
    if is_watched:
        from rl_lora.report.live import serve

        serve(folders, port)
        return 0
    path = write_report(folders, output)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
