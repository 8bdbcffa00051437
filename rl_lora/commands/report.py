"""`rl-lora report RUN...`: writes the page, or serves it while the run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rl_lora.errors import UserError
from rl_lora.report.build import build_page
from rl_lora.report.page import to_html
from rl_lora.storage.jsonl import write_text_atomically

FILE_NAME = "report.html"


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the runs' report: RUN/report.html, or ./report.html for several runs.

    Raises:
        UserError: a folder is no run, or the file cannot be written.
    """
    page, data = build_page(folders)
    path = output or (folders[0] / FILE_NAME if len(folders) == 1 else Path(FILE_NAME))
    try:
        write_text_atomically(path, to_html(page, data))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); choose another file with -o"
        ) from error
    return path


def run(
    folders: Sequence[Path], output: Path | None = None, *, is_watched: bool, port: int | None
) -> int:
    """The command. Raises UserError for what is not a run."""
    if is_watched:
        from rl_lora.report.live import serve

        serve(folders, port)
        return 0
    path = write_report(folders, output)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
