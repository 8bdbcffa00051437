"""`rl-lora report RUN...`: writes the page, or serves it during the run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rl_lora.errors import UserError
from rl_lora.storage.jsonl import write_text_atomically

FILE_NAME = "report.html"
EXAMPLES = (
    "rl-lora report runs/quickstart",
    "rl-lora report runs/rank1 runs/rank8 -o ranks.html",
    "rl-lora report runs/quickstart --watch --port 8000",
    "rl-lora report runs/studies/rl_rank --study",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="default: RUN/report.html; ./report.html for several runs",
    )
    where.add_argument(
        "--watch", action="store_true", help="serve the report on localhost and keep it current"
    )
    parser.add_argument(
        "--port", type=int, help="port for --watch (default: 8000, or any free one)"
    )
    parser.add_argument(
        "--study",
        action="store_true",
        help="RUN is a study's folder: draw the figures of 'LoRA Without Regret' from its table",
    )


def write_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the runs' report: RUN/report.html, or ./report.html for several runs.

    Raises:
        UserError: a folder is not a run's, or the file cannot be written.
    """
    from rl_lora.report.build import build_page
    from rl_lora.report.page import to_html

    page, data = build_page(folders)
    path = output or (folders[0] / FILE_NAME if len(folders) == 1 else Path(FILE_NAME))
    try:
        write_text_atomically(path, to_html(page, data))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); choose another file with -o"
        ) from error
    return path


def run(arguments: argparse.Namespace) -> int:
    """Writes or serves the report, or draws a study's figures.

    Raises:
        UserError: a folder is not a run's or a study's, or a file cannot be written.
    """
    if arguments.study:
        from rl_lora.studies.figures import draw_study
        from rl_lora.studies.results import read_table

        for folder in arguments.runs:
            where = folder if folder.is_dir() else folder.parent
            for figure in draw_study(read_table(folder), where / "figures"):
                print(figure)
        return 0
    if arguments.watch:
        from rl_lora.report.live import serve

        serve(arguments.runs, arguments.port)
        return 0
    path = write_report(arguments.runs, arguments.output)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
